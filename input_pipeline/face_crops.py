"""Faces in photos: found, aligned by their landmarks and cut out as squares like a set's crops.

A model has seen crops of one geometry: eyes and mouth stand at nearly the same place in each. The
same place is given here to the faces of any photo, by a similarity transform (turn, scale, shift).

An age is read from fine detail, so crops must be as sharp as a set's too. UTKFace's are chips of
dlib, as their names say, and JPEGs of quality 75. dlib's `extract_image_chips` halves a large photo
until it is less than twice as large as the chip, then interpolates bilinearly: so it is done here.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from input_pipeline.images import decode_checked, encode_jpeg
from input_pipeline.mtcnn import Mtcnn, weights_folder

MAX_SIDE = 1024  # px; larger photos are shrunk for the detector, not for the crop
MIN_SHARE = 0.04  # faces smaller than this part of the photo's shorter side are not looked for
MIN_SCORE = 0.9
BORDER = 0.1  # of the shorter side, added where nothing was found at first
CROP = 200  # px; the side of UTKFace's crops, and of those that are cut out of photos
CROP_QUALITY = 75  # of the JPEGs that UTKFace's crops are
MIN_FACE = 24  # px across; what is smaller tells no age


@dataclass(frozen=True, eq=False)
class Face:
    """A face in a photo: box (x1, y1, x2, y2) and landmarks (x, y) of the eyes, the nose tip and
    the mouth's corners, left ones first, float64 in pixels; score 0-1."""

    box: Float[np.ndarray, " 4"]
    score: float
    landmarks: Float[np.ndarray, "5 2"]

    @property
    def side(self) -> float:
        """The longer side of the box in pixels."""
        return float((self.box[2:] - self.box[:2]).max())


Find = Callable[[UInt8[np.ndarray, "h w 3"]], list[Face]]


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where the landmarks lie in a set's square crops, in parts of the side, and how they stray.

    `usual_misfit` and `usual_displacement` bound `misfit` and `displacement` for 99 of 100 of the
    set's own faces.
    """

    name: str
    landmarks: Float[np.ndarray, "5 2"]
    usual_misfit: float
    usual_displacement: float


# python benchmarks/crop_geometry.py ROOT/utkface, 1,000 faces of the training split
UTKFACE = Geometry(
    "utkface",
    np.array(
        [[0.3195, 0.3130], [0.7139, 0.3122], [0.5147, 0.5444], [0.3430, 0.7164], [0.6873, 0.7158]]
    ),
    usual_misfit=0.056,
    usual_displacement=0.070,
)
GEOMETRIES = {"utkface": UTKFACE}

_OF_THREAD = threading.local()  # a network of OpenCV serves one thread


@dataclass(frozen=True)
class Detector:
    """Finds the faces of a photo with MTCNN; the largest comes first.

    Calling it with RGB pixels gives a list of `Face`, empty where there is none. It can be pickled
    and used from several threads. Raises ValueError, saying how to install them, when the weights
    are missing.
    """

    min_score: float = MIN_SCORE
    max_side: int = MAX_SIDE

    def __post_init__(self) -> None:
        weights_folder()

    def __call__(self, image: UInt8[np.ndarray, "h w 3"]) -> list[Face]:
        shrink = min(1.0, self.max_side / max(image.shape[:2]))
        small = image
        if shrink < 1:
            w, h = (max(1, round(side * shrink)) for side in image.shape[1::-1])
            small = cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA)
        scale = np.array(image.shape[1::-1]) / small.shape[1::-1]
        # A face that fills the whole picture is seen better with a border around it.
        border = round(BORDER * min(small.shape[:2]))
        faces = self._find(small, 0, scale) or self._find(small, border, scale)
        return sorted(faces, key=lambda face: -face.side)

    def _find(self, small, border: int, scale) -> list[Face]:
        if not hasattr(_OF_THREAD, "mtcnn"):
            _OF_THREAD.mtcnn = Mtcnn()
        if border:
            small = cv2.copyMakeBorder(small, *[border] * 4, cv2.BORDER_REPLICATE)
        min_face = max(20.0, MIN_SHARE * min(small.shape[:2]))
        found = _OF_THREAD.mtcnn(small, min_face=min_face, min_score=self.min_score)
        return [
            Face((box - border) * np.tile(scale, 2), float(score), (landmarks - border) * scale)
            for box, score, landmarks in zip(*found, strict=True)
        ]


def read_photo(source: str | Path | bytes) -> UInt8[np.ndarray, "h w 3"]:
    """RGB pixels of a photo, upright as its EXIF orientation says.

    Grey, CMYK, palette and 16-bit pictures become RGB of 8 bits; an alpha channel is dropped.
    Raises ValueError with the reason: no image, cut short, more than 100 megapixels; OSError where
    the file cannot be read.
    """
    return decode_checked(source if isinstance(source, bytes) else Path(source).read_bytes())


def only_face(faces: Sequence[Face]) -> Face:
    """The single face of a photo; ValueError with the reason where there is none, more, or only a
    tiny one."""
    if not faces:
        raise ValueError("no face found")
    if len(faces) > 1:
        raise ValueError(f"more than one face ({len(faces)} found)")
    if reason := too_small(faces[0]):
        raise ValueError(reason)
    return faces[0]


def too_small(face: Face) -> str:
    """Says that a face is too small to tell an age from, '' where it is not."""
    if face.side >= MIN_FACE:
        return ""
    return f"face too small ({face.side:.0f} px across, at least {MIN_FACE} wanted)"


def square_crop(
    image: UInt8[np.ndarray, "h w 3"], face: Face, *, size: int, geometry: Geometry = UTKFACE
) -> UInt8[np.ndarray, "size size 3"]:
    """The face cut out, its landmarks brought as near to the geometry's as turning, scaling and
    shifting can; what lies beyond the photo's edge mirrors what lies within."""
    matrix = alignment(face.landmarks, size * geometry.landmarks)
    while np.hypot(*matrix[:, 0]) < 0.5:  # interpolating alone would skip pixels
        image = cv2.pyrDown(image)  # keeps every second pixel of the blurred image, from the first
        matrix[:, :2] *= 2
    return cv2.warpAffine(image, matrix, (size, size), borderMode=cv2.BORDER_REFLECT_101)


