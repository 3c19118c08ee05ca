"""Age losses, their labels and the probabilities read from their outputs, against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from coatnet_jax import age_losses
from coatnet_jax.age_losses import AGE_LOSSES, age_distribution, get_age_loss
from coatnet_jax.ages import class_probabilities, expected_age, median_age
from coatnet_jax.heads import AgeHead

YEARS = np.arange(117)
AGES = np.array([0, 5, 40, 60, 116])


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def softmax(x):
    p = np.exp(np.asarray(x, np.float64))
    return p / p.sum(-1, keepdims=True)


def outputs_of(k, rows=5, scale=2.0):
    return (np.random.default_rng(k).normal(size=(rows, k)) * scale).astype(np.float32)


def mixed():
    """Blends, 0.3 of one age and 0.7 of another: ([5, 117], the pairs of ages)."""
    pairs = list(zip([3, 20, 40, 60, 116], [9, 8, 7, 6, 0], strict=True))
    return np.stack([0.3 * np.eye(117)[a] + 0.7 * np.eye(117)[b] for a, b in pairs]), pairs


# --- labels --------------------------------------------------------------------------------------


def test_age_distribution_is_the_normalised_gaussian():
    age = np.array([0, 1, 30, 116], np.int32)
    expected = np.exp(-((YEARS - age[:, None]) ** 2) / (2 * 2.5**2))
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(age_distribution(age, sigma=2.5), expected, atol=1e-6)
    np.testing.assert_array_equal(age_distribution(age, sigma=0), np.eye(117)[age])
    with pytest.raises(ValueError, match="-1"):
        age_distribution(age, sigma=-1)


@pytest.mark.parametrize(("name", "distance"), [("sord", abs), ("sord_squared", lambda d: d * d)])
def test_sord_labels_are_a_softmax_of_minus_the_distance(name, distance):
    found = get_age_loss(name).label(AGES, sigma=2.0)
    for row, age in zip(found, AGES, strict=True):
        terms = [np.exp(-float(distance(int(a) - int(age)))) for a in YEARS]
        np.testing.assert_allclose(row, np.array(terms) / sum(terms), atol=1e-6)


def test_only_dldl_blurs_its_labels_by_sigma():
    blurred = {n for n, loss in AGE_LOSSES.items() if loss.label(AGES, sigma=2.0)[2, 40] < 0.25}
    assert blurred == {"dldl", "kl_l1"}
    for name in AGE_LOSSES.keys() - {"dldl", "kl_l1", "sord", "sord_squared"}:
        label = get_age_loss(name).label(AGES, sigma=2.0)
        np.testing.assert_array_equal(label, np.eye(117)[AGES])


# --- losses --------------------------------------------------------------------------------------


def test_kl_losses_match_numpy():
    logits, (target, _) = outputs_of(117), mixed()
    p = softmax(logits)
    kl = np.where(target > 0, target * np.log(np.where(target > 0, target, 1) / p), 0).sum(-1)
    l1 = np.abs((p * YEARS).sum(-1) - (target * YEARS).sum(-1))
    np.testing.assert_allclose(age_losses.kl(logits, target), kl, rtol=1e-5)
    np.testing.assert_allclose(age_losses.kl_l1(logits, target), kl + l1, rtol=1e-5)


def test_dldl_matches_optax():
    logits, target = outputs_of(117), age_distribution(AGES, sigma=2.0)
    expected = optax.losses.kl_divergence(jax.nn.log_softmax(logits), target)
    np.testing.assert_allclose(get_age_loss("dldl").loss(logits, target), expected, rtol=1e-5)


def test_kl_l1_is_zero_at_the_target():
    target = age_distribution(np.array([5, 50]), sigma=2.0)
    assert np.abs(age_losses.kl_l1(jnp.log(target + 1e-12), target)).max() < 1e-3


def test_mean_variance_matches_the_papers_terms():
    logits, (target, _) = outputs_of(117), mixed()
    p = softmax(logits)
    mean, true = (p * YEARS).sum(-1), (target * YEARS).sum(-1)
    variance = (p * YEARS**2).sum(-1) - mean**2
    expected = -(target * np.log(p)).sum(-1) + 0.2 * (mean - true) ** 2 / 2 + 0.05 * variance
    np.testing.assert_allclose(age_losses.mean_variance(logits, target), expected, rtol=1e-4)


def test_mean_residue_matches_a_loop():
    logits, (target, pairs) = outputs_of(117), mixed()
    found = age_losses.mean_residue(logits, target)
    for i, p in enumerate(softmax(logits)):
        mean = sum(a * p[a] for a in YEARS)
        expected = 0.2 * (mean - (target[i] * YEARS).sum()) ** 2 / 2
        for share, age in zip((0.3, 0.7), pairs[i], strict=True):
            residue = -sum(q * np.log(q) for q in p if q < p[age])
            expected += share * (0.05 * residue - np.log(p[age]))
        assert float(found[i]) == pytest.approx(expected, rel=1e-4)


def test_residue_leaves_out_the_true_age_itself():
    half, own = outputs_of(58), np.full((5, 1), 2.5, np.float32)
    logits = np.concatenate([half, own, half[:, ::-1]], axis=1)  # the mean is the true age, 58
    found = age_losses.mean_residue(logits, np.repeat(np.eye(117)[[58]], 5, axis=0))
    for i, p in enumerate(softmax(logits)):
        expected = -np.log(p[58]) - 0.05 * sum(q * np.log(q) for q in p if q < p[58])
        assert float(found[i]) == pytest.approx(expected, abs=1e-4)
        assert -0.05 * p[58] * np.log(p[58]) > 1e-3  # what the true age would add


@pytest.mark.parametrize("name", ["or_cnn", "coral"])
def test_ordinal_losses_are_sums_of_binary_cross_entropies(name):
    outputs, (target, pairs) = outputs_of(116), mixed()
    found = get_age_loss(name).loss(outputs, target)
    for i, f in enumerate(sigmoid(outputs)):
        expected = 0.0
        for k in range(116):
            above = sum(s for s, age in zip((0.3, 0.7), pairs[i], strict=True) if age > k)
            expected -= above * np.log(f[k]) + (1 - above) * np.log(1 - f[k])
        assert float(found[i]) == pytest.approx(expected, rel=1e-5)


def test_corn_matches_the_papers_sum_over_subsets():
    outputs, target = outputs_of(116), np.eye(117)[AGES]
    f, total, terms = sigmoid(outputs), 0.0, 0
    for k in range(116):
        subset = [i for i, age in enumerate(AGES) if age > k - 1]
        terms += len(subset)
        total -= sum(np.log(f[i, k]) if AGES[i] > k else np.log(1 - f[i, k]) for i in subset)
    assert float(age_losses.corn(outputs, target).mean()) == pytest.approx(total / terms, rel=1e-5)


def test_corn_of_blended_labels_is_the_cross_entropy_of_its_probabilities():
    outputs, (target, pairs) = outputs_of(116), mixed()
    p = np.asarray(age_losses.corn_probabilities(outputs), np.float64)
    terms = np.mean([0.3 * min(a + 1, 116) + 0.7 * min(b + 1, 116) for a, b in pairs])
    # Ages above a few dozen have probabilities below float32's least: taken in logarithms here.
    logs = np.cumsum(np.log(sigmoid(outputs)), -1)
    log_p = np.concatenate([np.zeros((5, 1)), logs], -1)
    log_p[:, :116] += np.log(1 - sigmoid(outputs))
    np.testing.assert_allclose(p, np.exp(log_p), atol=1e-6)
    expected = -(target * log_p).sum(-1) / terms
    np.testing.assert_allclose(age_losses.corn(outputs, target), expected, rtol=1e-4)


def test_regressions_aim_at_the_mean_of_a_blend():
    outputs = np.array([[-1.0], [0.0], [1.0], [0.5], [2.0]], np.float32)
    years = np.array([0, 58, 116, 87, 174])
    target, pairs = mixed()
    error = years - np.array([0.3 * a + 0.7 * b for a, b in pairs])
    np.testing.assert_allclose(get_age_loss("l1").loss(outputs, target), np.abs(error), rtol=1e-5)
    np.testing.assert_allclose(get_age_loss("mse").loss(outputs, target), error**2, rtol=1e-5)


def test_classes_are_the_four_and_bins_those_of_fairface():
    logits, (target, pairs) = outputs_of(4), mixed()
    p, expected = np.log(softmax(logits)), []
    for row, pair in zip(p, pairs, strict=True):
        a, b = (0 if age < 18 else 1 if age <= 40 else 2 if age <= 60 else 3 for age in pair)
        expected.append(-0.3 * row[a] - 0.7 * row[b])
    np.testing.assert_allclose(get_age_loss("classes_4").loss(logits, target), expected, rtol=1e-5)
    bins = [(0, 2), (3, 9), *((a, a + 9) for a in range(10, 70, 10)), (70, 116)]
    logits = outputs_of(9, rows=117)
    found = get_age_loss("bins_9").loss(logits, np.eye(117))
    for age in YEARS:
        (bin_of,) = [i for i, (low, high) in enumerate(bins) if low <= age <= high]
        assert float(found[age]) == pytest.approx(-np.log(softmax(logits[age])[bin_of]), rel=1e-4)


@pytest.mark.parametrize("name", AGE_LOSSES)
def test_every_loss_is_finite_float32_and_least_near_the_true_age(name):
    loss = get_age_loss(name)
    target = loss.label(jnp.array([30]), sigma=2.0)
    for scale in (0.0, 50.0):
        outputs = jnp.asarray(outputs_of(loss.outputs, rows=1, scale=scale), jnp.bfloat16)
        value, gradient = jax.value_and_grad(lambda x: loss.loss(x, target).sum())(outputs)
        assert value.dtype == jnp.float32
        assert np.isfinite(value) and np.isfinite(gradient.astype(jnp.float32)).all()
    # A few hundred steps of Adam on the outputs themselves end at an answer near 30 years.
    outputs, tx = jnp.zeros((1, loss.outputs)), optax.adam(optax.cosine_decay_schedule(0.1, 300))

    def step(carry, _):
        outputs, state = carry
        gradient = jax.grad(lambda x: loss.loss(x, target).sum())(outputs)
        updates, state = tx.update(gradient, state)
        return (outputs + updates, state), None

    (outputs, _), _ = jax.lax.scan(step, (outputs, tx.init(outputs)), length=300)
    expected = {"classes_4": 29, "bins_9": 34.5}.get(name, 30)
    assert float(median_age(loss.probabilities(outputs))[0]) == pytest.approx(expected, abs=0.6)


# --- probabilities -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AGE_LOSSES)
def test_every_head_gives_probabilities_over_ages_and_starts_uniform(name):
    loss = get_age_loss(name)
    p = loss.probabilities(outputs_of(loss.outputs, rows=50, scale=3.0))
    assert p.shape == (50, 117) and p.dtype == jnp.float32
    assert float(p.min()) >= 0
    np.testing.assert_allclose(p.sum(-1), 1, atol=1e-5)
    head = AgeHead(**loss.head)
    features = jax.random.normal(jax.random.key(0), (4, 12))
    out, _ = head.init_with_output(jax.random.key(1), features, train=False)
    start = loss.probabilities(out["age"])
    if loss.point:
        np.testing.assert_allclose(expected_age(start), 58, atol=4)
    elif name in ("classes_4", "bins_9"):
        edges = {"classes_4": age_losses.CLASS_EDGES, "bins_9": age_losses.BIN_EDGES}[name]
        sums = np.add.reduceat(np.asarray(start), edges[:-1], axis=-1)
        np.testing.assert_allclose(sums, 1 / loss.outputs, rtol=0.1)
    else:
        above = np.cumsum(np.asarray(start)[:, ::-1], -1)[:, ::-1]
        np.testing.assert_allclose(above[0], (117 - YEARS) / 117, atol=0.06)


def test_ordinal_probabilities_are_differences_where_they_fall():
    outputs = -np.sort(-outputs_of(116), axis=-1)
    above = np.concatenate([np.ones((5, 1)), sigmoid(outputs), np.zeros((5, 1))], -1)
    expected = above[:, :-1] - above[:, 1:]
    np.testing.assert_allclose(age_losses.ordinal_probabilities(outputs), expected, atol=1e-6)


def test_crossing_ordinal_outputs_keep_their_mean_and_their_count_above_one_half():
    outputs = outputs_of(116, rows=40, scale=1.0) + np.linspace(3, -3, 116, dtype=np.float32)
    assert (np.diff(outputs) > 0).any()
    p = age_losses.ordinal_probabilities(outputs)
    np.testing.assert_allclose(expected_age(p), sigmoid(outputs).sum(-1), rtol=1e-5)
    np.testing.assert_array_equal(np.round(median_age(p)), (outputs > 0).sum(-1))


def test_regressed_age_is_the_exact_mean_and_nearly_the_median():
    years = np.concatenate([np.linspace(0, 116, 400), [-30, 150]])
    p = age_losses.point_probabilities((years / 58 - 1)[:, None].astype(np.float32))
    np.testing.assert_allclose(expected_age(p), np.clip(years, 0, 116), atol=1e-4)
    assert np.abs(median_age(p) - np.clip(years, 0, 116)).max() < 0.1
    assert int((p > 0).sum(-1).max()) == 2


def test_bins_are_even_inside_and_keep_their_share():
    logits = outputs_of(4)
    p = get_age_loss("classes_4").probabilities(logits)
    np.testing.assert_allclose(class_probabilities(p), softmax(logits), rtol=1e-5)
    np.testing.assert_array_equal(p[:, 61], p[:, 116])
    surely_old = get_age_loss("classes_4").probabilities(np.array([[0, 0, 0, 50.0]]))
    assert float(median_age(surely_old)[0]) == pytest.approx(88.5, abs=0.6)


# --- the choice ----------------------------------------------------------------------------------


def test_unknown_age_loss_is_answered_with_the_nearest_name():
    assert get_age_loss("kl_l1").loss_fn is age_losses.kl_l1
    with pytest.raises(ValueError, match="did you mean mean_variance"):
        get_age_loss("mean_varience")
    with pytest.raises(ValueError, match="choose from cross_entropy, dldl, kl_l1, sord"):
        get_age_loss("zzz")


def test_loss_that_does_not_fit_the_head_is_told_with_both_numbers():
    for call in (
        lambda loss: loss.loss(np.zeros((2, 117)), np.eye(117)[:2]),
        lambda loss: loss.probabilities(np.zeros((2, 117))),
    ):
        with pytest.raises(ValueError, match="'corn' needs a head with 116 .* this one has 117"):
            call(get_age_loss("corn"))
