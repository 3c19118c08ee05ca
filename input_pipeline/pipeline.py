"""Batches of uint8 faces: prepared records to Grain, decoded on threads or in worker processes.

A batch is a dict of NumPy arrays: image uint8 [b, size, size, 3]; age, gender, race, index int32
[b]; weight float32 [b], 0 on padding. Global batch k is the same images in the same order however
many processes share it: process p takes the p-th stretch of it.
"""

import difflib
import itertools
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import cv2
import grain
import numpy as np
import tensorflow_datasets as tfds
from absl import flags
from tensorflow_datasets.proto import tf_example_generated_pb2

from input_pipeline.errors import first_line
from input_pipeline.images import decode_image, decode_into
from input_pipeline.prepared import build_id, read_labels, read_transform_id, records_folder
from input_pipeline.splits import FRACTIONS, fingerprint, label_digest, match_splits, read_splits

__all__ = ["Faces", "decode_image", "decode_once", "eval_loader", "open_split", "train_loader"]

Batch = dict[str, np.ndarray]
_BUFFER_BYTES = 512 << 20
_CHUNK = 256  # images that a thread decodes at a time
_FILES_BYTES = 1 << 30  # data sets up to this size are held in memory, as files


class _PreparedAgain(ValueError):
    """The records are not those that the labels were read from."""


@dataclass(frozen=True, eq=False)
class Faces:
    """One split, or several joined, of a prepared folder, with random access.

    labels: age, gender, race int32 [n], file, identity, pixel_hash str [n], and `ages` int32 [n, k]
    where all ages of a photo's copies are to count (`label_noise.settle_conflicts`). records
    int64 [n]: the record of each row. fingerprint: of the whole split file. pixels: uint8
    [n, size, size, 3] where `decode_once` has kept them, or None. files: the image file of each
    row, where they are held. build: `prepared.build_id` of what the labels were read from; the
    records of another are refused. label_digest: of the ages, genders and races of the split file.
    """

    folder: Path
    split: str
    labels: dict[str, np.ndarray]
    records: np.ndarray
    fingerprint: str
    pixels: np.ndarray | None = None
    files: list[memoryview] | None = None
    build: str = ""
    label_digest: str = ""

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Returns image (the bytes of the file), age, gender, race, file and index of row i."""
        i = range(len(self))[i]  # counts from the end, and raises IndexError, as a list does
        row = {name: self.labels[name][i].item() for name in ("age", "gender", "race", "file")}
        return {"image": self.read_images([i])[0], "index": i} | row

    def take(self, rows: Sequence[int] | np.ndarray) -> "Faces":
        """Returns these rows alone, in this order."""
        return replace(
            self,
            labels={name: values[rows] for name, values in self.labels.items()},
            records=self.records[rows],
            pixels=None if self.pixels is None else self.pixels[rows],
            files=None if self.files is None else [self.files[row] for row in rows],
        )

    def read_images(self, rows: Sequence[int]) -> list[bytes | memoryview]:
        """Returns the image files of these rows."""
        if self.files is not None:
            return [self.files[i] for i in rows]
        try:
            found = self._source.__getitems__([int(self.records[i]) for i in rows])
        except _PreparedAgain:
            raise
        except Exception as error:  # the readers raise many kinds for damaged files
            raise ValueError(
                f"the records of {self.folder} cannot be read ({first_line(error)}): prepare the "
                "data again"
            ) from None
        # The record's own message: a fifth of the time that TFDS takes, which holds Python's lock.
        read = tf_example_generated_pb2.Example.FromString
        return [read(data).features.feature["image"].bytes_list.value[0] for data in found]

    @cached_property
    def _source(self):
        builder = tfds.builder_from_directory(records_folder(self.folder))
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        source = builder.as_data_source(split="faces", deserialize_method=raw)
        # They are opened long after the labels were read, maybe in another process, and each file
        # of them only when it is read: all are now, and what is open stays as it is.
        lengths = builder.info.splits["faces"].shard_lengths
        source.__getitems__(list(itertools.accumulate(lengths[:-1], initial=0)))
        if self.build not in ("", build_id(self.folder)):
            raise _PreparedAgain(
                f"{self.folder} was prepared again after its labels were read, the pictures are "
                "others now: start the command again"
            )
        return source

    def __getstate__(self) -> dict[str, Any]:
        """Open files do not travel to worker processes, which open their own."""
        return {name: value for name, value in self.__dict__.items() if name != "_source"}


def open_split(folder: str | Path, split: str, *, splits: str | Path = "default") -> Faces:
    """Returns the images of `split` in the prepared `folder`; several are joined with a plus
    (`train+validation`), and `all` is every one in the split file.

    `splits` names a file in `folder/splits`, or is the path of a CSV with the columns file and
    split; one line says how much of it cannot be used. Raises FileNotFoundError or ValueError where
    the folder, the split file or the split is unknown, or the split is empty.
    """
    folder = Path(folder)
    build, table = build_id(folder), read_labels(folder)
    path = _split_file(folder, splits)
    where = read_splits(path)
    found, counts = match_splits(table["file"], table["pixel_hash"], where)
    rows = [row for row, name in enumerate(found) if name]
    names = [found[row] for row in rows]
    if not rows:
        raise ValueError(f"{path}: none of its {len(where)} files is in {folder}")
    known = sorted({row.split for row in where.values()})
    wanted = known if split == "all" else split.split("+")
    for part in wanted:
        if part not in known:
            near = difflib.get_close_matches(part, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            if len(where) < len(FRACTIONS):
                hint = f"; {len(where)} picture(s) are too few for three splits"
            raise ValueError(f"unknown split {part!r} in {path}: it has {', '.join(known)}{hint}")
    chosen = [row for row, name in zip(rows, names, strict=True) if name in wanted]
    if not chosen:
        raise ValueError(f"split {split} is empty: none of its files is in {folder}")
    _tell_gaps(path, folder, counts)
    numbers = {name: np.array(table[name], np.int32)[chosen] for name in ("age", "gender", "race")}
    hashes, *labels = ([table[name][row] for row in rows] for name in ("pixel_hash", *numbers))
    text = {name: np.array(table[name])[chosen] for name in ("file", "identity", "pixel_hash")}
    return Faces(
        folder=folder,
        split=split,
        labels=numbers | text,
        records=np.array(chosen, np.int64),
        fingerprint=fingerprint(hashes, names, transform_id=read_transform_id(folder)),
        build=build,
        label_digest=label_digest(hashes, *labels),
    )


def _tell_gaps(path: Path, folder: Path, counts: Mapping[str, int]) -> None:
    """Prints how much of a split file is not used, for scores would be those of the rest."""
    gaps = []
    if gone := counts["missing"] + counts["changed"]:
        gaps.append(
            f"{gone:,} of its {counts['rows']:,} files not found in {folder}, or with other pixels"
        )
    if several := counts["ambiguous"]:
        gaps.append(f"{several:,} images that fit rows of several splits are in none")
    if gaps:
        _print_once(f"{path}: {'; '.join(gaps)}")


@cache
def _print_once(line: str) -> None:
    """Every split of a file is opened in turn, and would say the same."""
    print(line, flush=True)


def evenly_spread(length: int, count: int) -> np.ndarray:
    """Returns at most `count` row numbers, evenly spread over `length` rows."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(int))


