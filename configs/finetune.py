r"""Fine-tuning for age on UTKFace, from a pre-trained backbone or from scratch.

    coatnet-jax finetune --config=finetune:micro --config.init_from=runs/pretrain \
        --workdir=runs/finetune

The argument after the colon is a list of words in any order, one model at most (`micro` unless
named):

    micro, atto, coatnet_0 … coatnet_5    the backbone; coatnet_nano_rw, coatnet_rmlp_1_rw, …
               are timm's, for weights that `coatnet-jax import-timm` brought here; to compare
               with: simple_cnn, resnet18, resnet34, resnet50, efficientnet_b0, mobilenet_v2 and
               vit_s16
    drawn      the drawn faces instead of UTKFace (48 px, minutes on two CPU cores)
    cpu        UTKFace at 64 px: under an hour on two CPU cores with `micro`
    bf16       bfloat16 compute with float32 parameters
    tiny       a few steps, seconds: to see that everything runs

Without `init_from` the same recipe trains from scratch (timm's CoAtNets and `cpu`: set
`optim.layer_decay=1`).
"""

import ml_collections

from coatnet_jax.config import check_words, only_one

RW = ("nano_rw", "0_rw", "1_rw", "2_rw", "3_rw", "bn_0_rw")
RMLP = ("rmlp_nano_rw", "rmlp_1_rw", "rmlp_1_rw2", "rmlp_2_rw")
TIMM = tuple(f"coatnet_{name}" for name in (*RW, *RMLP))
BASELINES = (
    *("simple_cnn", "resnet18", "resnet34", "resnet50"),
    *("efficientnet_b0", "mobilenet_v2", "vit_s16"),
)
PAPER = tuple(f"coatnet_{i}" for i in range(6))
MODELS = ("micro", "atto", *PAPER, *TIMM, *BASELINES)
WORDS = ("drawn", "cpu", "bf16", "tiny")


