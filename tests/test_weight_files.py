"""Files of weights: what comes out, and what is refused, no code in them being run."""

import io
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from coatnet_jax.weight_files import read_weights

NAMES = {"float32": "Float", "float16": "Half", "bfloat16": "BFloat16", "int64": "Long"}


class Op:
    """Opcodes of pickle protocol 2, written out, for a file like torch's made without torch."""

    START, END = b"\x80\x02", b"."
    ORDERED = b"ccollections\nOrderedDict\n)R"

    def text(value):
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def number(value):
        return b"J" + struct.pack("<i", value)

    def tuple(*parts):
        return b"(" + b"".join(parts) + b"t"

    def dict(items):
        return b"}(" + b"".join(Op.text(key) + value for key, value in items.items()) + b"u"

    def tensor(key, kind, count, offset, shape, strides):
        storage = Op.tuple(
            Op.text("storage"), b"ctorch\n%sStorage\n" % kind.encode(), Op.text(key),
            Op.text("cpu"), Op.number(count),
        )  # fmt: skip
        numbers = [Op.tuple(*map(Op.number, values)) for values in (shape, strides)]
        rest = Op.tuple(storage + b"Q", Op.number(offset), *numbers, b"\x89", Op.ORDERED)
        return b"ctorch._utils\n_rebuild_tensor_v2\n" + rest + b"R"


def torch_file(path, pickled, arrays=(), *, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("weights/data.pkl", Op.START + pickled + Op.END)
        archive.writestr("weights/byteorder", "little")
        for key, array in enumerate(arrays):
            archive.writestr(f"weights/data/{key}", array.tobytes())
    return path


def write_torch(path, state):
    """As torch.save writes a state_dict."""
    items = {}
    for key, (name, array) in enumerate(state.items()):
        strides = [step // array.itemsize for step in array.strides]
        kind = NAMES[str(array.dtype)]
        items[name] = Op.tensor(str(key), kind, array.size, 0, array.shape, strides)
    return torch_file(path, Op.dict(items), state.values())


@pytest.fixture(scope="module")
def state():
    rng = np.random.default_rng(0)
    return {
        "a": rng.normal(size=(3, 4)).astype(np.float32),
        "b.half": rng.normal(size=5).astype(np.float16),
        "b.brain": rng.normal(size=(2, 1, 2)).astype(ml_dtypes.bfloat16),
        "steps": np.array(7),
    }


def same(read, state):
    assert read.keys() == state.keys()
    for name, array in state.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


def test_arrays_come_out_of_both_kinds_of_file(state, tmp_path):
    save_file(state, tmp_path / "w.safetensors")
    same(read_weights(tmp_path / "w.safetensors"), state)
    same(read_weights(write_torch(tmp_path / "w.pth", state)), state)


def test_a_view_is_read_with_its_offset_and_strides(tmp_path):
    storage = np.arange(20, dtype=np.float32)
    turned = Op.tensor("0", "Float", 20, 3, (4, 3), (1, 5))
    path = torch_file(tmp_path / "w.pth", Op.dict({"a": turned}), [storage])
    expected = np.lib.stride_tricks.as_strided(storage[3:], (4, 3), (4, 20))
    same(read_weights(path), {"a": expected})


def test_weights_are_found_inside_a_training_programs_file(tmp_path):
    tensor = Op.tensor("0", "Float", 1, 0, (), ())
    inner = Op.dict({"w": tensor})
    path = torch_file(tmp_path / "w.pth", Op.dict({"state_dict": inner}), [np.ones(1, np.float32)])
    same(read_weights(path), {"w": np.array(1, np.float32)})


def test_torchs_own_file_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    layer = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3))
    torch.save(layer.state_dict(), tmp_path / "w.pth")
    same(read_weights(tmp_path / "w.pth"), {k: v.numpy() for k, v in layer.state_dict().items()})
    torch.save({"w": torch.nn.Parameter(torch.ones(2))}, tmp_path / "p.pth")
    same(read_weights(tmp_path / "p.pth"), {"w": np.ones(2, np.float32)})
    torch.save(torch.ones(2), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="before version 1.6"):
        read_weights(tmp_path / "old.pth")


class Trap:
    def __reduce__(self):
        return (open, ("trapped", "w"))


def bad_files(folder):
    """(path, what is said of it) of files that cannot be read."""
    code = io.BytesIO()
    pickle.dump({"a": Trap()}, code, protocol=2)
    one = [np.ones(4, np.float32)]
    locked = torch_file(folder / "locked.pth", b"}")
    data = bytearray(locked.read_bytes())
    for at in (6, data.index(b"PK\x01\x02") + 8):
        data[at] |= 1
    locked.write_bytes(data)
    yield locked, "is encrypted"
    yield torch_file(folder / "code.pth", code.getvalue()[2:-1]), r"asks for \S+\.open: .* not run"
    yield torch_file(folder / "eval.pth", b"c__builtin__\neval\n"), r"asks for __builtin__\.eval"
    yield torch_file(folder / "type.pth", b"ctorch\nload\n"), r"asks for torch\.load"
    yield torch_file(folder / "list.pth", b"]"), "holds no dict of arrays"
    yield torch_file(folder / "text.pth", Op.dict({"a": Op.text("b")})), "'a', which is str"
    yield torch_file(folder / "cut.pth", b"}("), "cannot be read"
    yield torch_file(folder / "stack.pth", b"R"), "cannot be read"
    yield torch_file(folder / "zip.pth", b"}", compression=zipfile.ZIP_DEFLATED), "compressed zip"
    for n, (count, offset, shape, strides) in enumerate(
        [(4, 1, (4,), (1,)), (4, 0, (2, 2), (3, 1)), (4, 0, (9,), (0,)), (4, 3, (2,), (-1,)),
         (8, 0, (4,), (1,))]
    ):  # fmt: skip
        tensor = Op.tensor("0", "Float", count, offset, shape, strides)
        path = torch_file(folder / f"beyond{n}.pth", Op.dict({"a": tensor}), one)
        yield path, "reaches beyond its data"
    tensor = Op.tensor("7", "Float", 4, 0, (4,), (1,))
    yield torch_file(folder / "gone.pth", Op.dict({"a": tensor}), one), "is damaged"
    with zipfile.ZipFile(folder / "other.zip", "w") as archive:
        archive.writestr("photo.jpg", "x")
    yield folder / "other.zip", "none of PyTorch's"
    for name, content, said in (
        ("half.pth", (folder / "gone.pth").read_bytes()[:200], "cannot be read"),
        ("old.pth", pickle.dumps([1]), "before version 1.6"),
        ("text.txt", b"hello, here are weights", "neither .safetensors nor"),
        ("empty.bin", b"", "neither .safetensors nor"),
        ("cut.safetensors", struct.pack("<Q", 99) + b'{"a":', "cannot be read"),
    ):
        (folder / name).write_bytes(content)
        yield folder / name, said


def test_other_files_are_refused_and_no_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, said in bad_files(tmp_path):
        with pytest.raises(ValueError, match=said) as error:
            read_weights(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "trapped").exists()
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_weights(tmp_path / "nothing.pth")