def decode_once(
    faces: Faces, image_size: int, *, progress: Callable[[str], None] | None = print
) -> Faces:
    """Returns the same split with every image decoded and kept in memory as `pixels`.

    The loaders then give the same batches without decoding. `progress` gets a line every five
    seconds and one at the end; None is silent. Raises ValueError where the pixels would take more
    than four fifths of the machine's memory.
    """
    size = len(faces) * image_size**2 * 3
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > 0.8 * memory:
        raise ValueError(
            f"{len(faces):,} images of {image_size} px take {size / 1e9:.1f} GB, and this machine "
            f"has {memory / 1e9:.1f} GB: decode them as they come (data.cache='none')"
        )
    pixels = np.empty((len(faces), image_size, image_size, 3), np.uint8)

    def decode(start: int) -> int:
        rows = range(start, min(start + _CHUNK, len(faces)))
        for row, data in zip(rows, faces.read_images(rows), strict=True):
            decode_into(pixels[row], data)
        return len(rows)

    started = said = time.monotonic()
    done = 0
    with ThreadPoolExecutor(_n_cpus()) as pool:
        for count in pool.map(decode, range(0, len(faces), _CHUNK)):
            done, now = done + count, time.monotonic()
            if progress and (now - said > 5 or done == len(faces)):
                said, speed = now, done / max(now - started, 1e-9)
                progress(
                    f"decoded {done:,} of {len(faces):,} images of {faces.split}, {speed:,.0f}/s, "
                    f"{size / 1e6:,.0f} MB in memory"
                )
    return replace(faces, pixels=pixels)


