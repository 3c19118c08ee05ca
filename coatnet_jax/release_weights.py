"""The weights of a released folder: one file, with the parameters rounded to bfloat16 or, where
that would be too large, the kernels to 8-bit integers."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from coatnet_jax.quantise import coarsest, dequantise, quantise
from coatnet_jax.weight_files import GZIP, nested, read_metadata, read_weights, weights_data

FILE = "weights.safetensors"
FILES = (FILE, FILE + GZIP)  # of bfloat16 or of integers; a folder holds one
PACKAGED = Path(__file__).parent / "released"  # the model that comes with the package
SMALL = PACKAGED.with_name("released_small")  # another, less exact and faster on a CPU
TRIALS = 10  # of how coarse the integers' steps are; they settle it to less than a percent


class Packed(NamedTuple):
    """Weights as they go into a file: its name and its content."""

    name: str
    data: bytes


def pack_weights(variables: Mapping[str, Any], *, step: int, max_mb: float | None = None) -> Packed:
    """{'params', 'batch_stats'} with the parameters rounded to bfloat16.

    Where that takes more than `max_mb` million bytes, kernels become 8-bit integers, as fine as
    fits, and the rest stays in float32. Raises ValueError where nothing fits or a weight is not a
    finite number.
    """
    from flax.traverse_util import flatten_dict

    flat = flatten_dict({kind: variables[kind] for kind in ("params", "batch_stats")}, sep="/")
    arrays = {name: np.asarray(value, np.float32) for name, value in flat.items()}
    if broken := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        raise ValueError(f"{broken[0]} holds numbers that are not finite: the training broke down")
    rounded = {
        name: array.astype(ml_dtypes.bfloat16) if name.startswith("params/") else array
        for name, array in arrays.items()
    }
    metadata = {"step": str(step)}
    data = weights_data(rounded, metadata=metadata)
    if max_mb is None or len(data) <= 1e6 * max_mb:
        return Packed(FILE, data)

    def integers(coarseness: float) -> bytes:
        return weights_data(quantise(arrays, coarseness), metadata=metadata, compressed=True)

    data = finest(integers, coarsest=coarsest(arrays), max_mb=max_mb)
    return Packed(FILE + GZIP, data)


def save_weights(folder: Path, packed: Packed) -> None:
    """Write the file, in place of the weights that `folder` holds."""
    (folder / packed.name).write_bytes(packed.data)
    for name in FILES:
        if name != packed.name:
            (folder / name).unlink(missing_ok=True)


def finest(data: Callable[[float], bytes], *, coarsest: float, max_mb: float) -> bytes:
    """The file `data(coarseness)` with the finest integers that takes at most `max_mb` million
    bytes; ValueError where the `coarsest` takes more."""
    low, high, exact = coarsest / 100, coarsest, data(0)
    if len(exact) <= 1e6 * max_mb:
        return exact
    fits = data(high)
    if len(fits) > 1e6 * max_mb:
        needed = math.ceil(len(fits) / 1e4) / 100  # rounded up, so that it is enough
        raise ValueError(
            f"the weights take {needed:.2f} MB with the coarsest integers, more than {max_mb:g}: "
            "allow as much, or release a smaller model"
        )
    for _ in range(TRIALS):
        middle = (low * high) ** 0.5
        tried = data(middle)
        if len(tried) <= 1e6 * max_mb:
            fits, high = tried, middle
        else:
            low = middle
    return fits


def weights_file(folder: Path) -> Path | None:
    """The file of released weights in a folder, if it holds one; ValueError for two."""
    found = [path for name in FILES if (path := Path(folder) / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"{folder} holds {' and '.join(FILES)}: remove the one of another model")
    return found[0] if found else None


def is_released(folder: Path) -> bool:
    """Whether the folder holds released weights rather than checkpoints."""
    return weights_file(folder) is not None


def load_released(folder: Path, *, which: str = "best") -> tuple[dict[str, Any], int]:
    """({'params', 'batch_stats'} in float32, step of the run) of a released folder.

    Raises ValueError where the file is damaged or not one of ours, or `which` is another step.
    """
    path = weights_file(folder)
    if path is None:
        raise FileNotFoundError(f"there is no {' or '.join(FILES)} in {folder}")
    variables, step = _read(path)
    if which not in ("best", "latest", str(step)):
        raise ValueError(f"no checkpoint {which!r} in {folder}: it holds step {step} alone")
    return variables, step


def _read(path: Path) -> tuple[dict[str, Any], int]:
    arrays, metadata = read_weights(path), read_metadata(path)
    try:
        arrays = dequantise(arrays)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    tree = nested({tuple(k.split("/")): np.asarray(v, np.float32) for k, v in arrays.items()})
    if "params" not in tree or not metadata.get("step", "").isdecimal():
        raise ValueError(f"{path} was not written by coatnet-jax release")
    return {"params": tree["params"], "batch_stats": tree.get("batch_stats", {})}, int(
        metadata["step"]
    )
