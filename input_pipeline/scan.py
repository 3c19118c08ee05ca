"""From image files to labelled examples: each decoded once, checked, hashed, and counted."""

import hashlib
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from input_pipeline.archive import OnSkip, Source, iter_images
from input_pipeline.images import decode_checked, pixel_hash
from input_pipeline.names import FaceLabel, bare_name
from input_pipeline.near_duplicates import perceptual_hash

Transform = Callable[[bytes], bytes]
_N_JOBS = min(os.cpu_count() or 1, 8)


@dataclass(frozen=True)
class Reading:
    """How files become faces; picklable where its parts are.

    read_label: labels from a path, or ValueError with the reason. short_name: the name under which
    a path is listed. transform: makes the bytes that are kept from those of the file, or raises
    ValueError with the reason to leave the file out.
    """

    read_label: Callable[[str], FaceLabel]
    short_name: Callable[[str], str] = bare_name
    transform: Transform | None = None


class Picture(NamedTuple):
    """A file that was read and decoded: its bytes as they are kept, and what was found."""

    image: bytes
    pixel_hash: str
    perceptual_hash: str
    height: int
    width: int


def iter_faces(source: Source, *, reading: Reading, on_skip: OnSkip) -> Iterator[dict[str, Any]]:
    """Yields a dict per face: image (the bytes kept), file, age, gender, race, identity,
    pixel_hash, perceptual_hash, height, width. Whatever is not yielded goes to
    `on_skip(path, reason)`.

    `file` is the name without folders, unless `reading` says otherwise; a name met again with the
    same pixels and labels is skipped, and with others is kept under its whole path. A transform
    runs in processes of its own. Raises ValueError as `archive.iter_images` does.
    """
    copies: dict[str, Copies] = {}
    jobs = _readable(source, reading, on_skip)
    with _pool(reading.transform) as pool:
        check = partial(_check_job, reading.transform)
        for (path, _, label), picture in _map_in_order(pool, check, jobs):
            if isinstance(picture, ValueError):
                on_skip(path, str(picture))
                continue
            name = reading.short_name(path)
            found = copies.setdefault(name, Copies(name)).place(path, picture.pixel_hash, label)
            if found.first:
                on_skip(path, f"duplicate file name (first at {found.first})")
                continue
            yield example(found.file, label, picture)


class Copies:
    """The files of one name, in order: the first of each picture is kept, under a name of its own.

    The second picture of a name is listed under its whole path, but for what `name` leaves out, and
    others of that very path with a number. A picture that comes again with other labels is kept as
    well: it is a conflict, not a copy to do without.
    """

    class Placed(NamedTuple):
        file: str  # the name to keep it under
        first: str  # or where the same picture was met before

    def __init__(self, name: str):
        self._name, self._files, self._paths = name, set(), set()
        self._first: dict[tuple[str, FaceLabel], str] = {}  # (pixel hash, label) -> path

    def place(self, path: str, pixel_hash: str, label: FaceLabel) -> "Copies.Placed":
        """Returns the name of a file with these pixels and labels, or where its copy is."""
        key = (pixel_hash, label)
        if key in self._first:
            return self.Placed("", self._first[key])
        file = self._name
        if self._first:
            file = path[: len(path) - len(bare_name(path))] + bare_name(self._name)
            # Archives may hold one path twice, and public names are equal for several people.
            if file in self._files or path in self._paths:
                file += f"#{len(self._first)}"
        self._first[key] = path
        self._files.add(file)
        self._paths.add(path)
        return self.Placed(file, "")


def check(data: bytes, transform: Transform | None) -> Picture:
    """Returns the picture in the bytes of a file; raises ValueError where it must be left out."""
    if transform:
        data = transform(data)
    pixels = decode_checked(data)
    return Picture(data, pixel_hash(pixels), perceptual_hash(pixels), *pixels.shape[:2])


def example(file: str, label: FaceLabel, picture: Picture) -> dict[str, Any]:
    """Returns the record of a face as the TFDS builders write it."""
    return {"file": file, **label._asdict(), **picture._asdict()}


def _readable(source: Source, reading: Reading, on_skip: OnSkip):
    """Yields (path, bytes, label) of files whose path tells an age and whose bytes are new, or have
    another label than before."""
    seen: dict[tuple[str, bytes, FaceLabel], str] = {}
    for path, data in iter_images(source, on_skip=on_skip):
        try:
            label = reading.read_label(path)
        except ValueError as error:
            on_skip(path, str(error))
            continue
        key = (reading.short_name(path), hashlib.sha256(data).digest(), label)
        first = seen.setdefault(key, path)
        if first is not path:
            on_skip(path, f"duplicate file name (first at {first})")
            continue
        yield path, data, label


def _check_job(
    transform: Transform | None, job: tuple[str, bytes, FaceLabel]
) -> Picture | ValueError:
    try:
        return check(job[1], transform)
    except ValueError as error:
        return error


def _pool(transform: Transform | None) -> Executor:
    """Threads where OpenCV does the work; processes for a transform, which may be Python or may
    hold a network that two threads must not share."""
    if transform is None:
        return ThreadPoolExecutor(_N_JOBS)
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(_N_JOBS, mp_context=spawn, initializer=_end_with_parent)


def _end_with_parent() -> None:
    """Has this worker end when the process that made it is gone, killed perhaps, and would
    otherwise be waited for without end."""

    def wait():
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _map_in_order(pool: Executor, function: Callable, items: Iterable) -> Iterator[tuple[Any, Any]]:
    """Yields (item, function(item)) in order, a few computed ahead in `pool`."""
    waiting: deque = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) >= 4 * _N_JOBS:
                item, future = waiting.popleft()
                yield item, future.result()
        for item, future in waiting:
            yield item, future.result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a process that worked on the pictures was killed, most likely for lack of memory: end "
            "other programs, and try again"
        ) from error