def train_loader(
    faces: Faces,
    *,
    batch_size: int,
    image_size: int,
    seed: int,
    workers: int = 0,
    with_images: bool = True,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset:
    """Returns endless shuffled batches of `batch_size` for this process.

    Every epoch has a new order; batches run over its end, so no image is lost. The stream depends
    on the seed and the global batch only, not on `workers`. The iterator's get_state/set_state
    count the examples seen by all processes, so a run may resume with other workers or processes.
    Without images a batch has every array but `image`, for pixels that lie elsewhere.
    """
    _check(faces, batch_size, image_size, workers, process_index, process_count)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be within 0 and 2**32 - 1, got {seed}")
    if with_images and not workers and faces.pixels is None:
        faces = _hold_files(faces)
    order = grain.MapDataset.source(_ShuffledRows(len(faces), batch_size, seed))
    load = partial(_load_batch, faces, image_size, with_images)
    workers = 0 if faces.pixels is not None or not with_images else workers

    def batches_from(step: int) -> grain.IterDataset:
        mine = order[step * process_count + process_index :: process_count]
        return _read_ahead(mine.map(load), batch_size, image_size, workers)

    return _ResumableBatches(batches_from, batch_size * process_count)


def eval_loader(
    faces: Faces,
    *,
    batch_size: int,
    image_size: int,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset:
    """Returns one pass in row order; every process gets the same number of batches of `batch_size`.

    Padding rows at the end have weight 0, index, gender and race -1, age 0 and a black image.
    """
    _check(faces, batch_size, image_size, workers, process_index, process_count)
    n_batches = -(-len(faces) // (batch_size * process_count))
    rows = np.full(n_batches * process_count * batch_size, -1)
    rows[: len(faces)] = np.arange(len(faces))
    mine = rows.reshape(n_batches, process_count, batch_size)[:, process_index]
    batches = grain.MapDataset.source(list(mine)).map(partial(_load_batch, faces, image_size, True))
    workers = 0 if faces.pixels is not None else workers
    return _read_ahead(batches, batch_size, image_size, workers)


def _hold_files(faces: Faces) -> Faces:
    """The same split with its image files in memory, unless the data set is large.

    Read in shuffled order, a record costs a fifth of its decoding and wakes a thread of the reader;
    read in turn, less than half of that, and that once.
    """
    size = sum(path.stat().st_size for path in records_folder(faces.folder).iterdir())
    if faces.files is not None or size > _FILES_BYTES:
        return faces
    files: list[memoryview] = []
    for start in range(0, len(faces), _CHUNK):
        found = faces.read_images(range(start, min(start + _CHUNK, len(faces))))
        ends = list(itertools.accumulate(map(len, found), initial=0))
        joined = memoryview(b"".join(found))  # one block: no holes between the blocks that stay
        files += [joined[a:b] for a, b in itertools.pairwise(ends)]
    return replace(faces, files=files)


def _load_batch(faces: Faces, image_size: int, with_images: bool, rows: np.ndarray) -> Batch:
    """Labels, and images where wanted, of these rows of the split; -1 stands for padding."""
    rows = np.asarray(rows)
    real = rows >= 0
    batch = {"image": _load_images(faces, image_size, rows)} if with_images else {}
    for name, padding in (("age", 0), ("gender", -1), ("race", -1)):
        batch[name] = np.where(real, faces.labels[name][rows], padding).astype(np.int32)
    if "ages" in faces.labels:
        batch["ages"] = faces.labels["ages"][rows]
    batch["index"] = rows.astype(np.int32)
    batch["weight"] = real.astype(np.float32)
    return batch


def _load_images(faces: Faces, image_size: int, rows: np.ndarray) -> np.ndarray:
    """uint8 [b, size, size, 3]: kept pixels, or read and decoded; black for padding."""
    real = rows >= 0
    # Not np.zeros, which would hold Python's lock while it clears what is overwritten anyway.
    images = np.empty((len(rows), image_size, image_size, 3), np.uint8)
    images[~real] = 0
    if faces.pixels is not None and faces.pixels.shape[1] == image_size:
        images[real] = faces.pixels[rows[real]]
        return images
    for i, data in zip(np.flatnonzero(real), faces.read_images(rows[real]), strict=True):
        decode_into(images[i], data)
    return images


def _read_ahead(
    batches: grain.MapDataset, batch_size: int, image_size: int, workers: int
) -> grain.IterDataset:
    """Loads whole batches ahead, within a bound of memory: on threads here, or in `workers`."""
    ahead = max(2, min(16, _BUFFER_BYTES // (batch_size * image_size**2 * 3)))
    n_threads = max(1, min(8, ahead, _n_cpus() // max(workers, 1)))
    ahead = max(n_threads, min(2 * n_threads, ahead) // max(workers, 1))
    stream = batches.to_iter_dataset(
        grain.ReadOptions(num_threads=n_threads, prefetch_buffer_size=ahead)
    )
    if not workers:
        return stream
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads absl flags when it starts a worker
    # Only images are worth shared memory; labels travel faster through the pipe.
    stream = grain.experimental.WithOptionsIterDataset(
        stream, grain.experimental.DatasetOptions(min_shm_size=1 << 16)
    )
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    return stream.mp_prefetch(options, worker_init_fn=_init_worker)


def _init_worker(index: int, count: int) -> None:
    cv2.setNumThreads(0)


@dataclass(frozen=True)
class _ShuffledRows:
    """Rows of endless batches [batch_size], every epoch in an order of its own.

    Grain's own shuffle takes ten microseconds of Python for each image, in which the lock is held
    and no other thread begins the next image: a sixth of what two cores need to decode it.
    """

    faces: int
    batch_size: int
    seed: int

    def __len__(self) -> int:
        return sys.maxsize // self.batch_size

    def __getitem__(self, batch: int) -> np.ndarray:
        examples = np.arange(batch * self.batch_size, (batch + 1) * self.batch_size)
        epochs, places = np.divmod(examples, self.faces)
        return np.concatenate(
            [
                _epoch_order(self.faces, self.seed, epoch)[places[epochs == epoch]]
                for epoch in range(epochs[0], epochs[-1] + 1)
            ]
        )


@lru_cache(maxsize=8)
def _epoch_order(faces: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(faces)


class _ResumableBatches(grain.IterDataset):
    """Batches whose place is one number, examples seen, whatever reads them underneath."""

    def __init__(self, batches_from: Callable[[int], grain.IterDataset], global_batch: int):
        super().__init__()
        self._batches_from, self._global_batch = batches_from, global_batch

    def __iter__(self) -> grain.DatasetIterator:
        return _ResumableIterator(self._batches_from, self._global_batch)


class _ResumableIterator(grain.DatasetIterator):
    def __init__(self, batches_from: Callable[[int], grain.IterDataset], global_batch: int):
        super().__init__()
        self._batches_from, self._global_batch = batches_from, global_batch
        self._step, self._inner = 0, None

    def __next__(self) -> Batch:
        self._assert_not_closed()
        self.start_prefetch()
        try:
            batch = next(self._inner)
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise ValueError(
                "a worker process that decoded pictures was killed, most likely for lack of "
                "memory: lower data.workers, and give the same command again"
            ) from error
        self._step += 1
        return batch

    def start_prefetch(self) -> None:
        if self._inner is None:
            self._inner = iter(self._batches_from(self._step))
            self._inner.start_prefetch()

    def get_state(self) -> dict[str, int]:
        return {"examples_seen": self._step * self._global_batch}

    def set_state(self, state: dict[str, int]) -> None:
        """Moves to the batch after that many examples; of another size, to the one begun."""
        self._stop()
        self._step = int(state["examples_seen"]) // self._global_batch

    def close(self) -> None:
        self._stop()
        super().close()

    def _stop(self) -> None:
        if self._inner is not None:
            self._inner.close()
            self._inner = None


def _check(
    faces: Faces, batch_size: int, image_size: int, workers: int, index: int, count: int
) -> None:
    if batch_size < 1 or image_size < 1:
        raise ValueError(f"batch_size {batch_size} and image_size {image_size} must be at least 1")
    if workers < 0:
        raise ValueError(f"workers must be 0 or more, got {workers}")
    if not 0 <= index < count:
        raise ValueError(f"process_index {index} is not within the {count} processes")
    if not len(faces):
        raise ValueError(f"split {faces.split} is empty")


def _split_file(folder: Path, splits: str | Path) -> Path:
    """Returns the path of a split file given by name or by path."""
    if str(splits).endswith((".csv", ".csv.gz")) or os.sep in str(splits):
        return Path(os.path.expanduser(splits))
    path = folder / "splits" / f"{splits}.csv"
    if not path.is_file():
        known = sorted(file.stem for file in (folder / "splits").glob("*.csv"))
        raise ValueError(
            f"unknown splits {splits!r}: {folder}/splits has {', '.join(known) or 'none'}; a CSV "
            "file with the columns file and split can be given by its path"
        )
    return path


def _n_cpus() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1