def get_config(variant: str = "micro") -> ml_collections.ConfigDict:
    """The configuration for a comma-separated `variant`; unknown words raise ValueError."""
    words = variant.split(",")
    check_words(words, (*MODELS, *WORDS), stage="finetune")
    model = only_one(words, MODELS, "models", stage="finetune") or "micro"
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.stage = "finetune"
    config.epochs = 60.0
    config.batch_size = 128
    config.init_from = ""  # a pre-training or import-timm folder; empty: from scratch
    # Go on from a fine-tuning: `init_from` gives its heads too, where both have the same loss.
    config.init_head = False
    config.max_minutes = 0.0  # stop cleanly after this long (0: never); the same command resumes
    # Several processes: auto (a cluster tells), or HOST:PORT,PROCESSES,INDEX to each; empty: one.
    config.distributed = ""

    config.data = data = ml_collections.ConfigDict()
    data.root = ""  # empty: $COATNET_JAX_HOME or the user's cache folder
    data.name = "utkface"
    data.splits = "default"
    data.crop = "utkface"  # where the face lies in the pictures, for crops from one's own photos
    # Training images whose copies disagree on the age: keep, drop (left out), or widen (each learns
    # the ages of all copies, by equal shares). Validation and test stay as they are.
    data.label_noise = "keep"
    data.image_size = 200  # uint8 pixels handed to the device; UTKFace's own: nothing to resize
    data.workers = 0  # Grain worker processes; 0 decodes in threads of this process
    data.cache = "none"  # or host, device: decoded once, kept in memory or on the device

    config.model = ml_collections.ConfigDict()
    config.model.name = f"coatnet_{model}" if model in ("micro", "atto") else model
    config.model.image_size = 112
    # Taken from the channels, of values 0-1; weights in `init_from` that had others keep them.
    config.model.mean = (0.485, 0.456, 0.406)
    config.model.std = (0.229, 0.224, 0.225)
    config.model.drop_path = 0.2
    config.model.dtype = "float32"
    config.model.remat = False  # recompute blocks in the backward pass: less memory, more time
    config.model.scan = False  # equal blocks as one compiled loop: deep models compile sooner
    config.model.attention = "xla"  # or cudnn (NVIDIA GPU, bf16, even numbers of tokens)

    config.augment = augment = ml_collections.ConfigDict()
    augment.crop = (0.6, 1.0)  # share of the picture's area
    augment.ratio = (0.9, 1.11)
    augment.flip_prob = 0.5
    augment.jitter_prob = 0.8
    augment.jitter = 0.3
    # Photos of other sources are sharper or less sharp than the training's: chances of each view to
    # be blurred and sharpened, the blur's width in pixels of the view, the greatest unsharp mask.
    augment.blur_prob, augment.blur_sigma = 0.0, (0.1, 1.5)
    augment.sharpen_prob, augment.sharpen = 0.0, 1.0
    augment.erase_prob = 0.25
    augment.rand_augment_ops = 0  # of RandAugment's operations, so many for each view; 0: off
    augment.rand_augment_magnitude = 9.0  # 0-10
    # Sizes of the training views, each for an equal share of the epochs: (80, 112), the last one
    # model.image_size. Empty: that size throughout. Evaluation always has the last one.
    config.progressive = ()
    # Evaluation and prediction average over the centres of a picture that keep these shares of its
    # side. In training faces are magnified by the crops; a centre shows them as large as that
    # (arXiv 1906.06423). (1.0,): the whole picture alone.
    config.eval_sides = (1.0, 0.9)
    config.mixup = 0.1  # alpha of the Beta distribution; 0: off

    config.loss = ml_collections.ConfigDict()
    # Or cross_entropy, dldl, sord, sord_squared, mean_variance, mean_residue, or_cnn, coral, corn,
    # l1, mse, classes_4, bins_9: `coatnet_jax/age_losses.py` says what each one is.
    config.loss.name = "kl_l1"
    config.loss.sigma = 2.0  # years; width of the Gaussian label of kl_l1 and dldl
    config.loss.decode = "median"  # or mean, argmax: the age that the probabilities stand for
    config.loss.gender = 0.1  # weight of the auxiliary gender head; 0: off
    config.loss.race = 0.1  # weight of the auxiliary race head; 0: off
    config.loss.balanced = False  # every gender and every race weighs the same in their losses

    # Distillation: these fine-tunings, their folders with commas between, see every training view
    # too, and the mean of their answers is such a share of its label.
    config.distill = ml_collections.ConfigDict()
    config.distill.teachers = ""
    config.distill.weight = 0.5

    config.optim = optim = ml_collections.ConfigDict()
    optim.name = "adamw"
    optim.lr = 5e-4  # at batch 128; scaled linearly
    optim.weight_decay = 0.05
    optim.clip_norm = 1.0
    optim.warmup_epochs = 3.0
    optim.layer_decay = 1.0
    # Or 'head', 'stage4', 'stage3', …: what lies before it stays as it is, without a backward pass.
    optim.train_from = "full"
    config.ema = 0.999  # exponential moving average of the parameters; 0: off

    config.monitor = ml_collections.ConfigDict()
    config.monitor.every_epochs = 1.0
    config.monitor.patience = 15  # stop after so many evaluations without a better validation MAE
    config.log_every = 10
    config.track = ""  # besides metrics.jsonl: tensorboard, wandb, or both with a comma

    if model in PAPER:  # as V
        config.epochs, optim.warmup_epochs = 100.0, 5.0
        optim.weight_decay = 0.1
    if model in TIMM:
        optim.layer_decay = 0.75  # what ImageNet taught is to be kept, most in the first layers
    if "cpu" in words:
        data.image_size, config.model.image_size = 80, 64
        config.epochs, optim.warmup_epochs, config.ema = 20, 1.0, 0.998
        optim.lr, config.model.drop_path = 1e-3, 0.1
        if model not in BASELINES:
            optim.layer_decay = 0.9  # a short pre-training leaves the early layers much to learn
    if model in ("micro", "atto"):
        # Small models are underfitted by what larger ones need (docs/results.md, D and D2).
        config.model.drop_path, config.mixup = 0.0, 0.0
        augment.erase_prob, augment.jitter = 0.1, 0.2
        if "cpu" not in words:
            optim.lr = 1e-3  # as U
    if "drawn" in words:
        data.name, data.image_size = "drawn", 64
        config.model.image_size = 48
        config.epochs, config.batch_size, optim.warmup_epochs = 26, 64, 3.0
        # Few pictures and minutes: a high rate everywhere, and views close to the picture.
        optim.lr, optim.layer_decay, config.model.drop_path = 3e-3, 1.0, 0.0
        augment.crop, augment.jitter, augment.erase_prob = (0.8, 1.0), 0.2, 0.0
        config.ema, config.mixup, config.monitor.every_epochs = 0.98, 0.0, 2.0
    if "bf16" in words:
        config.model.dtype = "bfloat16"
    if "tiny" in words:
        config.epochs, config.batch_size, optim.warmup_epochs = 1, 32, 0.0
        config.log_every = 2
    return config