def encode_crop(crop: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """JPEG bytes of a crop that has lost as much to compression as UTKFace's crops have."""
    return encode_jpeg(crop, CROP_QUALITY)


def alignment(
    source: Float[np.ndarray, "n 2"], target: Float[np.ndarray, "n 2"]
) -> Float[np.ndarray, "2 3"]:
    """The similarity transform that brings `source` nearest to `target`, by least squares, as
    [[a, -b, x], [b, a, y]]."""
    s, t = source - source.mean(0), target - target.mean(0)
    spread = np.sum(s * s)
    a = np.sum(s * t) / spread
    b = np.sum(s[:, 0] * t[:, 1] - s[:, 1] * t[:, 0]) / spread
    turn = np.array([[a, -b], [b, a]])
    return np.hstack([turn, (target.mean(0) - turn @ source.mean(0))[:, None]])


def misfit(face: Face, geometry: Geometry = UTKFACE) -> float:
    """How far the aligned landmarks still lie from the geometry's, root mean square in parts of the
    crop's side: a head turned away, or a wrong detection, has a large one."""
    matrix = alignment(face.landmarks, geometry.landmarks)
    aligned = face.landmarks @ matrix[:, :2].T + matrix[:, 2]
    return float(np.sqrt(np.mean(np.sum((aligned - geometry.landmarks) ** 2, axis=1))))


def displacement(
    face: Face, image: UInt8[np.ndarray, "h w 3"], geometry: Geometry = UTKFACE
) -> float:
    """How far the landmarks lie from the geometry's in the picture as it is, root mean square in
    parts of the shorter side of its centre square: near 0 where the picture is a crop already."""
    h, w, _ = image.shape
    side = min(h, w)
    seen = (face.landmarks - [(w - side) / 2, (h - side) / 2]) / side
    return float(np.sqrt(np.mean(np.sum((seen - geometry.landmarks) ** 2, axis=1))))
