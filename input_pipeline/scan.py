"""From image files to labelled examples: each decoded once, checked, hashed, and counted."""

import hashlib
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from input_pipeline.archive import OnSkip, Source, iter_images
from input_pipeline.images import decode_checked, pixel_hash
from input_pipeline.names import FaceLabel

Transform = Callable[[bytes], bytes]
_N_JOBS = min(os.cpu_count() or 1, 8)


def iter_faces(
    source: Source,
    *,
    parse_name: Callable[[str], FaceLabel],
    on_skip: OnSkip,
    transform: Transform | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields a dict per face: image (the original bytes), file, age, gender, race, pixel_hash,
    height, width. Whatever is not yielded goes to `on_skip(path, reason)`.

    `file` is the name without folders; a name met again with the same pixels is skipped, and with
    other pixels is kept under its whole path. `transform` makes the bytes that are kept from those
    of the file, or raises ValueError with the reason to leave the file out; it runs in processes of
    its own, so it must be picklable. Raises ValueError as `archive.iter_images` does.
    """
    kept: dict[str, dict[str, str]] = {}  # name -> {pixel hash: path}
    used: set[str] = set()
    jobs = _readable(source, parse_name, on_skip)
    with _pool(transform) as pool:
        for (path, _, label), checked in _map_in_order(pool, partial(_check, transform), jobs):
            if isinstance(checked, ValueError):
                on_skip(path, str(checked))
                continue
            data, key, (height, width) = checked
            name = PurePosixPath(path).name
            copies = kept.setdefault(name, {})
            if key in copies:
                on_skip(path, f"duplicate file name (first at {copies[key]})")
                continue
            file = path if copies else name
            if file in used:  # an archive may hold one path twice
                file = f"{path}#{len(used)}"
            used.add(file)
            copies[key] = path
            yield {
                "image": data,
                "file": file,
                **label._asdict(),
                "pixel_hash": key,
                "height": height,
                "width": width,
            }


def _readable(source: Source, parse_name: Callable[[str], FaceLabel], on_skip: OnSkip):
    """Yields (path, bytes, label) of files whose name tells an age and whose bytes are new."""
    seen: dict[tuple[str, bytes], str] = {}
    for path, data in iter_images(source, on_skip=on_skip):
        name = PurePosixPath(path).name
        try:
            label = parse_name(name)
        except ValueError as error:
            on_skip(path, str(error))
            continue
        first = seen.setdefault((name, hashlib.sha256(data).digest()), path)
        if first is not path:
            on_skip(path, f"duplicate file name (first at {first})")
            continue
        yield path, data, label


def _check(
    transform: Transform | None, job: tuple[str, bytes, FaceLabel]
) -> tuple[bytes, str, tuple[int, int]] | ValueError:
    data = job[1]
    try:
        if transform:
            data = transform(data)
        pixels = decode_checked(data)
    except ValueError as error:
        return error
    return data, pixel_hash(pixels), pixels.shape[:2]


def _pool(transform: Transform | None) -> Executor:
    """Threads where OpenCV does the work; processes for a transform, which may be Python or may
    hold a network that two threads must not share."""
    if transform is None:
        return ThreadPoolExecutor(_N_JOBS)
    return ProcessPoolExecutor(_N_JOBS, mp_context=multiprocessing.get_context("spawn"))


def _map_in_order(pool: Executor, function: Callable, items: Iterable) -> Iterator[tuple[Any, Any]]:
    """Yields (item, function(item)) in order, a few computed ahead in `pool`."""
    waiting: deque = deque()
    for item in items:
        waiting.append((item, pool.submit(function, item)))
        if len(waiting) >= 4 * _N_JOBS:
            item, future = waiting.popleft()
            yield item, future.result()
    for item, future in waiting:
        yield item, future.result()
