"""Files of named arrays: .safetensors, also through gzip, and PyTorch's .pth, which is read without
running its code.

A .pth file is a zip archive of raw arrays and a pickle, and a pickle may call anything. This one
may call three things, which make tensors and a dict; a file that names another is refused.
"""

import collections
import gzip
import io
import json
import math
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import load, load_file, save

DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
GZIP, GZIP_MAGIC = ".gz", b"\x1f\x8b"  # end of the name and begin of what is in it
# Keys under which training programs keep the weights, among other things.
INSIDE = ("state_dict", "model")
CONVERT = "load it where PyTorch is and save its state_dict alone, best as .safetensors"


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Names and arrays of a .safetensors or PyTorch file, or of one that `weights_data` compressed.

    Raises FileNotFoundError where there is no such file, ValueError where it is damaged, encrypted,
    of another kind, or holds anything but arrays.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(b"PK\x03\x04"):
        return _read_torch(path)
    try:
        if start[8:] == b"{":
            return load_file(path)
        if start.startswith(GZIP_MAGIC):
            return load(gzip.decompress(path.read_bytes()))
    except (safetensors.SafetensorError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    except (AttributeError, KeyError, TypeError) as error:  # a type of numbers that NumPy lacks
        raise ValueError(f"{path} holds numbers of another kind than ours: {error}") from None
    old = start[:1] == b"\x80"
    what = "a PyTorch file from before version 1.6" if old else "neither .safetensors nor PyTorch's"
    raise ValueError(f"{path} is {what}; {CONVERT}")


def write_weights(
    path: Path, arrays: Mapping[str, np.ndarray], *, metadata: Mapping[str, str]
) -> None:
    """Write a .safetensors file of named arrays, with a few words about them."""
    # Others may read it; safetensors' own `save_file` forbids it.
    path.write_bytes(weights_data(arrays, metadata=metadata))


def weights_data(
    arrays: Mapping[str, np.ndarray], *, metadata: Mapping[str, str], compressed: bool = False
) -> bytes:
    """What `write_weights` writes, or the same through gzip, for a name that ends with `GZIP`."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    data = save(contiguous, dict(metadata))
    if not compressed:
        return data
    # Weights repeat no phrases: to look for some takes longer and makes the file larger.
    gzip_of = zlib.compressobj(wbits=16 + zlib.MAX_WBITS, memLevel=9, strategy=zlib.Z_HUFFMAN_ONLY)
    return gzip_of.compress(data) + gzip_of.flush()


def read_metadata(path: Path) -> dict[str, str]:
    """The words that a .safetensors file holds beside its arrays; it must be readable."""
    with path.open("rb") as file:
        compressed = file.read(9)[8:] != b"{"
    with gzip.open(path) if compressed else path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    return json.loads(header).get("__metadata__") or {}


def nested(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Dicts in dicts from values by their paths: Flax's `unflatten_dict` without its import, which
    takes longer than a photo's face to find."""
    tree: dict[str, Any] = {}
    for (*above, leaf), value in leaves.items():
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[leaf] = value
    return tree


class _Storage(NamedTuple):
    """A run of numbers in the archive."""

    kind: str
    key: str
    count: int


class _Tensor(NamedTuple):
    """A view of a storage; offset and strides count numbers, not bytes."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            folder = _folder(archive, path)
            if _bytes(archive, f"{folder}byteorder", path, missing=b"little") != b"little":
                raise ValueError(f"{path} was written on a big-endian machine; {CONVERT}")
            data = _bytes(archive, f"{folder}data.pkl", path)
            tensors = _only_tensors(_Unpickler(data, path).load(), path)
            return {name: _array(archive, folder, t, path) for name, t in tensors.items()}
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {error or 'it ends too early'}") from None
    except (AttributeError, IndexError, KeyError, TypeError, OverflowError):
        raise ValueError(f"{path} cannot be read: it is damaged") from None


def _folder(archive: zipfile.ZipFile, path: Path) -> str:
    found = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
    if len(found) != 1:
        raise ValueError(f"{path} is a zip archive, but none of PyTorch's weights")
    return found[0].removesuffix("data.pkl")


def _bytes(archive: zipfile.ZipFile, name: str, path: Path, missing: bytes | None = None) -> bytes:
    if missing is not None and name not in archive.namelist():
        return missing
    entry = archive.getinfo(name)
    if entry.flag_bits & 1:
        raise ValueError(f"{path} is encrypted; decrypt it first")
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{path} is a compressed zip archive, none of PyTorch's weights")
    return archive.read(entry)


class _Unpickler(pickle.Unpickler):
    """Makes dicts of `_Tensor`s, numbers and text; whatever else a pickle asks for is refused."""

    def __init__(self, data: bytes, path: Path):
        super().__init__(io.BytesIO(data))
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: _Tensor(
                storage, offset, shape, strides
            )
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in DTYPES:
            return name
        raise ValueError(
            f"{self.path} asks for {module}.{name}: it holds more than arrays, and code in it is "
            f"not run; {CONVERT}"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, _, count = pid
        return _Storage(kind, key, count)


def _only_tensors(loaded: Any, path: Path) -> dict[str, _Tensor]:
    for key in INSIDE:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not loaded:
        raise ValueError(f"{path} holds no dict of arrays; {CONVERT}")
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, _Tensor):
            kind = type(value).__name__
            raise ValueError(f"{path} holds {key!r}, which is {kind} and no array; {CONVERT}")
    return loaded


def _array(archive: zipfile.ZipFile, folder: str, tensor: _Tensor, path: Path) -> np.ndarray:
    (kind, key, count), offset, shape, strides = tensor
    data = _bytes(archive, f"{folder}data/{key}", path)
    dtype = np.dtype(DTYPES[kind])
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    inside = last < count and math.prod(shape) <= count
    if len(data) != count * dtype.itemsize or min(offset, *shape, *strides, 0) < 0 or not inside:
        raise ValueError(f"{path} is damaged: an array reaches beyond its data")
    storage = np.frombuffer(data, dtype)[offset:]
    steps = [step * dtype.itemsize for step in strides]
    return np.lib.stride_tricks.as_strided(storage, shape, steps, writeable=False).copy()
