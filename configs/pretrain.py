"""SimCLR pre-training.

    coatnet-jax pretrain --config=pretrain:micro --workdir=runs/pretrain

The argument after the colon is a list of words, the first one the model:

    micro, atto, coatnet_0 … coatnet_5    the backbone; coatnet_nano_rw, coatnet_rmlp_1_rw, …
               are timm's, for weights that `coatnet-jax import-timm` brought here; to compare
               with: simple_cnn, resnet18, resnet34, resnet50, efficientnet_b0, mobilenet_v2 and
               vit_s16
    drawn      the drawn faces instead of UTKFace (48 px, minutes on two CPU cores)
    cpu        UTKFace at 48 px: about an hour on two CPU cores with `micro`
    bf16       bfloat16 compute with float32 parameters
    lars       LARS as in the SimCLR paper instead of AdamW
    tiny       a few steps, seconds: to see that everything runs

Views follow the SimCLR paper with weaker crops and blur, which would remove what tells age.
"""

import ml_collections

RW = ("nano_rw", "0_rw", "1_rw", "2_rw", "3_rw", "bn_0_rw")
RMLP = ("rmlp_nano_rw", "rmlp_1_rw", "rmlp_1_rw2", "rmlp_2_rw")
BASELINES = (
    *("simple_cnn", "resnet18", "resnet34", "resnet50"),
    *("efficientnet_b0", "mobilenet_v2", "vit_s16"),
)
MODELS = ("micro", "atto", *(f"coatnet_{i}" for i in (*range(6), *RW, *RMLP)), *BASELINES)
WORDS = ("drawn", "cpu", "bf16", "lars", "tiny")


def get_config(variant: str = "micro") -> ml_collections.ConfigDict:
    """The configuration for a comma-separated `variant`; unknown words raise ValueError."""
    model, *words = variant.split(",")
    for word, known in [(model, MODELS), *((w, WORDS) for w in words)]:
        if word not in known:
            raise ValueError(
                f"pretrain config {variant!r}: {word!r} is not one of {', '.join(known)}"
            )
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.stage = "pretrain"
    config.epochs = 100.0
    config.batch_size = 512
    config.init_from = ""  # a run or import-timm folder to take the backbone from
    config.max_minutes = 0.0  # stop cleanly after this long (0: never); the same command resumes

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

    config.projection = ml_collections.ConfigDict()
    config.projection.layers = 3
    config.projection.hidden = 2048
    config.projection.out = 256

    config.augment = augment = ml_collections.ConfigDict()
    augment.crop = (0.3, 1.0)  # share of the picture's area
    augment.ratio = (0.85, 1.18)
    augment.flip_prob = 0.5
    augment.jitter_prob = 0.8
    augment.jitter = 0.5
    augment.grey_prob = 0.2
    augment.blur_prob = 0.2
    augment.blur_sigma = (0.1, 1.0)

    config.loss = ml_collections.ConfigDict()
    config.loss.temperature = 0.2
    config.loss.decoupled = False

    config.optim = optim = ml_collections.ConfigDict()
    optim.name = "adamw"
    optim.lr = 1e-3  # at batch 512; scaled linearly (adamw) or by the square root (lars)
    optim.weight_decay = 0.05
    optim.clip_norm = 1.0
    optim.warmup_epochs = 5.0

    config.monitor = ml_collections.ConfigDict()
    config.monitor.every_epochs = 1.0
    config.monitor.images = 2000  # training and validation images each, for the kNN age error
    config.log_every = 10

    if "drawn" in words:
        data.name, data.image_size = "drawn", 64
        config.model.image_size = 48
        config.epochs, config.batch_size, optim.warmup_epochs = 8, 128, 1.0
        config.monitor.every_epochs, config.monitor.images = 4.0, 500
        augment.crop, augment.jitter = (0.5, 1.0), 0.3
        config.projection.hidden, config.projection.out = 256, 64
    if "cpu" in words:
        data.image_size, config.model.image_size = 72, 48
        config.epochs, config.batch_size, optim.warmup_epochs = 20, 256, 2.0
        config.projection.hidden, config.projection.out = 512, 128
        config.monitor.every_epochs = 2.0
    if "bf16" in words:
        config.model.dtype = "bfloat16"
    if "lars" in words:
        optim.name, optim.lr, optim.weight_decay, optim.clip_norm = "lars", 1.7, 1e-6, 0.0
    if "tiny" in words:
        config.epochs, config.batch_size, optim.warmup_epochs = 1, 32, 0.0
        config.monitor.every_epochs, config.monitor.images = 1.0, 64
        config.log_every = 2
    return config
