"""Linear probes against solved systems, a general minimiser and what made-up features know."""

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from coatnet_jax import probe


def features(n=200, d=6, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) * np.arange(1, d + 1) + 5


def least_squares(rows, targets, strength):
    """Weights and, last, the bias of a ridge regression by an augmented system."""
    # Rows sqrt(n s) e_i with target 0 are the penalty; the last column is the free bias.
    n, d = rows.shape
    penalty = np.hstack([np.sqrt(n * strength) * np.eye(d), np.zeros((d, 1))])
    system = np.vstack([np.hstack([rows, np.ones((n, 1))]), penalty])
    return np.linalg.lstsq(system, np.append(targets, np.zeros(d)), rcond=None)[0]


def test_ridge_solves_the_augmented_least_squares_problem():
    rows = features(40)
    targets = rows @ np.arange(6) + np.random.default_rng(1).normal(size=40)
    for (weights, bias), strength in zip(
        probe.ridge(rows, targets, [1e-6, 0.3]), [1e-6, 0.3], strict=True
    ):
        expected = least_squares(rows, targets, strength)
        np.testing.assert_allclose([*weights, bias], expected, rtol=1e-6)


def test_ages_that_are_linear_in_the_features_are_read_exactly():
    z = features(300)
    age = 40 + (z - 5) @ [3.0, -1, 0, 0.5, 0, 0.2]
    predicted, strength = probe.probe_age(z[:240], age[:240], z[240:])
    inside = (age[240:] > age[:240].min()) & (age[240:] < age[:240].max())
    np.testing.assert_allclose(predicted[inside], age[240:][inside], atol=0.02)
    assert strength == min(probe.RIDGE_STRENGTHS)


def test_ages_are_fitted_to_all_training_rows_at_the_strength_chosen():
    z = features(60)
    age = 40 + (z - 5) @ [3.0, -1, 0, 0.5, 0, 0.2] + np.random.default_rng(1).normal(0, 9, 60)
    predicted, strength = probe.probe_age(z[:40], age[:40], z[40:])
    mean, std = z[:40].mean(0), z[:40].std(0)
    found = least_squares((z[:40] - mean) / std, age[:40], strength)
    expected = (z[40:] - mean) / std @ found[:-1] + found[-1]
    expected = np.clip(expected, age[:40].min(), age[:40].max())
    np.testing.assert_allclose(predicted, expected, rtol=1e-6)


def test_strength_for_classes_is_the_best_on_rows_it_was_not_fitted_to():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(60, 20))
    classes = (z[:, 0] + rng.normal(size=60) > 0).astype(int)
    predicted, strength = probe.probe_class(z, classes, z)
    rows, held_out = (z - z.mean(0)) / z.std(0), np.arange(60) % 5 == 0
    wrong = {True: [], False: []}  # on the rows held out, on those fitted to
    for s in probe.LOGISTIC_STRENGTHS:
        model = LogisticRegression(C=1 / (48 * s), max_iter=1000)
        model.fit(rows[~held_out], classes[~held_out])
        for held, errors in wrong.items():
            chosen = held_out == held
            errors.append(np.mean(model.predict(rows[chosen]) != classes[chosen]))
    assert strength == probe.LOGISTIC_STRENGTHS[np.argmin(wrong[True])] == 0.1
    assert np.argmin(wrong[False]) == 3  # the weakest: it would be chosen on the rows fitted to
    model = LogisticRegression(C=1 / (60 * strength), max_iter=1000).fit(rows, classes)
    np.testing.assert_array_equal(predicted, model.predict(rows))


def test_features_that_know_nothing_give_the_mean_age():
    rng = np.random.default_rng(3)
    age = rng.normal(40, 12, 60)
    noise = rng.normal(size=(90, 50))
    predicted, strength = probe.probe_age(noise[:60], age, noise[60:])
    assert strength >= 10
    assert np.abs(predicted - age.mean()).mean() < 0.1 * age.std()


def test_probes_do_not_see_scale_nor_what_they_are_scored_on():
    z, rng = features(150), np.random.default_rng(0)
    age = np.clip(40 + 4 * (z[:, 0] - 5) + rng.normal(0, 4, 150), 0, 90)
    classes = (age > 40).astype(int)
    for fit, targets in ((probe.probe_age, age), (probe.probe_class, classes)):
        whole, strength = fit(z[:100], targets[:100], z[100:])
        alone, same = fit(z[:100], targets[:100], z[140:])
        assert same == strength
        np.testing.assert_allclose(alone, whole[40:], rtol=1e-9)
        moved, _ = fit(1000 * z[:100] - 7, targets[:100], 1000 * z[100:] - 7)
        np.testing.assert_allclose(moved, whole, rtol=1e-5)


def test_answers_stay_within_the_training_ages():
    z = np.linspace(0, 1, 50)[:, None]
    predicted, _ = probe.probe_age(z, 20 + 30 * z[:, 0], np.array([[-5.0], [9.0]]))
    np.testing.assert_allclose(predicted, [20, 50])


def test_logistic_classes_are_those_of_a_general_minimiser():
    rng = np.random.default_rng(0)
    true = rng.integers(0, 3, 90)
    z = np.eye(3)[true][:, :2] * 2 + rng.normal(size=(90, 2))
    predicted, strength = probe.probe_class(z[:60], true[:60], z[60:])
    mean, std = z[:60].mean(0), z[:60].std(0)
    rows, others = (z[:60] - mean) / std, (z[60:] - mean) / std

    def loss(flat):
        weights, bias = flat[:6].reshape(2, 3), flat[6:]
        scores = rows @ weights + bias
        nll = np.log(np.exp(scores).sum(1)) - scores[np.arange(60), true[:60]]
        return nll.mean() + strength / 2 * (flat[:6] ** 2).sum()

    best = minimize(loss, np.zeros(9)).x
    expected = (others @ best[:6].reshape(2, 3) + best[6:]).argmax(1)
    np.testing.assert_array_equal(predicted, expected)
    assert 0.5 < np.mean(predicted == true[60:]) < 1


def test_one_class_and_too_few_rows():
    z = features(20)
    assert set(probe.probe_class(z, np.full(20, 2), z)[0]) == {2}
    with pytest.raises(ValueError, match="at least 5 training faces, there are 4"):
        probe.probe_age(z[:4], np.arange(4), z)
