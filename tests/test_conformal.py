"""Conformal intervals: their promise on exchangeable faces, and hand-made cases."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

from coatnet_jax import conformal, evaluate, predict
from coatnet_jax.ages import age_quantile, median_age


def faces(n, rng, *, sigma):
    """Posteriors of the width `sigma`, right about the middle, and ages that spread by 8 years."""
    centre = rng.uniform(25, 85, n)
    p = np.exp(-0.5 * ((np.arange(117) - centre[:, None]) / sigma) ** 2)
    age = np.clip(np.round(centre + rng.normal(0, 8, n)), 0, 116).astype(int)
    return p / p.sum(-1, keepdims=True), age


@pytest.mark.parametrize("sigma", [1.0, 8.0, 20.0])
def test_coverage_keeps_its_promise_however_wrong_the_posterior(sigma):
    rng = np.random.default_rng(0)
    inside = total = 0
    for _ in range(40):
        years = conformal.widening(*faces(150, rng, sigma=sigma))
        p, age = faces(150, rng, sigma=sigma)
        low, high = conformal.conformal_interval(p, years)
        inside += int(((low <= age) & (age <= high)).sum())
        total += len(age)
    # a set of 150 shifts the coverage of its faces together: count a set as a 1 / 2 of its faces
    assert inside / total >= binom.ppf(0.001, total // 2, 0.9) / (total // 2)
    assert inside / total < 0.93  # and is not kept by intervals that hold everything
    raw_low, raw_high = conformal.posterior_interval(p)
    raw = np.mean((raw_low <= age) & (age <= raw_high))
    assert (raw < 0.5) if sigma == 1 else (raw > 0.97) if sigma == 20 else True


def test_many_faces_of_one_age_at_the_lower_end_do_not_widen_the_others():
    """A fifth are one year old, with intervals that start at 0; the others' are too wide."""
    rng = np.random.default_rng(0)
    p, age = faces(4000, rng, sigma=20.0)
    infants = rng.random(4000) < 0.2
    p[infants], age[infants] = np.eye(117)[0] * 0.8 + np.eye(117)[60] * 0.2, 1
    years = conformal.widening(p[:2000], age[:2000])
    low, high = conformal.conformal_interval(p[2000:], years)
    inside = (low <= age[2000:]) & (age[2000:] <= high)
    assert 0.88 < inside.mean() < 0.92
    assert np.all(low[infants[2000:]] == 0)


def test_widening_is_the_ranked_score_of_a_loop():
    p, age = faces(57, np.random.default_rng(3), sigma=4.0)
    scores = []
    for q, a in zip(p, age, strict=True):
        low, high = age_quantile(q, 0.05), age_quantile(q, 0.95)
        scores.append(low - a if a < (low + high) / 2 else a - high)
    assert conformal.widening(p, age) == pytest.approx(sorted(scores)[53 - 1])  # ceil(58 x 0.9)


def test_few_faces_are_refused_and_nine_are_enough_for_ninety_percent():
    p, age = faces(9, np.random.default_rng(0), sigma=4.0)
    conformal.widening(p, age)
    with pytest.raises(ValueError, match="8 faces cannot calibrate 90 %: it takes 9 or more"):
        conformal.widening(p[:8], age[:8])


def test_interval_holds_the_answer_and_stays_within_the_ages():
    p, _ = faces(50, np.random.default_rng(0), sigma=3.0)
    for years in (-20.0, 0.0, 90.0):
        low, high = conformal.conformal_interval(p, years)
        assert np.all((0 <= low) & (low <= median_age(p)) & (median_age(p) <= high) & (high <= 116))


@pytest.mark.parametrize(("decode", "answer"), [("argmax", 10), ("mean", 26), ("median", 19.79)])
def test_interval_holds_the_answer_however_it_is_read(decode, answer):
    p = np.zeros(117)
    p[[10, 20, 60]] = 0.4, 0.35, 0.25
    constants = {"years": -20.0}  # both ends inwards, and past each answer
    row = predict.prediction_row(predict.Look(Path("a")), p, decode=decode, constants=constants)
    assert row["low"] == row["age"] == answer < row["high"]
    of_split = evaluate.intervals(p[None], constants, decode=decode)
    for low, high in (conformal.conformal_interval(p, -20.0, decode=decode), of_split):
        assert low == pytest.approx(answer, abs=0.005) and high == pytest.approx(60.3 - 20)


def test_an_end_at_the_oldest_age_stays_there():
    p = np.zeros(117)
    p[[100, 116]] = 0.2, 0.8  # the 5 % quantile is at 99.75 years
    assert conformal.conformal_interval(p, -3) == pytest.approx((102.75, 116))
    # Nobody is older than the interval says: only its lower end can be moved to an age of 115.
    assert conformal.widening(np.tile(p, (20, 1)), np.full(20, 115)) == pytest.approx(99.75 - 115)


def test_intervals_that_hold_every_age_are_narrowed_by_a_number_that_can_be_kept(tmp_path):
    p = np.zeros((20, 117))
    p[:, [0, 116]] = 0.5
    years = conformal.widening(p, np.full(20, 50))
    assert years == -117  # and not minus infinity, which `read_constants` refuses
    conformal.save_constants(tmp_path, {"years": years, "level": 0.9, "step": 5})
    assert conformal.read_constants(tmp_path, step=5)["years"] == years


def test_constants_come_back_for_the_same_step_and_level_only(tmp_path):
    assert conformal.read_constants(tmp_path, step=5) is None
    conformal.save_constants(tmp_path, {"years": 2.5, "level": 0.9, "step": 5})
    assert conformal.read_constants(tmp_path, step=5)["years"] == 2.5
    assert conformal.read_constants(tmp_path, step=6) is None
    conformal.save_constants(tmp_path, {"years": 2.5, "level": 0.8, "step": 5})
    assert conformal.read_constants(tmp_path, step=5) is None
    assert "1905.03222" in json.loads((tmp_path / "conformal.json").read_text())["method"]
    (tmp_path / "conformal.json").write_text('{"years"')
    with pytest.raises(ValueError, match="conformal.json is damaged: delete it"):
        conformal.read_constants(tmp_path, step=5)
