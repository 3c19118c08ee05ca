"""Growing views: which size when, whose tables are trained, and what is refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.interpolate import RegularGridInterpolator

from coatnet_jax import progressive
from coatnet_jax.coatnet import CoAtNet, CoAtNetConfig
from coatnet_jax.config import load_config
from coatnet_jax.heads import AgeModel
from coatnet_jax.models import create_backbone
from coatnet_jax.progressive import (
    check_sizes,
    growing_step,
    params_for,
    size_at,
    steps_before_last,
)
from coatnet_jax.stage import make_schedule
from coatnet_jax.train_state import TrainState

SMALL = CoAtNetConfig(widths=(8, 8, 16, 32, 32), depths=(1, 1, 1, 1, 1))


def test_every_size_has_its_equal_share_of_the_steps():
    sizes = [size_at(step, (32, 48, 64), total_steps=9) for step in range(9)]
    assert sizes == 3 * [32] + 3 * [48] + 3 * [64]
    shares = np.bincount([size_at(step, (1, 2, 3), total_steps=1000) for step in range(1000)])
    assert shares.tolist() == [0, 334, 333, 333]


@pytest.mark.parametrize("total", [3, 7, 9, 10, 1000])
@pytest.mark.parametrize("sizes", [(), (48,), (32, 48), (24, 32, 48)])
def test_patience_counts_from_the_last_size_on(sizes, total):
    by_hand = sum(size_at(step, sizes, total_steps=total) != 48 for step in range(total) if sizes)
    assert steps_before_last(sizes, total_steps=total) == by_hand
    config = load_config("finetune:atto,drawn")
    config.progressive, config.epochs, config.batch_size = sizes, total, 10
    schedule = make_schedule(config, faces=10, patience=2)
    assert (schedule.total_steps, schedule.patience_from) == (total, by_hand)


def sizes_of_steps(first, count, capsys):
    """The sizes that a step of 7 in all is called with, begun at step `first`."""
    seen = []
    step = growing_step(
        lambda size: lambda state, batch: (seen.append(size), state)[1],
        (32, 64),
        total_steps=7,
        name="test",
    )
    for n in range(first, first + count):
        state = TrainState(step=n, params=None, batch_stats=None, opt_state=None, rng=None)
        step(state, None)
    return seen, capsys.readouterr().out.splitlines()


def test_sizes_change_at_the_same_step_whether_resumed_or_not(capsys, monkeypatch):
    trims = []
    monkeypatch.setattr(progressive, "give_back_freed_memory", lambda: trims.append(1))
    whole, said = sizes_of_steps(0, 7, capsys)
    assert whole == [32, 32, 32, 32, 64, 64, 64]
    assert said == [
        "[test] step 1: views of 32 px from here", "[test] step 5: views of 64 px from here"
    ]  # fmt: skip
    assert len(trims) == 2  # once for each size
    assert sizes_of_steps(2, 5, capsys)[0] == whole[2:]
    assert sizes_of_steps(5, 2, capsys) == ([64, 64], ["[test] step 6: views of 64 px from here"])


def shapes(model, size):
    images = jnp.zeros((1, size, size, 3))
    return jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)["params"]


def filled(tree):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), tree)


def test_small_views_see_the_full_table_interpolated_and_their_gradient_goes_back_to_it():
    model = AgeModel(CoAtNet(SMALL))
    params = filled(shapes(model, 96))
    name = ("backbone", "stage3_block0", "attention", "relative_bias")  # 6x6 tokens, then 4x4

    def table_of(tree):
        for key in name:
            tree = tree[key]
        return tree

    def seen(params):
        return params_for(params, jnp.zeros((2, 64, 64, 3)), model=model)

    found = seen(params)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(lambda x: x.shape, shapes(model, 64))
    full = np.asarray(table_of(params)).reshape(11, 11, -1)
    at = np.stack(np.meshgrid(*2 * [np.linspace(-1, 1, 7)], indexing="ij"), axis=-1)
    axis = np.linspace(-1, 1, 11)
    expected = RegularGridInterpolator((axis, axis), full)(at)
    np.testing.assert_allclose(table_of(found), expected.reshape(49, -1), atol=1e-5)
    others = [tree["head"] for tree in (found, params)]
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, *others)))

    weight = np.random.default_rng(1).normal(size=(49, 1))
    grads = jax.grad(lambda p: jnp.sum(weight * table_of(seen(p))))(params)
    # By hand: what one entry of the full table adds to the sum.
    entry = np.zeros((11, 11))
    entry[3, 8] = 1
    by_hand = np.sum(weight[:, 0] * RegularGridInterpolator((axis, axis), entry)(at).ravel())
    np.testing.assert_allclose(table_of(grads).reshape(11, 11, -1)[3, 8], by_hand, atol=1e-5)


@pytest.mark.parametrize("name", ["vit_s16", "coatnet_rmlp_nano_rw", "resnet18"])
def test_other_backbones_take_smaller_views_too(name):
    model = AgeModel(create_backbone(name))
    like = shapes(model, 64)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    found = jax.eval_shape(partial(params_for, model=model), like, images)
    assert found == shapes(model, 32)


@pytest.mark.parametrize(
    ("sizes", "steps", "message"),
    [
        ((64, 48), 9, r"\(64, 48\) must grow from size to size and end with .* is 64"),
        ((48, 48, 64), 9, "must grow"),
        ((32, 48), 9, "end with model.image_size, which is 64"),
        ((32, 48, 64), 2, "3 sizes for a training of 2 steps"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_one_line(sizes, steps, message):
    with pytest.raises(ValueError, match=message) as error:
        check_sizes(sizes, 64, total_steps=steps)
    assert "\n" not in str(error.value)
    check_sizes((), 64, total_steps=1)
    check_sizes((32, 64), 64, total_steps=2)
