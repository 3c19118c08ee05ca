"""Calibration measures on hand-made cases, against loops, and on ages drawn from the model."""

import numpy as np
import pytest

from coatnet_jax import calibration


def posteriors(n, rng, *, sigma=6.0, shift=0.0):
    """Gaussian posteriors around 30 to 80 years, and ages drawn from posteriors of sigma 6."""
    years, centre = np.arange(117), rng.uniform(30, 80, n)[:, None]

    def gaussian(middle, width):
        p = np.exp(-0.5 * ((years - middle) / width) ** 2)
        return p / p.sum(-1, keepdims=True)

    true = np.cumsum(gaussian(centre, 6.0), axis=-1)
    age = (true < rng.random((n, 1))).sum(-1)
    return gaussian(centre + shift, sigma), age


def test_ece_is_that_counted_by_hand():
    # bins of 1/15: 0.95 and 0.97 share one, 0.55 and 0.5 do not; 0.97 is wrong
    confidence, hit = np.array([0.95, 0.97, 0.55, 0.5]), np.array([True, False, True, True])
    bins = calibration.reliability(confidence, hit)
    filled = {round(row["low"] * 15): row["support"] for row in bins if row["support"]}
    assert filled == {14: 2, 8: 1, 7: 1}
    expected = (2 * abs(0.5 - 0.96) + abs(1 - 0.55) + abs(1 - 0.5)) / 4
    assert calibration.expected_calibration_error(bins) == pytest.approx(expected)


def test_edges_of_confidence_have_a_bin():
    bins = calibration.reliability(np.array([0.0, 1.0, 1 / 15]), np.array([False, True, True]))
    assert [row["support"] for row in bins] == [2, *[0] * 13, 1]


def test_coverage_is_counted_face_by_face():
    rng = np.random.default_rng(0)
    p, age = posteriors(200, rng)
    for row in calibration.quantile_coverage(p, age, resamples=20):
        inside, widths = 0, []
        for q, a in zip(p, age, strict=True):
            edges, heights = np.arange(118) - 0.5, np.concatenate([[0], np.cumsum(q)])
            low, high = np.interp([(1 - row["level"]) / 2, (1 + row["level"]) / 2], heights, edges)
            inside += low <= a <= high
            widths.append(high - low)
        assert row["covered"] == pytest.approx(inside / 200)
        assert row["width"] == pytest.approx(np.mean(widths))


def test_pit_is_flat_and_coverage_nominal_where_ages_come_from_the_posterior():
    p, age = posteriors(8000, np.random.default_rng(1))
    sd = 3 * np.sqrt(0.1 * 0.9 / 8000)
    np.testing.assert_allclose(calibration.pit_histogram(p, age), 0.1, atol=sd)
    assert calibration.quantile_error(p, age) < 0.01
    for row in calibration.quantile_coverage(p, age, resamples=20):
        assert row["covered"] == pytest.approx(row["level"], abs=0.03)


def test_pit_of_one_face_is_spread_over_its_year():
    p = np.zeros((1, 117))
    p[0, [20, 21, 22]] = 0.25, 0.5, 0.25
    u = np.array([0.2, 0.25, 0.5, 0.75, 0.9])
    np.testing.assert_allclose(calibration.pit_cdf(p, np.array([21]), u), [0, 0, 0.5, 1, 1])
    np.testing.assert_allclose(
        calibration.pit_histogram(p, np.array([21]), bins=4), [0, 0.5, 0.5, 0]
    )
    # The ages come out too rarely both below 21 and above: the one must not make up for the other.
    q = np.linspace(0.05, 0.95, 19)
    expected = np.mean(np.abs(np.clip((q - 0.25) / 0.5, 0, 1) - q))
    assert calibration.quantile_error(p, np.array([21])) == pytest.approx(expected)
    # an age that was held impossible counts at one end, and is not lost
    assert calibration.pit_histogram(p, np.array([50])).sum() == pytest.approx(1)


def test_pit_heaps_at_the_ends_of_a_too_sure_model_and_at_one_of_a_biased_one():
    rng = np.random.default_rng(2)
    sure = calibration.pit_histogram(*posteriors(2000, rng, sigma=2))
    assert sure[0] > 0.2 and sure[-1] > 0.2
    old = calibration.pit_histogram(*posteriors(2000, rng, shift=8))
    assert old[0] > 0.3 > 0.05 > old[-1]
