"""Where no more can be written: an error in one line that says where, and how to go on."""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
RESUMING = ("demo", "pretrain", "finetune", "tune")  # commands that go on from a checkpoint
FOLDERS = ("--workdir", "--out", "--root")  # the flags that say what is written to


@contextmanager
def full_disk_explained(argv: Sequence[str]) -> Iterator[None]:
    """Turn the error of a full disk into a ValueError that names the file, or else the folder that
    the command `argv` writes to, and says how it can go on."""
    try:
        yield
    except Exception as error:  # TensorStore raises ValueError, TensorFlow a kind of its own
        if not (reason := _reason(error)):
            raise
        folder = _written(argv)
        where = getattr(error, "filename", None) or f"a file{folder and f' under {folder}'}"
        resumed = argv[0] in RESUMING and "; the same command goes on from the last checkpoint"
        raise ValueError(
            f"{where} cannot be written ({reason}): make room, or write where there is some"
            f"{resumed or ''}"
        ) from error


def _reason(error: Exception) -> str:
    """What the system says of a full disk, '' where the error is another."""
    if isinstance(error, OSError) and error.errno in FULL:
        return os.strerror(error.errno)
    return next((text for text in map(os.strerror, FULL) if text in str(error)), "")


def _written(argv: Sequence[str]) -> str:
    """The folder that the command is told to write to, '' where it is told none."""
    from coatnet_jax.config import join_values

    given = dict(word.split("=", 1) for word in join_values(argv) if "=" in word)
    return next((given[flag] for flag in FOLDERS if flag in given), "")
