"""A disk that is full while a command writes: one line that says where, and how to go on."""

import errno
import os
import resource

import numpy as np
import pytest

from coatnet_jax import main
from coatnet_jax.checkpoint import save_variables


def call(capsys, *argv) -> str:
    """What a command that fails says."""
    with pytest.raises(SystemExit) as end:
        main.main([str(word) for word in argv])
    error = capsys.readouterr().err
    assert end.value.code == 1 and error.count("\n") == 1, error
    return error


@pytest.fixture
def raising(monkeypatch):
    """Has the commands raise the error that the function is given, deep in another library."""

    def use(error):
        def run(*_):
            os.fspath(Raising(error))

        monkeypatch.setattr(main, "_run", run)

    return use


class Raising:
    def __init__(self, error):
        self.error = error

    def __fspath__(self):
        raise self.error


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_the_systems_errors_of_a_full_disk_are_one_line(raising, capsys, code):
    raising(OSError(code, os.strerror(code)))  # of a write, which knows no name
    error = call(capsys, "predict", "a.jpg", "--out", "ages")
    assert error.startswith(
        f"coatnet-jax: error: a file under ages cannot be written ({os.strerror(code)})"
    )
    assert "checkpoint" not in error
    raising(OSError(code, os.strerror(code), "/full/b.csv"))
    assert "error: /full/b.csv cannot be written" in call(capsys, "prepare", "faces.zip")


def test_other_libraries_tell_it_in_their_words(raising, capsys):
    raising(RuntimeError("RESOURCE_EXHAUSTED: writing /run/x;\nNo space left on device [28]"))
    for command in ("pretrain", "finetune", "tune", "demo"):
        error = call(capsys, command, "--workdir=run")
        assert "a file under run cannot be written (No space left on device)" in error
        assert "the same command goes on from the last checkpoint" in error


def test_other_errors_stay_as_they_are(raising):
    raising(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="^a bug$"):
        main.main(["predict", "a.jpg"])
    with pytest.raises(OSError, match="Input/output error"):
        raising(OSError(errno.EIO, os.strerror(errno.EIO)))
        main.main(["predict", "a.jpg"])


def test_a_checkpoint_that_does_not_fit_is_told(tmp_path, monkeypatch, capsys):
    """By what TensorStore really raises where a file may not grow."""

    def save(_):
        weights = np.random.default_rng(0).random((200, 200), np.float32)
        save_variables(tmp_path / "run", {"params": {"a": weights}, "batch_stats": {}})

    monkeypatch.setattr(main, "_run", save)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        error = call(capsys, "finetune", f"--workdir={tmp_path}/run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"a file under {tmp_path}/run cannot be written (File too large)" in error
