"""Linear probes: how well a linear map reads age from features that stay as they are.

As in Alain and Bengio (arXiv 1610.01644): features are standardised with the mean and deviation of
the training rows, and only the map is fitted, on training rows alone. Its strength of
regularisation is chosen on every fifth of them and the map then fitted again to all, so that the
rows it is scored on have no part in it.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

HELD_OUT = 5  # every fifth training row chooses the strength
# Penalties on squared weights beside the mean loss, strongest first: the first of equals counts.
RIDGE_STRENGTHS = tuple(10.0**power for power in range(2, -5, -1))
LOGISTIC_STRENGTHS = (1.0, 0.1, 0.01, 0.001)


def probe_age(
    train_z: Float[np.ndarray, "m d"],
    train_age: Float[np.ndarray, "m"],
    z: Float[np.ndarray, "n d"],
) -> tuple[Float[np.ndarray, "n"], float]:
    """(ages in years by ridge regression, clipped to the training ages; the strength chosen).

    The strength is the one with the smallest absolute error. Raises ValueError for fewer training
    rows than 5.
    """
    ages = np.asarray(train_age, np.float64)
    fit_rows, held_out, rows, others = _standardised(train_z, z)
    lowest, highest = ages.min(), ages.max()

    def predict(model: tuple[np.ndarray, float], rows: np.ndarray) -> np.ndarray:
        weights, bias = model
        return np.clip(rows @ weights + bias, lowest, highest)

    models = ridge(rows[fit_rows], ages[fit_rows], RIDGE_STRENGTHS)
    losses = [np.abs(predict(m, rows[held_out]) - ages[held_out]).mean() for m in models]
    strength = RIDGE_STRENGTHS[int(np.argmin(losses))]
    return predict(ridge(rows, ages, [strength])[0], others), strength


def ridge(
    rows: Float[np.ndarray, "m d"], targets: Float[np.ndarray, "m"], strengths: Sequence[float]
) -> list[tuple[Float[np.ndarray, "d"], float]]:
    """(weights, bias) for each strength s, which minimise mean (error^2) + s |weights|^2.

    One eigendecomposition serves all strengths, so a choice among them costs nothing.
    """
    center, mean = rows.mean(axis=0), targets.mean()
    rows = rows - center
    values, vectors = np.linalg.eigh(rows.T @ rows / len(rows))
    moment = vectors.T @ (rows.T @ (targets - mean)) / len(rows)
    found = [vectors @ (moment / (np.maximum(values, 0) + s)) for s in strengths]
    return [(weights, float(mean - center @ weights)) for weights in found]


def probe_class(
    train_z: Float[np.ndarray, "m d"],
    train_class: Int[np.ndarray, "m"],
    z: Float[np.ndarray, "n d"],
) -> tuple[Int[np.ndarray, "n"], float]:
    """(classes by multinomial logistic regression, the strength with the fewest wrong ones).

    Raises ValueError for fewer training rows than 5.
    """
    classes = np.asarray(train_class)
    fit_rows, held_out, rows, others = _standardised(train_z, z)
    losses = []
    for strength in LOGISTIC_STRENGTHS:
        model = _logistic(rows[fit_rows], classes[fit_rows], strength)
        losses.append(np.mean(model(rows[held_out]) != classes[held_out]))
    strength = LOGISTIC_STRENGTHS[int(np.argmin(losses))]
    return _logistic(rows, classes, strength)(others), strength


def _logistic(rows: np.ndarray, classes: np.ndarray, strength: float) -> Callable:
    """The prediction of a fitted model, or of the only class there is."""
    if len(np.unique(classes)) == 1:
        return lambda others: np.full(len(others), classes[0])
    model = LogisticRegression(C=1 / (strength * len(rows)), max_iter=1000, tol=1e-3)
    return model.fit(rows, classes).predict


def _standardised(train_z: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, ...]:
    """(which training rows fit, which choose the strength, training rows, the others)."""
    if len(train_z) < HELD_OUT:
        raise ValueError(
            f"a linear probe needs at least {HELD_OUT} training faces, there are {len(train_z)}"
        )
    scaler = StandardScaler().fit(np.asarray(train_z, np.float64))
    held_out = np.arange(len(train_z)) % HELD_OUT == 0
    rows, others = (scaler.transform(np.asarray(part, np.float64)) for part in (train_z, z))
    return ~held_out, held_out, rows, others
