"""Scores of whole splits, in NumPy; ages and errors in years.

Rows whose true label is negative (unknown) are left out of the class scores.
"""

import numpy as np
from jaxtyping import Float, Int


def mae(true: Float[np.ndarray, "n"], predicted: Float[np.ndarray, "n"]) -> float:
    """Mean absolute error, in years."""
    true, predicted = _same_length(true, predicted)
    return float(np.mean(np.abs(predicted.astype(np.float64) - true)))


def cumulative_score(err: Float[np.ndarray, "n"], within: float = 5) -> float:
    """CS(within): the share 0-1 of errors (years, signed or not) of at most `within` years."""
    return float(np.mean(np.abs(np.asarray(err)) <= within))


def accuracy(true: Int[np.ndarray, "n"], predicted: Int[np.ndarray, "n"]) -> float:
    """The share 0-1 of right classes among the known ones; NaN when none is known."""
    true, predicted = _known(true, predicted)
    return float(np.mean(true == predicted)) if len(true) else float("nan")


def balanced_accuracy(true: Int[np.ndarray, "n"], predicted: Int[np.ndarray, "n"]) -> float:
    """The mean over the classes that occur of the share 0-1 found; NaN when none is known."""
    true, predicted = _known(true, predicted)
    if not len(true):
        return float("nan")
    return float(np.mean([np.mean(predicted[true == c] == c) for c in np.unique(true)]))


def macro_f1(true: Int[np.ndarray, "n"], predicted: Int[np.ndarray, "n"]) -> float:
    """The mean F1 (0-1) of the classes that occur or are predicted; NaN when none is known."""
    true, predicted = _known(true, predicted)
    if not len(true):
        return float("nan")
    f1 = []
    for c in np.union1d(true, predicted):
        hits = np.sum((true == c) & (predicted == c))
        f1.append(2 * hits / (np.sum(true == c) + np.sum(predicted == c)))
    return float(np.mean(f1))


def confusion_matrix(
    true: Int[np.ndarray, "n"], predicted: Int[np.ndarray, "n"], n: int
) -> Int[np.ndarray, "n n"]:
    """Counts [n, n]: row = true class, column = predicted class."""
    true, predicted = _known(true, predicted)
    for labels in (true, predicted):
        if len(labels) and not 0 <= labels.min() <= labels.max() < n:
            raise ValueError(f"classes {labels.min()}..{labels.max()} do not fit in 0..{n - 1}")
    return np.bincount(n * true + predicted, minlength=n * n).reshape(n, n)


def knn_age(
    train_z: Float[np.ndarray, "n d"],
    train_age: Float[np.ndarray, "n"],
    z: Float[np.ndarray, "m d"],
    k: int = 20,
) -> Float[np.ndarray, "m"]:
    """The plain mean age of the `k` training rows with the greatest cosine similarity, in years.

    Neighbours are not weighted, so there is no temperature to tune. Raises ValueError when there
    are fewer than `k` training rows.
    """
    nearest, _ = nearest_rows(train_z, z, k)
    return np.asarray(train_age, np.float32)[nearest].mean(axis=1)


def knn_class(
    train_z: Float[np.ndarray, "n d"],
    train_class: Int[np.ndarray, "n"],
    z: Float[np.ndarray, "m d"],
    k: int = 20,
) -> Int[np.ndarray, "m"]:
    """The commonest class of the same neighbours; of equally common ones the lowest."""
    nearest, _ = nearest_rows(train_z, z, k)
    classes = np.asarray(train_class)[nearest]
    known = np.unique(train_class)
    return known[np.argmax([(classes == c).sum(axis=1) for c in known], axis=0)]


def nearest_rows(
    train_z: Float[np.ndarray, "n d"], z: Float[np.ndarray, "m d"], k: int
) -> tuple[Int[np.ndarray, "m k"], Float[np.ndarray, "m k"]]:
    """(the `k` training rows with the greatest cosine similarity, nearest first; the similarities).

    Works in float32, 1,024 rows of `z` at a time. Raises ValueError when there are fewer than `k`
    training rows.
    """
    if not 1 <= k <= len(train_z):
        raise ValueError(f"k={k} neighbours asked of {len(train_z)} training rows")
    bank = _unit(train_z)
    rows, similarities = np.zeros((len(z), k), np.int64), np.zeros((len(z), k), np.float32)
    for start in range(0, len(z), 1024):
        part = slice(start, start + 1024)
        similarity = _unit(z[part]) @ bank.T
        nearest = np.argpartition(similarity, -k, axis=1)[:, -k:]
        found = np.take_along_axis(similarity, nearest, axis=1)
        order = np.argsort(-found, axis=1, kind="stable")
        rows[part] = np.take_along_axis(nearest, order, axis=1)
        similarities[part] = np.take_along_axis(found, order, axis=1)
    return rows, similarities


def knn_mae(
    train_z: Float[np.ndarray, "n d"],
    train_age: Float[np.ndarray, "n"],
    z: Float[np.ndarray, "m d"],
    age: Float[np.ndarray, "m"],
    k: int = 20,
) -> float:
    """Mean absolute error in years of `knn_age`: what the features know of age, no head trained."""
    return mae(np.asarray(age), knn_age(train_z, train_age, z, k))


def _unit(z: np.ndarray) -> np.ndarray:
    z = np.asarray(z, np.float32)
    return z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)


def _same_length(true, predicted) -> tuple[np.ndarray, np.ndarray]:
    true, predicted = np.asarray(true), np.asarray(predicted)
    if true.shape != predicted.shape:  # or NumPy would broadcast [n] with [n, 1] to [n, n]
        raise ValueError(f"true has shape {true.shape}, predicted has shape {predicted.shape}")
    return true, predicted


def _known(true, predicted) -> tuple[np.ndarray, np.ndarray]:
    true, predicted = _same_length(true, predicted)
    return true[true >= 0], predicted[true >= 0]
