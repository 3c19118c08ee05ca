"""Self-supervised pre-training, with SimCLR unless another method is named.

    coatnet-jax pretrain --config=pretrain:micro --workdir=runs/pretrain
    coatnet-jax pretrain --config=pretrain:micro,byol --workdir=runs/byol

The argument after the colon is a list of words in any order, one model (`micro`
unless named) and one method at most:

    micro, atto, coatnet_0 … coatnet_5    the backbone; coatnet_nano_rw, coatnet_rmlp_1_rw, …
               are timm's, for weights that `coatnet-jax import-timm` brought here; to compare
               with: simple_cnn, resnet18, resnet34, resnet50, efficientnet_b0, mobilenet_v2 and
               vit_s16
    simclr, byol, barlow_twins, vicreg, simsiam, dino    the method, with settings of its own;
               supcon and rank_n_contrast see the ages: ceilings to compare the others with
    drawn      the drawn faces instead of UTKFace (48 px, minutes on two CPU cores)
    cpu        UTKFace at 48 px: about an hour on two CPU cores with `micro`
    bf16       bfloat16 compute with float32 parameters
    lars       LARS as in the SimCLR paper instead of AdamW
    strong     crops, colours and blur as strong as in the SimCLR paper
    tiny       a few steps, seconds: to see that everything runs

Views follow the SimCLR paper with weaker crops and blur, which would remove what tells age. Heads
are sized for batches of some hundred faces; the papers' larger ones are named beside them.
"""

import ml_collections

from coatnet_jax.config import check_words, only_one

RW = ("nano_rw", "0_rw", "1_rw", "2_rw", "3_rw", "bn_0_rw")
RMLP = ("rmlp_nano_rw", "rmlp_1_rw", "rmlp_1_rw2", "rmlp_2_rw")
BASELINES = (
    *("simple_cnn", "resnet18", "resnet34", "resnet50"),
    *("efficientnet_b0", "mobilenet_v2", "vit_s16"),
)
MODELS = ("micro", "atto", *(f"coatnet_{i}" for i in (*range(6), *RW, *RMLP)), *BASELINES)
WORDS = ("drawn", "cpu", "bf16", "lars", "strong", "tiny")
MLP3 = {"layers": 3, "hidden": 2048, "out": 2048}
# What each method sets of config.loss, config.projection and config.prediction.
METHODS = {
    "simclr": {
        "loss": {
            "temperature": 0.2,
            "decoupled": False,  # leave the positive out of the denominator (DCL)
            "chunk": 0,  # rows of similarities held at a time: linear memory; 0: all
        },
        "projection": {"layers": 3, "hidden": 2048, "out": 256},
    },
    "byol": {
        "loss": {"momentum": 0.99},  # the first one; rises to 1. 0.996 for 1,000 epochs
        "projection": {"layers": 2, "hidden": 4096, "out": 256},
        "prediction": {"layers": 2, "hidden": 4096},
    },
    "barlow_twins": {
        "loss": {"redundancy": 0.005},
        "projection": MLP3,  # paper: 8192 each
    },
    "vicreg": {
        "loss": {"invariance": 25.0, "variance": 25.0, "covariance": 1.0},
        "projection": MLP3,  # paper: 8192 each
    },
    "simsiam": {
        "loss": {},
        "projection": MLP3,
        "prediction": {"layers": 2, "hidden": 512},
    },
    "dino": {
        "loss": {
            "student_temperature": 0.1,
            "teacher_temperature": 0.04,
            "center_momentum": 0.9,
            "momentum": 0.996,  # the teacher's first one; rises to 1
            "frozen_prototypes": 0.01,  # share of the training
        },
        "projection": {"layers": 3, "hidden": 2048, "bottleneck": 256, "out": 4096},  # paper: 65536
    },
    "supcon": {
        "loss": {"temperature": 0.1, "years": 5},  # so many years of age are one class
        "projection": {"layers": 3, "hidden": 2048, "out": 256},
    },
    "rank_n_contrast": {
        "loss": {"temperature": 2.0},
        "projection": {"layers": 0, "hidden": 2048, "out": 256},  # 0: the features themselves
    },
}


