"""Every method's loss against NumPy loops and values worked out by hand."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coatnet_jax.config import load_config
from coatnet_jax.ssl.barlow_twins import BarlowTwins
from coatnet_jax.ssl.byol import BYOL
from coatnet_jax.ssl.dino import DINO
from coatnet_jax.ssl.methods import METHODS, create_method, create_siamese
from coatnet_jax.ssl.nt_xent import nt_xent
from coatnet_jax.ssl.rank_n_contrast import RankNContrast, rank_n_contrast
from coatnet_jax.ssl.simclr import SimCLR
from coatnet_jax.ssl.simsiam import SimSiam
from coatnet_jax.ssl.supcon import SupCon, supervised_contrastive
from coatnet_jax.ssl.vicreg import VICReg
from configs import pretrain as pretrain_config

AGE = np.array([3, 30, 31, 31, 64])
B, WIDTH = len(AGE), 6


def draw(seed):
    return np.random.default_rng(seed).normal(size=(2 * B, WIDTH)).astype(np.float32)


ONLINE, TARGET = {"z": draw(0), "p": draw(1)}, {"z": draw(2)}


def loss_of(method, online=ONLINE, target=TARGET, **memory):
    loss, _, memory = method.loss(online, target, age=jnp.asarray(AGE), memory=memory)
    return float(loss), memory


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_byol_matches_a_loop_over_both_directions():
    total = 0.0
    for i in range(B):
        total += 2 - 2 * cosine(ONLINE["p"][i], TARGET["z"][B + i])
        total += 2 - 2 * cosine(ONLINE["p"][B + i], TARGET["z"][i])
    assert loss_of(BYOL())[0] == pytest.approx(total / B, rel=1e-5)


def test_simsiam_matches_a_loop_and_stops_the_gradient_of_the_projection():
    total = 0.0
    for i in range(B):
        total -= cosine(ONLINE["p"][i], ONLINE["z"][B + i]) / 2
        total -= cosine(ONLINE["p"][B + i], ONLINE["z"][i]) / 2
    assert loss_of(SimSiam())[0] == pytest.approx(total / B, rel=1e-5)
    gradient = jax.grad(lambda online: SimSiam().loss(online, None, age=AGE, memory={})[0])(ONLINE)
    assert not np.any(gradient["z"]) and np.any(gradient["p"])


def test_dino_matches_a_loop_and_moves_its_centre():
    method, center = DINO(), np.linspace(-1, 1, WIDTH).astype(np.float32)
    softmax = lambda x: np.exp(x) / np.exp(x).sum()  # noqa: E731
    total = 0.0
    for teacher, student in [*((i, B + i) for i in range(B)), *((B + i, i) for i in range(B))]:
        p = softmax((TARGET["z"][teacher] - center) / method.teacher_temperature)
        total -= (p * np.log(softmax(ONLINE["z"][student] / method.student_temperature))).sum()
    loss, memory = loss_of(method, center=center)
    assert loss == pytest.approx(total / (2 * B), rel=1e-4)
    np.testing.assert_allclose(
        memory["center"], 0.9 * center + 0.1 * TARGET["z"].mean(0), rtol=1e-5, atol=1e-6
    )


def test_dinos_prototypes_rest_at_the_start_and_have_length_one():
    grads = {"backbone": jnp.ones(2), "projection": {"prototypes": jnp.ones(3), "dense1": 1.0}}
    early, late = (DINO().masked_gradients(grads, progress) for progress in (0.0, 0.02))
    assert not np.any(early["projection"]["prototypes"])
    assert early["projection"]["dense1"] == 1 and np.all(late["projection"]["prototypes"] == 1)
    model = DINO().model(Flat(), projection={"out": 5, "hidden": 8, "bottleneck": 4}, prediction={})
    out, variables = model.init_with_output(jax.random.key(0), ONLINE["z"], train=False)
    assert np.abs(out["z"]).max() <= 1 + 1e-6
    scaled = jax.tree.map(lambda x: x, variables)
    scaled["params"]["projection"]["prototypes"] *= 7.0
    np.testing.assert_allclose(
        model.apply(scaled, ONLINE["z"], train=False)["z"], out["z"], atol=1e-6
    )


def test_barlow_twins_matches_a_loop():
    first, second = ONLINE["z"][:B], ONLINE["z"][B:]
    total = 0.0
    for i in range(WIDTH):
        for j in range(WIDTH):
            correlation = np.corrcoef(first[:, i], second[:, j])[0, 1]
            total += (1 - correlation) ** 2 if i == j else 0.005 * correlation**2
    assert loss_of(BarlowTwins())[0] == pytest.approx(total, rel=1e-4)


def test_barlow_twins_is_zero_for_equal_views_without_correlation():
    hadamard = np.array([[1, 1, 1], [-1, 1, -1], [1, -1, -1], [-1, -1, 1]], np.float32)
    assert loss_of(BarlowTwins(), {"z": np.tile(hadamard, (2, 1))})[0] == pytest.approx(0, abs=1e-6)


def test_vicreg_matches_its_terms_one_by_one():
    views = ONLINE["z"][:B] * 0.3, ONLINE["z"][B:] * 0.3
    invariance = ((views[0] - views[1]) ** 2).mean()
    variance = covariance = 0.0
    for z in views:
        deviation = np.sqrt(np.cov(z.T).diagonal() + 1e-4)
        variance += np.mean([max(0, 1 - s) for s in deviation]) / 2
        covariance += sum(
            np.cov(z.T)[i, j] ** 2 for i in range(WIDTH) for j in range(WIDTH) if i != j
        )
    expected = 25 * invariance + 25 * variance + covariance / WIDTH
    assert loss_of(VICReg(), {"z": np.concatenate(views)})[0] == pytest.approx(expected, rel=1e-4)


def test_vicreg_of_collapsed_features_is_the_variance_term():
    collapsed = {"z": np.ones((2 * B, WIDTH), np.float32)}
    assert loss_of(VICReg(), collapsed)[0] == pytest.approx(25 * (1 - 0.01), rel=1e-5)


def test_supcon_with_labels_of_pairs_only_is_nt_xent():
    labels = jnp.tile(jnp.arange(B), 2)
    expected, _ = nt_xent(ONLINE["z"], temperature=0.1)
    ours = supervised_contrastive(ONLINE["z"], labels, temperature=0.1)
    assert float(ours) == pytest.approx(float(expected), rel=1e-5)


def test_supcon_matches_a_loop():
    z = ONLINE["z"] / np.linalg.norm(ONLINE["z"], axis=1, keepdims=True)
    label, total = np.tile(AGE // 5, 2), 0.0
    for i in range(2 * B):
        others = [k for k in range(2 * B) if k != i]
        positives = [k for k in others if label[k] == label[i]]
        normaliser = np.log(sum(np.exp(z[i] @ z[k] / 0.1) for k in others))
        total += np.mean([normaliser - z[i] @ z[k] / 0.1 for k in positives])
    assert loss_of(SupCon())[0] == pytest.approx(total / (2 * B), rel=1e-5)


@pytest.mark.parametrize("age", [AGE, np.full(B, 30)], ids=["some equal", "all equal"])
def test_rank_n_contrast_matches_a_loop_over_triples(age):
    z, label, total = ONLINE["z"], np.tile(age, 2), 0.0
    similarity = -np.linalg.norm(z[:, None] - z, axis=-1) / 2
    for i in range(2 * B):
        others = [k for k in range(2 * B) if k != i]
        for j in others:
            apart = abs(label[i] - label[j])
            negatives = [k for k in others if abs(label[i] - label[k]) >= apart]
            total += np.log(np.exp(similarity[i, negatives]).sum()) - similarity[i, j]
    of_z = lambda z: rank_n_contrast(z, jnp.asarray(label), temperature=2.0)  # noqa: E731
    loss, gradient = jax.value_and_grad(of_z)(z)
    assert float(loss) == pytest.approx(total / (2 * B * (2 * B - 1)), rel=1e-5)
    assert np.isfinite(gradient).all()


def test_rank_n_contrast_has_finite_gradients_where_rows_are_equal():
    loss = lambda z: RankNContrast().loss({"z": z}, None, age=AGE, memory={})[0]  # noqa: E731
    assert np.isfinite(jax.grad(loss)(jnp.ones((2 * B, WIDTH)))).all()


def test_momentum_rises_from_its_base_to_one():
    method = BYOL(momentum=0.9)
    at = [float(method.momentum_at(jnp.float32(t))) for t in (0, 0.5, 1)]
    np.testing.assert_allclose(at, [0.9, 0.95, 1.0], rtol=1e-6)


class Flat(nn.Module):
    """A backbone that gives back what it gets."""

    def __call__(self, images, *, train):
        return images


@pytest.mark.parametrize("name", METHODS)
def test_config_of_every_method_gives_its_model_and_loss(name):
    config = load_config(f"pretrain:{name},atto,drawn")
    method = create_method(config)
    assert isinstance(method, METHODS[name]) and hash(method)
    assert set(config.loss) == {field.name for field in dataclasses.fields(method)}
    assert method.labelled == (name in ("supcon", "rank_n_contrast"))
    model = create_siamese(config, Flat())
    shapes = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), jnp.zeros((4, 8)), train=False)
    )
    assert ("p" in shapes[0]) == ("prediction" in config) == (name in ("byol", "simsiam"))
    assert shapes[0]["z"].shape == (4, 8 if name == "rank_n_contrast" else config.projection.out)


def test_words_of_the_config_come_in_any_order():
    one, other = (load_config(f"pretrain:{w}") for w in ("atto,byol,drawn", "drawn,byol,atto"))
    assert one == other and one.method == "byol" and one.model.name == "coatnet_atto"
    assert load_config("pretrain:byol").model.name == "coatnet_micro"
    assert load_config("pretrain:micro,cpu").method == "simclr"
    assert set(pretrain_config.METHODS) == set(METHODS)
    for words, message in (("micro,atto", "two models"), ("byol,dino", "two methods")):
        with pytest.raises(ValueError, match=message):
            load_config(f"pretrain:{words}")


def test_loss_settings_of_another_method_are_refused():
    config = load_config("pretrain:atto")
    config.method = "byol"
    with pytest.raises(ValueError, match="temperature, which byol has not.*pretrain:micro,byol"):
        create_method(config)
    config.method = "mocco"
    with pytest.raises(ValueError, match="unknown method 'mocco': choose from simclr, byol"):
        create_method(config)
    assert create_method(load_config("pretrain:atto")) == SimCLR()
