"""The answers read from a distribution over ages, against loops and each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coatnet_jax import ages


@pytest.fixture(scope="module")
def p():
    """Distributions of all kinds: flat, peaked, two-humped, one-hot at both ends."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(400, 117)) * rng.uniform(0, 12, size=(400, 1))
    p = np.exp(logits - logits.max(-1, keepdims=True))
    ends = np.eye(117)[[0, 17, 18, 40, 41, 60, 61, 116]]
    return np.concatenate([p / p.sum(-1, keepdims=True), ends]).astype(np.float32)


def test_age_classes_meet_at_18_41_and_61():
    age = np.array([0, 17, 18, 40, 41, 60, 61, 116], np.int32)
    expected = [0, 0, 1, 1, 2, 2, 3, 3]
    np.testing.assert_array_equal(ages.age_class(age), expected)
    np.testing.assert_array_equal(ages.age_class(jnp.asarray(age)), expected)
    assert ages.age_class(17.4) == 0 and ages.age_class(17.6) == 1
    assert len(ages.CLASS_NAMES) == 4


def test_class_probabilities_are_the_sums_over_ages(p):
    of = ages.age_class(np.arange(117))
    expected = np.stack([p[:, of == c].sum(-1) for c in range(4)], -1)
    np.testing.assert_allclose(ages.class_probabilities(p), expected, atol=1e-6)


def test_expected_and_most_likely_age_match_a_loop(p):
    expected = [sum(a * row[a] for a in range(117)) for row in p]
    np.testing.assert_allclose(ages.expected_age(p), expected, rtol=1e-5)
    np.testing.assert_array_equal(ages.most_likely_age(p), [list(r).index(max(r)) for r in p])


def test_rounded_median_is_the_integer_median(p):
    first_half = [next(a for a in range(117) if r[: a + 1].sum() >= r.sum() / 2) for r in p]
    np.testing.assert_array_equal(np.round(ages.median_age(p)), first_half)


def test_median_halves_the_probability_spread_over_each_year():
    row = np.zeros(117)
    row[30], row[31] = 0.4, 0.6  # half is reached a sixth into the year around 31
    assert ages.median_age(row) == pytest.approx(30.5 + 1 / 6)
    row = np.zeros(117)
    row[17], row[50] = 0.5, 0.5  # a tie goes to the younger, and stays inside its year
    assert round(float(ages.median_age(row))) == 17 and ages.age_class(ages.median_age(row)) == 0
    assert ages.median_age(np.eye(117)[25]) == pytest.approx(25)
    flat = ages.median_age(np.full(117, 1 / 117))
    assert flat == pytest.approx(58)


def test_two_decimals_of_the_median_are_of_its_class():
    p, share = np.zeros((401, 117)), np.linspace(0.499, 0.501, 401)
    p[:, 17], p[:, 18] = share, 1 - share
    age = ages.median_age(p)
    written = np.array([float(f"{a:.2f}") for a in age])
    np.testing.assert_array_equal(ages.age_class(written), ages.age_class(age))
    assert set(ages.age_class(age)) == {0, 1}


def test_median_stays_in_the_range_of_ages():
    row = np.zeros(117)
    row[0], row[1] = 0.9, 0.1
    assert ages.median_age(row) == pytest.approx(0.0555, abs=1e-3)
    row = np.zeros(117)
    row[115], row[116] = 0.01, 0.99
    assert 115.9 < ages.median_age(row) <= 116


def test_class_of_the_median_is_the_median_class(p):
    cumulative = np.cumsum(ages.class_probabilities(p), -1)
    median_class = np.argmax(cumulative >= cumulative[:, -1:] / 2, -1)
    np.testing.assert_array_equal(ages.age_class(ages.median_age(p)), median_class)


@pytest.mark.parametrize(
    "read", [ages.median_age, ages.expected_age, ages.most_likely_age, ages.class_probabilities]
)
def test_jax_and_numpy_agree_and_keep_their_kind(p, read):
    theirs, ours = jax.jit(read)(jnp.asarray(p)), read(p)
    assert isinstance(theirs, jax.Array) and not isinstance(ours, jax.Array)
    np.testing.assert_allclose(theirs, ours, atol=2e-3)


def test_decoders_are_median_mean_and_mode():
    row = np.zeros(117)
    row[[10, 20, 60]] = 0.4, 0.35, 0.25
    decoded = {name: float(ages.get_decoder(name)(row)) for name in ages.DECODERS}
    assert decoded["median"] == pytest.approx(19.5 + 0.1 / 0.35)
    assert decoded["mean"] == pytest.approx(4 + 7 + 15)
    assert decoded["argmax"] == 10
    assert ages.DECODED.keys() == ages.DECODERS.keys()
    with pytest.raises(ValueError, match="unknown loss.decode 'mode': choose from median, mean"):
        ages.get_decoder("mode")


def test_ages_outside_the_range_are_counted_and_named():
    ages.check_ages(np.array([0, 116]), "the training split")
    with pytest.raises(ValueError, match="2 of the 4 faces of the test split .* first one 130"):
        ages.check_ages(np.array([5, 130, -1, 116]), "the test split")
    with pytest.raises(ValueError, match="1 of the 1 faces .* first one 117"):
        ages.check_ages(np.array([117]), "the test split")