def get_config(variant: str = "micro") -> ml_collections.ConfigDict:
    """The configuration for a comma-separated `variant`; unknown words raise ValueError."""
    words = variant.split(",")
    check_words(words, (*MODELS, *METHODS, *WORDS), stage="pretrain")
    model = only_one(words, MODELS, "models", stage="pretrain") or "micro"
    method = only_one(words, METHODS, "methods", stage="pretrain") or "simclr"
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.stage = "pretrain"
    config.method = method
    config.epochs = 100.0
    config.batch_size = 512
    # Parts that the batch passes in, one after the other, to save memory. BatchNorm and losses that
    # compare images see one part at a time: this is not a larger batch to them.
    config.accumulate = 1
    config.init_from = ""  # a run or import-timm folder to take the backbone from
    config.max_minutes = 0.0  # stop cleanly after this long (0: never); the same command resumes
    # Several processes: auto (a cluster tells), or HOST:PORT,PROCESSES,INDEX to each; empty: one.
    config.distributed = ""

    config.data = data = ml_collections.ConfigDict()
    data.root = ""  # empty: $COATNET_JAX_HOME or the user's cache folder
    data.name = "utkface"
    data.splits = "default"
    data.image_size = 200  # uint8 pixels handed to the device; UTKFace's own: nothing to resize
    data.workers = 0  # Grain worker processes; 0 decodes in threads of this process
    data.cache = "none"  # or host, device: decoded once, kept in memory or on the device

    config.model = ml_collections.ConfigDict()
    config.model.name = f"coatnet_{model}" if model in ("micro", "atto") else model
    config.model.image_size = 112
    # Taken from the channels, of values 0-1; weights in `init_from` that had others keep them.
    config.model.mean = (0.485, 0.456, 0.406)
    config.model.std = (0.229, 0.224, 0.225)
    config.model.drop_path = 0.0
    config.model.dtype = "float32"
    config.model.remat = False  # recompute blocks in the backward pass: less memory, more time
    config.model.scan = False  # equal blocks as one compiled loop: deep models compile sooner
    config.model.attention = "xla"  # or cudnn (NVIDIA GPU, bf16, even numbers of tokens)

    for part, settings in METHODS[method].items():
        config[part] = ml_collections.ConfigDict(settings)

    config.augment = augment = ml_collections.ConfigDict()
    augment.crop = (0.3, 1.0)  # share of the picture's area
    augment.ratio = (0.85, 1.18)
    augment.flip_prob = 0.5
    augment.jitter_prob = 0.8
    augment.jitter = 0.5
    augment.grey_prob = 0.2
    augment.blur_prob = 0.2
    augment.blur_sigma = (0.1, 1.0)

    config.optim = optim = ml_collections.ConfigDict()
    optim.name = "adamw"
    optim.lr = 1e-3  # at batch 512
    optim.scaling = "linear"  # of lr with the batch; or sqrt, none
    optim.weight_decay = 0.05
    optim.clip_norm = 1.0
    optim.warmup_epochs = 5.0

    config.monitor = ml_collections.ConfigDict()
    config.monitor.every_epochs = 1.0
    config.monitor.images = 2000  # training and validation images each, for the age errors
    config.log_every = 10
    config.track = ""  # besides metrics.jsonl: tensorboard, wandb, or both with a comma

    if "drawn" in words:
        data.name, data.image_size = "drawn", 64
        config.model.image_size = 48
        config.epochs, config.batch_size, optim.warmup_epochs = 8, 128, 1.0
        config.monitor.every_epochs, config.monitor.images = 4.0, 500
        augment.crop, augment.jitter = (0.5, 1.0), 0.3
        _shrink_heads(config, hidden=8, out=4)
    if "cpu" in words:
        data.image_size, config.model.image_size = 72, 48
        config.epochs, config.batch_size, optim.warmup_epochs = 20, 256, 2.0
        _shrink_heads(config, hidden=4, out=2)
        config.monitor.every_epochs = 2.0
    if "bf16" in words:
        config.model.dtype = "bfloat16"
    if "lars" in words:
        optim.name, optim.lr, optim.weight_decay, optim.clip_norm = "lars", 1.7, 1e-6, 0.0
        optim.scaling = "sqrt"
    if "strong" in words:
        augment.crop, augment.ratio, augment.jitter = (0.08, 1.0), (0.75, 1.33), 1.0
        augment.blur_prob, augment.blur_sigma = 0.5, (0.1, 2.0)
    if "tiny" in words:
        config.epochs, config.batch_size, optim.warmup_epochs = 1, 32, 0.0
        config.monitor.every_epochs, config.monitor.images = 1.0, 64
        config.log_every = 2
    return config


def _shrink_heads(config: ml_collections.ConfigDict, *, hidden: int, out: int) -> None:
    """Divide the widths of the projection and the prediction."""
    config.projection.hidden //= hidden
    config.projection.out //= out
    if "prediction" in config:
        config.prediction.hidden //= hidden
