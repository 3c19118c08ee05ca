"""The weights of a released folder: one file, with the parameters rounded to bfloat16."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from coatnet_jax.weight_files import nested, read_metadata, read_weights, write_weights

FILE = "weights.safetensors"
PACKAGED = Path(__file__).parent / "released"  # the model that comes with the package


def save_weights(path: Path, variables: Mapping[str, Any], *, step: int) -> None:
    """Write {'params', 'batch_stats'}, the parameters rounded to bfloat16."""
    from flax.traverse_util import flatten_dict

    flat = flatten_dict({kind: variables[kind] for kind in ("params", "batch_stats")}, sep="/")
    arrays = {
        name: np.asarray(value, ml_dtypes.bfloat16 if name.startswith("params/") else np.float32)
        for name, value in flat.items()
    }
    write_weights(path, arrays, metadata={"step": str(step)})


def is_released(folder: Path) -> bool:
    """Whether the folder holds released weights rather than checkpoints."""
    return (Path(folder) / FILE).is_file()


def load_released(folder: Path, *, which: str = "best") -> tuple[dict[str, Any], int]:
    """({'params', 'batch_stats'} in float32, step of the run) of a released folder.

    Raises ValueError where the file is damaged or not one of ours, or `which` is another step.
    """
    variables, step = _read(Path(folder) / FILE)
    if which not in ("best", "latest", str(step)):
        raise ValueError(f"no checkpoint {which!r} in {folder}: it holds step {step} alone")
    return variables, step


def _read(path: Path) -> tuple[dict[str, Any], int]:
    arrays, metadata = read_weights(path), read_metadata(path)
    tree = nested({tuple(k.split("/")): np.asarray(v, np.float32) for k, v in arrays.items()})
    if "params" not in tree or not metadata.get("step", "").isdigit():
        raise ValueError(f"{path} was not written by coatnet-jax release")
    return {"params": tree["params"], "batch_stats": tree.get("batch_stats", {})}, int(
        metadata["step"]
    )
