"""UTKFace as a TFDS dataset of one split, `faces`, in array_record files and without TensorFlow.

UTKFace: Zhang, Song and Qi, "Age Progression/Regression by Conditional Adversarial Autoencoder",
CVPR 2017, arXiv 1702.08423. Images keep their original bytes.
"""

from collections.abc import Callable, Iterator

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import shuffle as tfds_shuffle

from input_pipeline.archive import OnSkip, Source
from input_pipeline.names import parse_utkface_name
from input_pipeline.scan import Transform, iter_faces

# Above this size TFDS would shuffle through files that it opens with TensorFlow.
tfds_shuffle.MAX_MEM_BUFFER_SIZE = 1 << 40

_CITATION = """@inproceedings{zhang2017age,
  title={Age Progression/Regression by Conditional Adversarial Autoencoder},
  author={Zhang, Zhifei and Song, Yang and Qi, Hairong},
  booktitle={IEEE Conference on Computer Vision and Pattern Recognition (CVPR)},
  year={2017}
}"""


class Builder(tfds.core.GeneratorBasedBuilder):
    """Builds the dataset from `source`, or from what lies in TFDS's manual folder."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Put the UTKFace download (a zip, tars, or the folder UTKFace) into the manual folder. "
        "It is given out at https://susanqq.github.io/UTKFace/ for non-commercial research only."
    )

    # TFDS would look this up with importlib_resources, which it uses but does not depend on.
    code_path = epath.Path(__file__)

    def __init__(
        self,
        *,
        source: Source | None = None,
        on_skip: OnSkip | None = None,
        on_keep: Callable[[], None] | None = None,
        transform: Transform | None = None,
        **kwargs,
    ):
        """`source` as in `archive.iter_images`; every file met calls `on_skip(path, reason)` when
        it is left out, or else `on_keep()`. `transform` as in `scan.iter_faces`."""
        self._source = source
        self._on_skip = on_skip or (lambda path, reason: None)
        self._on_keep = on_keep or (lambda: None)
        self._transform = transform
        super().__init__(file_format=tfds.core.FileFormat.ARRAY_RECORD, **kwargs)

    def _log_download_bytes(self) -> None:
        """TFDS would announce a download here; there is none."""

    def _log_download_done(self) -> None:
        """The folder which TFDS would name here is only a part of what `prepare` makes."""

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Aligned and cropped faces with age, gender and race in the file name.",
            homepage="https://susanqq.github.io/UTKFace/",
            citation=_CITATION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "file": tfds.features.Text(),
                    "age": np.int32,
                    "gender": np.int32,
                    "race": np.int32,
                    "pixel_hash": tfds.features.Text(),
                    "height": np.int32,
                    "width": np.int32,
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        return {"faces": self._generate_examples(self._source or dl_manager.manual_dir)}

    def _generate_examples(self, source: Source) -> Iterator[tuple[str, dict]]:
        # TFDS orders the records by the hash of the key, so their order is not the source's.
        faces = iter_faces(
            source,
            parse_name=parse_utkface_name,
            on_skip=self._on_skip,
            transform=self._transform,
        )
        for example in faces:
            self._on_keep()
            yield example["file"], example
