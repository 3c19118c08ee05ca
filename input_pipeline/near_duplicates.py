"""Pictures that are the same photo in other pixels: resized, recompressed, re-cut, watermarked.

A perceptual hash (Zauner 2010, "Implementation and benchmarking of perceptual image hash
functions") keeps 256 signs of the coarse cosine transform. The usual 64 are too few for aligned
faces, which are all alike at that coarseness.
"""

from collections.abc import Iterator, Sequence

import cv2
import numpy as np
from jaxtyping import Int, UInt8

BITS = 256
# Of 21,287 UTKFace crops, 963 pairs differ in at most 40 bits, and 373 of those in none of their
# pixels. Looked at one by one: all 26 pairs at 34 to 40 bits, 25 of the pairs at 30 to 34, 40 at 20
# to 29 and 48 below 20 show one photo twice. Two people first meet at 42 bits (1 of 6 pairs), and
# at 46 bits every second pair is of two people. Drawn faces of two people meet from 36 bits on.
NEAR = 40
_SIDE, _COARSE, _BLOCK = 32, 16, 1024


def perceptual_hash(pixels: UInt8[np.ndarray, "h w 3"]) -> str:
    """Returns 64 hex digits: which of the 16x16 lowest cosine coefficients of the 32x32 grey
    picture are above their median. A picture without any contrast gives ''."""
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    grey = cv2.resize(grey, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    if np.ptp(grey) < 2:
        return ""
    low = cv2.dct(grey)[:_COARSE, :_COARSE].ravel()
    return np.packbits(low > np.median(low[1:])).tobytes().hex()


def near_pairs(hashes: Sequence[str], *, within: int = NEAR) -> Int[np.ndarray, "n 2"]:
    """Returns rows (i, j), i < j, whose hashes differ in at most `within` bits: all pairs of
    different hashes, each by the first row that has it, and every other row with the first of its
    hash. They join the same rows as all pairs would, and a thousand equal pictures have half a
    million of those.

    Exact: with bits as ±1 the difference is (256 - dot product) / 2, so a matrix product finds all
    pairs, in blocks; twice as many different hashes take four times as long.
    Rows with the hash '' are in no pair.
    """
    first: dict[str, int] = {}
    firsts = [(first.setdefault(key, row), row) for row, key in enumerate(hashes) if key]
    repeats = np.array([pair for pair in firsts if pair[0] != pair[1]], int).reshape(-1, 2)
    rows = np.array(list(first.values()), int)
    found = list(_blocks(_signs(list(first)), within)) if first else []
    return np.concatenate([repeats, *(rows[pairs] for pairs in found)])


def _signs(hashes: Sequence[str]) -> np.ndarray:
    packed = np.frombuffer(bytes.fromhex("".join(hashes)), np.uint8).reshape(len(hashes), -1)
    return np.unpackbits(packed, axis=1).astype(np.float32) * 2 - 1


def _blocks(signs: np.ndarray, within: int) -> Iterator[np.ndarray]:
    for start in range(0, len(signs), _BLOCK):
        alike = signs[start : start + _BLOCK] @ signs[start:].T >= BITS - 2 * within
        i, j = np.nonzero(np.triu(alike, 1))
        yield np.stack([i, j], axis=1) + start
