"""Face sets as TFDS datasets of one split, `faces`, in array_record files, without TensorFlow.

The builders of the several sets differ in how they read labels; everything else is here.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import shuffle as tfds_shuffle

from input_pipeline.archive import OnSkip, Source
from input_pipeline.layouts import NAMED
from input_pipeline.scan import Reading, iter_faces


class _Bucket:
    """A stretch of the hashed keys and their examples, in a file: TFDS's own is written with
    TensorFlow. Above a size TFDS sorts examples into these, then each by itself: the order is that
    of sorting all in memory."""

    def __init__(self, path: Path):
        self._path, self._length = Path(path), 0

    def __len__(self) -> int:
        return self._length

    def add(self, key: int, data: bytes) -> None:
        # Not kept open: there are a thousand, as many as a process may open.
        with self._path.open("ab") as file:
            file.write(key.to_bytes(_KEY_BYTES, "big") + len(data).to_bytes(8, "big") + data)
        self._length += 1

    def read_values(self) -> Iterator[tuple[int, bytes]]:
        if not self._length:
            return
        with self._path.open("rb") as file:
            while key := file.read(_KEY_BYTES):
                size = int.from_bytes(file.read(8), "big")
                yield int.from_bytes(key, "big"), file.read(size)

    def del_file(self) -> None:
        self._path.unlink(missing_ok=True)


_KEY_BYTES = tfds_shuffle.HKEY_SIZE_BYTES
tfds_shuffle._Bucket = _Bucket
tfds_shuffle.MAX_MEM_BUFFER_SIZE = 256 << 20


class FaceBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Builds the dataset from `source`, or from what lies in TFDS's manual folder."""

    VERSION = tfds.core.Version("2.0.0")
    RELEASE_NOTES = {"2.0.0": "Identities and perceptual hashes."}
    LAYOUT = ""  # a key of layouts.NAMED
    HOMEPAGE = DESCRIPTION = CITATION = ""

    # TFDS would look this up with importlib_resources, which it uses but does not depend on.
    code_path = tfds.core.Path(__file__)

    def __init__(
        self,
        *,
        source: Source | None = None,
        reading: Reading | None = None,
        on_skip: OnSkip | None = None,
        on_keep: Callable[[], None] | None = None,
        beam_skips: Path | None = None,
        **kwargs,
    ):
        """`source` as in `archive.iter_images`; `reading` says how it is read (default: as this
        set's names are). Every file met calls `on_skip(path, reason)` when it is left out, or else
        `on_keep()`. With `beam_skips` the examples are made by Apache Beam, and the files left out
        are listed in that folder (see `beam_faces`)."""
        layout = NAMED[self.LAYOUT]
        self._source = source
        self._reading = reading or Reading(layout.read_label, layout.short_name)
        self._on_skip = on_skip or (lambda path, reason: None)
        self._on_keep = on_keep or (lambda: None)
        self._beam_skips = beam_skips
        super().__init__(file_format=tfds.core.FileFormat.ARRAY_RECORD, **kwargs)

    def _log_download_bytes(self) -> None:
        """TFDS would announce a download here; there is none."""

    def _log_download_done(self) -> None:
        """The folder which TFDS would name here is only a part of what `prepare` makes."""

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.DESCRIPTION,
            homepage=self.HOMEPAGE,
            citation=self.CITATION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "file": tfds.features.Text(),
                    "age": np.int32,
                    "gender": np.int32,
                    "race": np.int32,
                    "identity": tfds.features.Text(),
                    "pixel_hash": tfds.features.Text(),
                    "perceptual_hash": tfds.features.Text(),
                    "height": np.int32,
                    "width": np.int32,
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        source = self._source or dl_manager.manual_dir
        if self._beam_skips is None:
            return {"faces": self._generate_examples(source)}
        from input_pipeline.beam_faces import Faces

        return {"faces": Faces(source, self._reading, self._beam_skips)}

    def _generate_examples(self, source: Source) -> Iterator[tuple[str, dict]]:
        # TFDS orders the records by the hash of the key, so their order is not the source's.
        for example in iter_faces(source, reading=self._reading, on_skip=self._on_skip):
            self._on_keep()
            yield example["file"], example
