"""Schedules, masks, layer-wise rates, freezing and LARS, on a small hand-made tree."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from coatnet_jax import optim


def _params():
    rng = np.random.default_rng(0)

    def dense(*shape):
        kernel, bias = rng.normal(size=shape), rng.normal(size=shape[-1:])
        return {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}

    blocks = ("stage1_block0", "stage1_block1", "stage2_block0", "stage3_block0", "stage4_block0")
    backbone = {name: {"mlp": dense(3, 3)} for name in blocks}
    backbone["stage4_block0"]["relative_bias"] = jnp.ones((9, 2))
    backbone["stem"] = {"conv1": dense(3, 3, 3, 2)}
    backbone["norm"] = {"scale": jnp.ones(3), "bias": jnp.zeros(3)}
    return {"backbone": backbone, "head": {"age": dense(3, 5)}}


def _step(tx, params, grads, state=None):
    state = tx.init(params) if state is None else state
    updates, state = jax.jit(tx.update)(grads, state, params)
    return updates, state


def _grads(params, value=0.1):
    return jax.tree.map(lambda p: jnp.full_like(p, value), params)


def test_schedule_matches_its_closed_form():
    schedule = optim.warmup_cosine(2.0, total_steps=110, warmup_steps=10)
    cosine = lambda t: 1 + np.cos(np.pi * (t - 10) / 100)  # noqa: E731
    expected = {0: 0.0, 5: 1.0, 10: 2.0, 35: cosine(35), 60: 1.0, 110: 0.0}
    for step, rate in expected.items():
        assert float(schedule(step)) == pytest.approx(rate, abs=1e-6)
    assert float(optim.warmup_cosine(2.0, total_steps=5, warmup_steps=0)(0)) == 2.0


@pytest.mark.parametrize("warmup", [10, 11, -1])
def test_schedule_refuses_a_warmup_that_does_not_fit(warmup):
    with pytest.raises(ValueError, match=f"warmup_steps is {warmup}.*total_steps.*10"):
        optim.warmup_cosine(1.0, total_steps=10, warmup_steps=warmup)


def test_decay_mask_leaves_out_biases_norms_and_relative_bias_tables():
    params = _params()
    params["head"]["stacked"] = {"bias": jnp.ones((4, 3)), "scale": jnp.ones((4, 3))}
    params["head"]["gamma"] = jnp.ones(3)
    params["head"]["position_embedding"] = jnp.ones((1, 5, 8))  # as a ViT has it
    mask = optim.decay_mask(params)
    backbone = mask["backbone"]
    assert backbone["stem"]["conv1"] == {"kernel": True, "bias": False}
    assert backbone["stage4_block0"] == {
        "mlp": {"kernel": True, "bias": False},
        "relative_bias": False,
    }
    assert backbone["norm"] == {"scale": False, "bias": False}
    assert mask["head"]["gamma"] is mask["head"]["position_embedding"] is False
    assert mask["head"]["stacked"] == {"bias": False, "scale": False}


def test_layer_scales_fall_from_the_head_to_the_stem():
    scales = optim.layer_scales(_params(), decay=0.5)
    assert scales["head"]["age"]["kernel"] == 1
    backbone = {k: set(jax.tree.leaves(v)) for k, v in scales["backbone"].items()}
    assert backbone == {
        "norm": {1.0},
        "stage4_block0": {0.5},
        "stage3_block0": {0.25},
        "stage2_block0": {0.125},
        "stage1_block1": {0.0625},
        "stage1_block0": {0.03125},
        "stem": {0.015625},
    }


def test_blocks_are_ordered_by_number_not_by_spelling():
    leaf = {"kernel": jnp.ones((2, 2))}
    params = {"backbone": {f"stage3_block{n}": leaf for n in range(12)}, "projection": leaf}
    scales = optim.layer_scales(params, decay=0.9)["backbone"]
    assert scales["stage3_block11"]["kernel"] == pytest.approx(0.9)
    assert scales["stage3_block2"]["kernel"] == pytest.approx(0.9**10)


def test_unknown_layer_is_named_in_the_error():
    params = {"backbone": {"mystery": {"kernel": jnp.ones((2, 2))}}, "head": {}}
    with pytest.raises(ValueError, match="'backbone/mystery/kernel'"):
        optim.layer_scales(params, decay=0.5)
    optim.create_optimizer(params, learning_rate=0.1, train_from="head")  # needs no layers


def test_layer_decay_scales_the_step_of_every_layer():
    params = _params()
    plain, _ = _step(optim.create_optimizer(params, learning_rate=0.1), params, _grads(params))
    decayed, _ = _step(
        optim.create_optimizer(params, learning_rate=0.1, layer_decay=0.5), params, _grads(params)
    )
    scales = optim.layer_scales(params, decay=0.5)
    expected = jax.tree.map(lambda u, s: u * s, plain, scales)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), decayed, expected)


@pytest.mark.parametrize(
    ("train_from", "trained"),
    [
        ("full", {"head", "norm", "stage4", "stage3", "stage2", "stage1", "stem"}),
        ("stage3", {"head", "norm", "stage4", "stage3"}),
        ("head", {"head"}),
    ],
)
def test_frozen_leaves_do_not_move_by_a_bit_and_have_no_memory(train_from, trained):
    params = _params()
    tx = optim.create_optimizer(
        params,
        learning_rate=0.1,
        weight_decay=0.3,
        clip_norm=1.0,
        layer_decay=0.7,
        train_from=train_from,
    )
    new, state = params, None
    for _ in range(2):
        updates, state = _step(tx, new, _grads(params), state)
        new = optax.apply_updates(new, updates)
    moved, still = set(), set()
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(new), strict=True
    ):
        name = path[1].key.split("_")[0] if path[0].key == "backbone" else "head"
        (still if np.array_equal(a, b) else moved).add(name)
    assert moved == trained and not moved & still
    frozen = jax.tree.leaves(optim.freeze_mask(params, train_from))
    elements = sum(p.size for p, f in zip(jax.tree.leaves(params), frozen, strict=True) if not f)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert moments == 2 * elements


def test_gradients_of_frozen_leaves_do_not_count_in_the_clipping():
    params = _params()
    grads = _grads(params)
    grads["backbone"]["stem"] = _grads(grads["backbone"]["stem"], 1e6)
    tx = optim.create_optimizer(
        params, name="sgd", learning_rate=1.0, clip_norm=10.0, train_from="stage1"
    )
    updates, _ = _step(tx, params, grads)
    np.testing.assert_allclose(updates["head"]["age"]["kernel"], -0.1, rtol=1e-6)


def test_unknown_train_from_lists_the_choices():
    with pytest.raises(ValueError, match="full, head, stage4, stage3, stage2, stage1"):
        optim.freeze_mask(_params(), "stage7")


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_decay_pulls_on_kernels_only(name):
    params = _params()
    tx = optim.create_optimizer(params, name=name, learning_rate=0.1, weight_decay=0.2)
    updates, _ = _step(tx, params, _grads(params, 0.0))
    head, block = updates["head"]["age"], updates["backbone"]["stage4_block0"]
    assert not np.any(head["bias"]) and not np.any(block["relative_bias"])
    assert not np.any(updates["backbone"]["norm"]["scale"])
    # LARS scales the decay to 0.001 of the weights' norm; the others take lr * decay * weight.
    pull = 0.1 * (0.001 if name == "lars" else 0.2)
    np.testing.assert_allclose(head["kernel"], -pull * params["head"]["age"]["kernel"], rtol=1e-5)


def test_lars_trust_ratio_matches_numpy():
    params = _params()
    grads = jax.tree.map(lambda p: jnp.cos(3 * p), params)
    tx = optim.create_optimizer(
        params, name="lars", learning_rate=0.5, weight_decay=0.01, momentum=0.8
    )
    first, state = _step(tx, params, grads)
    second, _ = _step(tx, params, grads, state)
    w, g = (np.asarray(t["head"]["age"]["kernel"], np.float64) for t in (params, grads))
    g = g + 0.01 * w
    step = -0.5 * 0.001 * np.linalg.norm(w) / np.linalg.norm(g) * g
    np.testing.assert_allclose(first["head"]["age"]["kernel"], step, rtol=1e-5)
    np.testing.assert_allclose(second["head"]["age"]["kernel"], 1.8 * step, rtol=1e-5)
    # Biases and tables are not adapted: plain SGD.
    np.testing.assert_allclose(
        first["head"]["age"]["bias"], -0.5 * grads["head"]["age"]["bias"], rtol=1e-6
    )
    np.testing.assert_allclose(
        first["backbone"]["stage4_block0"]["relative_bias"], -0.5 * np.cos(3.0), rtol=1e-5
    )


def test_adamw_takes_the_decay_of_its_moments_as_given():
    params = {"head": {"bias": jnp.zeros(3)}}
    tx = optim.create_optimizer(params, learning_rate=0.1, b1=0.5, b2=0.7)
    state, m, v = None, 0.0, 0.0
    for step, gradient in enumerate((1.0, -2.0), start=1):
        updates, state = _step(tx, params, _grads(params, gradient), state)
        m, v = 0.5 * m + 0.5 * gradient, 0.7 * v + 0.3 * gradient**2
        expected = -0.1 * (m / (1 - 0.5**step)) / np.sqrt(v / (1 - 0.7**step))
        np.testing.assert_allclose(updates["head"]["bias"], expected, rtol=1e-5)


def test_clipping_holds_the_global_norm():
    params = _params()
    tx = optim.create_optimizer(params, name="sgd", learning_rate=1.0, momentum=0.0, clip_norm=0.25)
    updates, _ = _step(tx, params, _grads(params, 3.0))
    norm = np.sqrt(sum(np.sum(np.square(u)) for u in jax.tree.leaves(updates)))
    assert norm == pytest.approx(0.25, rel=1e-5)


def test_unknown_optimizer_is_answered_with_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean adamw"):
        optim.create_optimizer({}, name="adam_w", learning_rate=0.1)
    with pytest.raises(ValueError, match="choose from adamw, lars, sgd"):
        optim.create_optimizer({}, name="zzz", learning_rate=0.1)
