"""What is done to pictures once, when a set is built: faces cut out, noise taken away, sharpened.

`coatnet-jax prepare … --crop-faces --preprocess denoise,unsharp` gives a `Preprocess` to
`prepare(transform=…)`. Faces that were cut out are written as JPEG like UTKFace's, other pictures
that were changed as JPEG of quality 95 with colour at full resolution.
"""

import difflib
import multiprocessing
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import UInt8

from input_pipeline.face_crops import (
    CROP,
    CROP_QUALITY,
    GEOMETRIES,
    Find,
    encode_crop,
    only_face,
    read_photo,
    square_crop,
)
from input_pipeline.images import encode_jpeg

Pixels = UInt8[np.ndarray, "h w 3"]
JPEG_QUALITY = 95
VERSION = 2  # part of the fingerprint of a set: raise it when a step below gives other pixels


def unsharp(image: Pixels, share: float = 0.5) -> Pixels:
    """Sharpened: `share` of what a Gaussian blur of 1 px takes away is added."""
    return cv2.addWeighted(image, 1 + share, cv2.GaussianBlur(image, (0, 0), 1.0), -share, 0)


def denoise(image: Pixels) -> Pixels:
    """Noise lowered by a bilateral filter (Tomasi and Manduchi, ICCV 1998), which keeps edges:
    pixels within 2 px are averaged where they differ by less than some 15 grey levels."""
    return cv2.bilateralFilter(image, 5, 15, 2)


STEPS = {"unsharp": unsharp, "denoise": denoise}


@dataclass(frozen=True)
class Preprocess:
    """From the bytes of a picture to those of the finished one; picklable.

    With `find` (`face_crops.Detector`) the one face is cut out in the geometry of this name, `crop`
    px wide; then come the `steps` in their order. Raises ValueError with the reason where a picture
    cannot be read or has no face, several, or a tiny one.
    """

    steps: tuple[str, ...] = ()
    find: Find | None = None
    geometry: str = "utkface"
    crop: int = CROP

    def __call__(self, data: bytes) -> bytes:
        if multiprocessing.parent_process():  # `prepare` runs a process for each core
            cv2.setNumThreads(1)
        image = read_photo(data)
        if self.find:
            face = only_face(self.find(image))
            geometry = GEOMETRIES[self.geometry]
            image = square_crop(image, face, size=self.crop, geometry=geometry)
        for step in self.steps:
            image = STEPS[step](image)
        if self.find:
            return encode_crop(image)
        return encode_jpeg(image, JPEG_QUALITY, full_colour=True)

    @property
    def id(self) -> str:
        """Names what is done, with the settings and the version, for `prepare(transform_id=…)`."""
        crop = [f"crop-faces({self.geometry}, {self.crop} px)"] if self.find else []
        quality = CROP_QUALITY if self.find else JPEG_QUALITY
        return f"{' + '.join([*crop, *self.steps])}, JPEG {quality}, version {VERSION}"


def parse_steps(text: str) -> tuple[str, ...]:
    """('denoise', 'unsharp') from 'denoise,unsharp'; ValueError for what is unknown or doubled."""
    steps = tuple(part.strip() for part in text.split(",") if part.strip())
    for step in steps:
        if step not in STEPS:
            near = difflib.get_close_matches(step, STEPS, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"unknown pre-processing {step!r}: known are {', '.join(STEPS)}{hint}")
    if len(set(steps)) < len(steps):
        raise ValueError(f"a pre-processing step is named twice in {text!r}")
    return steps
