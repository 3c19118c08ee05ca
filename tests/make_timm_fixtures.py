"""Writes timm_fixtures.json: logits that timm's models give for made-up weights and an image.

Weights and image follow from names and shapes alone, so that a test builds them again, without
torch, and needs only the few numbers in the file. Run where torch and timm are installed:

    PYTHONPATH=benchmarks python tests/make_timm_fixtures.py      # from the repository's folder
"""

import functools
import hashlib
import importlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "timm_fixtures.json"
SIZE = 64  # pixels
DEPTHS = (1, 2, 2, 1)  # every kind of block once, and quick to compile
MODELS = (
    "coatnet_0_224",
    "coatnet_nano_rw_224",
    "coatnet_0_rw_224",
    "coatnet_1_rw_224",
    "coatnet_2_rw_224",
    "coatnet_bn_0_rw_224",
    "coatnet_rmlp_nano_rw_224",
    "coatnet_rmlp_1_rw_224",
    "coatnet_rmlp_1_rw2_224",
    "coatnet_rmlp_2_rw_224",
)
NAMES_ONLY = ("coatnet_1_224", "coatnet_2_224", "coatnet_3_224", "coatnet_3_rw_224")


def made_up(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 values for the weight of this name: the same ones wherever NumPy runs.

    Raw bits of PCG64, seeded by the name's SHA-256, as uniform numbers; scaled so that the signal
    keeps its size through the layers.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    bits = np.random.PCG64(seed).random_raw(int(np.prod(shape)))
    uniform = ((bits >> np.uint64(40)).astype(np.float32) * 2.0**-23 - 1).reshape(shape)  # [-1, 1)
    if name.endswith(("running_var", "gamma")) or (len(shape) == 1 and name.endswith("weight")):
        return 1 + uniform / 2
    if len(shape) == 1 or name.endswith("table"):
        return uniform / 4
    gain = 0.5 if name.endswith(("proj.weight", "fc2.weight")) else 2  # ends of residual branches
    return uniform * np.float32(gain / np.sqrt(np.prod(shape[1:])))


def made_up_image(height: int = SIZE, width: int = SIZE, *, batch: int = 1) -> np.ndarray:
    """Float32 [batch, height, width, 3] in [-1.7, 1.7)."""
    return made_up("image.running_mean", (batch * height * width * 3,)).reshape(
        batch, height, width, 3
    ) * np.float32(6.8)


def state_dict(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Made-up weights for all names."""
    return {name: made_up(name, shape) for name, shape in shapes.items()}


def digest(state: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over the values, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(state):
        total.update(np.ascontiguousarray(state[name], "<f4").data)
    return total.hexdigest()


def shapes_digest(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """SHA-256 over names and shapes, in the order of the names."""
    lines = [f"{name} {tuple(map(int, shapes[name]))}" for name in sorted(shapes)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@functools.cache
def timm():
    """The package; torchvision, of which the models here need nothing, may be missing."""
    from torchvision_stub import make_importable

    make_importable()
    return importlib.import_module("timm")


def timm_model(name: str, **options):
    """timm's model of this name, for evaluation, with made-up weights."""
    model = timm().create_model(name, **options)
    for key, value in model.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            value.copy_(value.new_tensor(made_up(key, tuple(value.shape))))
    return model.eval()


def arrays(model) -> dict[str, np.ndarray]:
    """The weights and running statistics of a torch model."""
    state = model.state_dict()
    return {key: state[key].numpy() for key in state if not key.endswith("num_batches_tracked")}


def main() -> None:
    """Write what a test needs of each of `MODELS`, and names and shapes of `NAMES_ONLY`."""
    import torch

    fixtures = {}
    for name in MODELS + NAMES_ONLY:
        whole = arrays(timm().create_model(name, num_classes=1000))
        shapes = shapes_digest({key: value.shape for key, value in whole.items()})
        fixtures[name] = {"weights": len(whole), "shapes_sha256": shapes}
    for name in MODELS:
        model = timm_model(name, img_size=SIZE, depths=DEPTHS)
        with torch.no_grad():
            logits = model(torch.tensor(made_up_image().transpose(0, 3, 1, 2)))[0].numpy()
        fixtures[name] |= {
            "shallow_sha256": digest(arrays(model)),
            "logits": [round(float(x), 6) for x in logits[:16]],
            "norm": round(float(np.linalg.norm(logits)), 5),
        }
        print(f"{name}: logits std {logits.std():.3f}, norm {fixtures[name]['norm']}")
    made_by = f"timm {version('timm')}, torch {version('torch')}"
    lines = [f'"made_by": {json.dumps(made_by)}']
    lines += [f"{json.dumps(name)}: {json.dumps(fixture)}" for name, fixture in fixtures.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
