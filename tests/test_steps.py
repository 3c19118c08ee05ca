"""The jitted training steps: the same on 1 and 8 devices, and learning."""

from contextlib import nullcontext
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from coatnet_jax import finetune
from coatnet_jax.age_losses import AGE_LOSSES, age_distribution, get_age_loss
from coatnet_jax.augment import eval_view, simclr_view, supervised_view
from coatnet_jax.coatnet import CoAtNet, CoAtNetConfig, DropPath
from coatnet_jax.config import load_config
from coatnet_jax.finetune import finetune_train_step
from coatnet_jax.heads import AgeModel, ProjectionHead, SiameseModel
from coatnet_jax.losses import cross_entropy
from coatnet_jax.pretrain import check_accumulation, first_extra, pretrain_train_step
from coatnet_jax.sharding import check_batch_size, make_mesh, replicate, shard_batch
from coatnet_jax.ssl.byol import BYOL
from coatnet_jax.ssl.dino import DINO, DINOHead
from coatnet_jax.ssl.methods import METHODS, create_method, create_siamese
from coatnet_jax.ssl.simclr import SimCLR
from coatnet_jax.ssl.simsiam import SimSiam
from coatnet_jax.teachers import Teacher
from coatnet_jax.train_state import apply_gradients, create_train_state, init_variables

SMALL = CoAtNetConfig(widths=(8, 8, 16, 32, 32), depths=(1, 1, 1, 1, 1))
SIZE = 32


def make_batch(b=16):
    """Faces of a sort: noise below a white forehead, which is the higher the older they are."""
    rng = np.random.default_rng(0)
    age = rng.integers(0, 117, b).astype(np.int32)
    image = rng.integers(0, 128, (b, 40, 40, 3), np.uint8)
    image[np.arange(40) < 40 * age[:, None] / 117] = 255
    return {
        "image": image,
        "age": age,
        "gender": rng.integers(-1, 2, b).astype(np.int32),
        "race": rng.integers(-1, 5, b).astype(np.int32),
    }


def pretrain_parts():
    model = SiameseModel(CoAtNet(SMALL), ProjectionHead(layers=2, hidden=16, out=8))
    step = partial(
        pretrain_train_step,
        model=model,
        view=partial(simclr_view, size=SIZE),
        method=SimCLR(),
        total_steps=100,
    )
    return model, step


def finetune_parts():
    model = AgeModel(CoAtNet(SMALL))
    step = partial(
        finetune_train_step,
        model=model,
        view=partial(supervised_view, size=SIZE),
        loss_name="kl_l1",
        sigma=2.0,
        gender_weight=0.1,
        race_weight=0.1,
        mixup_alpha=0.2,
        ema=0.9,
    )
    return model, step


# Made once: a step compiles anew for every other model, view or optimizer object.
PRETRAIN, FINETUNE = pretrain_parts(), finetune_parts()
# Plain SGD with rate 1: the change of a parameter is its gradient, undisguised by Adam.
SGD = optax.sgd(1.0)


def run_steps(parts, devices, *, steps, tx, **labels):
    """(state, metrics of the last step) on the first `devices` devices; `labels` replace some."""
    model, step = parts
    mesh = make_mesh(devices)
    variables = init_variables(jax.random.key(0), model, image_size=SIZE)
    state = replicate(create_train_state(jax.random.key(1), variables, tx, ema=True), mesh)
    batch = shard_batch(make_batch() | labels, mesh)
    for _ in range(steps):
        state, metrics = step(state, batch, tx=tx)
    return jax.device_get(state.replace(rng=None)), jax.device_get(metrics)


@pytest.mark.parametrize("parts", [PRETRAIN, FINETUNE], ids=["pretrain", "finetune"])
def test_eight_devices_equal_one(parts):
    one, metrics_one = run_steps(parts, 1, steps=1, tx=SGD)
    eight, metrics_eight = run_steps(parts, 8, steps=1, tx=SGD)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-4)
    assert metrics_one["loss"] == pytest.approx(metrics_eight["loss"], rel=1e-5)
    before = jax.device_get(init_variables(jax.random.key(0), parts[0], image_size=SIZE)["params"])
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), before, one.params)
    assert min(jax.tree.leaves(moved)) >= 0 and max(jax.tree.leaves(moved)) > 1e-3


def test_initial_values_are_those_of_the_cpu_where_another_device_is_the_default(monkeypatch):
    start = init_variables(jax.random.key(0), FINETUNE[0], image_size=SIZE)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    elsewhere = init_variables(jax.random.key(0), FINETUNE[0], image_size=SIZE)
    assert {type(leaf) for leaf in jax.tree.leaves(elsewhere)} == {np.ndarray}
    jax.tree.map(np.testing.assert_array_equal, elsewhere, start)


def test_finetune_step_learns_one_batch():
    tx = optax.adam(3e-3)
    _, first = run_steps(FINETUNE, 1, steps=1, tx=tx)
    state, last = run_steps(FINETUNE, 1, steps=40, tx=tx)
    assert last["loss"] < 0.6 * first["loss"]
    assert int(state.step) == 40


def test_unknown_gender_moves_nothing_in_its_head():
    unknown = np.full(16, -1, np.int32)
    start = init_variables(jax.random.key(0), FINETUNE[0], image_size=SIZE)["params"]["head"]
    state, _ = run_steps(FINETUNE, 1, steps=1, tx=SGD, gender=unknown)
    moved = {
        name: bool(np.any(start[name]["kernel"] != state.params["head"][name]["kernel"]))
        for name in ("age", "gender", "race")
    }
    assert moved == {"age": True, "gender": False, "race": True}


def test_frozen_stages_have_no_backward_pass_and_leave_the_other_gradients_alone():
    model, step = FINETUNE
    variables = init_variables(jax.random.key(0), model, image_size=SIZE)
    start, held = variables["params"], partial(step, train_from="stage3")
    (full, _), (state, metrics) = (
        run_steps((model, which), 1, steps=1, tx=SGD) for which in (step, held)
    )
    moved = jax.tree.map(lambda a, b: a - b, state.params, jax.device_get(start))
    for (path, change), was, everywhere in zip(
        jax.tree_util.tree_leaves_with_path(moved),
        jax.tree.leaves(start),
        jax.tree.leaves(full.params),
        strict=True,
    ):
        if path[1].key.startswith(("stem", "stage1", "stage2")):
            assert not np.any(change), path
        else:
            np.testing.assert_allclose(was + change, everywhere, rtol=1e-4, atol=1e-6)
    squares = sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(moved))
    assert metrics["grad_norm"] == pytest.approx(np.sqrt(squares), rel=1e-3)

    state = create_train_state(jax.random.key(1), variables, SGD, ema=True)
    full, stage3, head = (
        finetune_train_step.lower(
            state, make_batch(), tx=SGD, **step.keywords, train_from=train_from
        ).cost_analysis()["flops"]
        for train_from in ("full", "stage3", "head")
    )
    assert full > 1.5 * stage3 and stage3 > head


class Stripes(nn.Module):
    """A backbone small enough to be traced for every loss: the brightness of each row."""

    @nn.compact
    def __call__(self, images, *, train):
        rows = nn.BatchNorm(use_running_average=not train, name="norm")(images.mean((2, 3)))
        return nn.Dense(8, name="mix")(rows)


def plain_view(rng, images):
    """The whole picture, nothing random: quick to trace."""
    return eval_view(images, size=SIZE)


def age_step(name, tx, **options):
    """(state, step) of one age loss on the small backbone."""
    model = AgeModel(Stripes(), **get_age_loss(name).head)
    variables = init_variables(jax.random.key(0), model, image_size=SIZE)
    state = create_train_state(jax.random.key(1), variables, tx, ema=True)
    own = {"loss_name": name, "model": model, "tx": tx, "view": plain_view}
    return state, partial(finetune_train_step, **FINETUNE[1].keywords | own | options)


@pytest.mark.parametrize("name", AGE_LOSSES)
def test_finetune_step_is_traced_with_every_loss(name):
    state, step = age_step(name, SGD)
    after, metrics = jax.eval_shape(step, state, make_batch())
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), state, after)
    assert all(jax.tree.leaves(same))
    assert metrics.keys() == {"loss", "mae", "grad_norm"}


def test_label_of_copies_that_disagree_is_the_mean_of_their_labels():
    ages = np.array([[30, 50, 30], [7, -1, -1], [40, 44, -1]])
    found = finetune.mean_label(jnp.asarray(ages), partial(age_distribution, sigma=2.0))
    years = np.arange(117)
    for row, label in zip(ages, found, strict=True):
        bells = [np.exp(-0.5 * ((years - age) / 2) ** 2) for age in row if age >= 0]
        expected = np.mean([bell / bell.sum() for bell in bells], axis=0)
        np.testing.assert_allclose(label, expected, atol=1e-6)
    one_hot = finetune.mean_label(jnp.asarray(ages), partial(age_distribution, sigma=0))
    np.testing.assert_allclose(one_hot[0, [30, 50]], [2 / 3, 1 / 3], rtol=1e-6)


def test_step_learns_from_all_ages_of_a_batch_that_has_them():
    batch = make_batch() | {"gender": np.full(16, -1, np.int32), "race": np.full(16, -1, np.int32)}
    alone = np.stack([batch["age"], np.full(16, -1)], axis=1).astype(np.int32)
    other = np.where(alone < 0, 116 - batch["age"][:, None], alone)
    state, step = age_step("mse", SGD, mixup_alpha=0.0)
    mae = [
        step(jax.tree.map(jnp.copy, state), batch | more)[1]["mae"]
        for more in ({}, {"ages": alone}, {"ages": other})
    ]
    assert mae[0] == mae[1]
    # All labels then have the middle of the ages as their mean, where a regression starts.
    assert mae[2] < 2 < mae[0]


def drawn_teacher(name, seed):
    """(teacher, variables) of one age loss, with weights and statistics unlike those of a start."""
    model, rng = AgeModel(Stripes(), **get_age_loss(name).head), np.random.default_rng(seed)
    start = init_variables(jax.random.key(seed), model, image_size=SIZE)
    return Teacher(model, name), jax.tree.map(
        lambda x: np.asarray(x + rng.uniform(0, 0.5, x.shape), np.float32), start
    )


def age_outputs(variables, views, *, train):
    """Those of a model on `Stripes`, in NumPy: BatchNorm by the batch, or by what it keeps."""
    backbone, head = variables["params"]["backbone"], variables["params"]["head"]
    kept, rows = variables["batch_stats"]["backbone"]["norm"], views.mean((2, 3))
    mean, var = (rows.mean(0), rows.var(0)) if train else (kept["mean"], kept["var"])
    x = (rows - mean) / np.sqrt(var + 1e-5) * backbone["norm"]["scale"] + backbone["norm"]["bias"]
    x = x @ backbone["mix"]["kernel"] + backbone["mix"]["bias"]
    x = np.tanh(x @ head["hidden"]["kernel"] + head["hidden"]["bias"])
    return x @ head["age"]["kernel"] + head["age"]["bias"]


def softmax(logits):
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


@pytest.mark.parametrize("names", [(), ("kl_l1", "mse")], ids=["alone", "taught"])
def test_label_is_mixed_with_what_teachers_say_of_the_same_views(names):
    # NumPy tells the loss and a gradient; from JAX it has the random shares of mixup alone.
    years, batch = np.arange(117), make_batch()
    state, step = age_step("kl_l1", SGD)
    student = jax.device_get(state.eval_variables)
    share = jax.random.split(jax.random.fold_in(state.rng, 0), 3)[1]
    share = np.asarray(jax.random.beta(share, 0.2, 0.2, (16,)), np.float64)[:, None]
    views = np.asarray(plain_view(None, batch["image"]), np.float64)
    blended = share[..., None, None] * views + (1 - share[..., None, None]) * views[::-1]
    label = softmax(-0.5 * ((years - batch["age"][:, None]) / 2.0) ** 2)
    label = share * label + (1 - share) * label[::-1]
    of_years = share[:, 0] * batch["age"] + (1 - share[:, 0]) * batch["age"][::-1]
    teachers, weights = zip(*map(drawn_teacher, names, (1, 2)), strict=True) if names else ((), ())
    if names:  # in the answers BatchNorm has its statistics: none depends on the other faces
        logits, regressed = (age_outputs(each, blended, train=False) for each in weights)
        age = np.clip(58 * (1 + regressed), 0, 116)
        answers = [softmax(logits), np.maximum(0, 1 - np.abs(years - age))]
        assert all(np.abs(answer - label).sum(1).min() > 0.1 for answer in answers)
        label = 0.7 * label + 0.3 * np.mean(answers, axis=0)
    p = softmax(age_outputs(student, blended, train=True))
    off = (p - label) @ years
    entropy = -np.sum(label * np.log(np.where(label > 0, label, 1)), axis=1)
    loss = np.mean(-np.sum(label * np.log(p), axis=1) - entropy + np.abs(off))
    gradient = np.mean(
        p - label + np.sign(off)[:, None] * p * (years - (p @ years)[:, None]), axis=0
    )

    mesh = make_mesh(8)  # every device has the teachers whole and a part of the faces
    told = {"teachers": teachers, "teacher_variables": replicate(weights, mesh)}
    told = told | {"teacher_weight": 0.3} if names else {}
    after, metrics = step(replicate(state, mesh), shard_batch(batch, mesh), **told)
    assert metrics["loss"] == pytest.approx(loss, rel=2e-5)
    moved = student["params"]["head"]["age"]["bias"] - after.params["head"]["age"]["bias"]
    np.testing.assert_allclose(moved, gradient, atol=2e-5)
    # The error in years stays that against the ages of the faces.
    assert metrics["mae"] == pytest.approx(np.mean(np.abs(p @ years - of_years)), rel=2e-5)


@pytest.mark.parametrize("name", ["coral", "mse"])
def test_finetune_step_learns_with_other_heads(name):
    state, step = age_step(name, optax.adam(0.02), mixup_alpha=0.0)
    batch = make_batch()
    errors = []
    for _ in range(60):
        state, metrics = step(state, batch)
        errors.append(float(metrics["mae"]))
    assert np.mean(errors[-5:]) < 0.6 * np.mean(errors[:5])


def test_step_refuses_a_head_made_for_another_loss():
    state, step = age_step("kl_l1", SGD)
    with pytest.raises(ValueError, match="'coral' needs a head with 116 outputs"):
        jax.eval_shape(partial(step, loss_name="coral"), state, make_batch())


def test_class_weights_scale_the_loss_of_each_class():
    weights = (0.5, 3.0)
    label = jnp.array([0, 1, -1, 1])
    rows = finetune.class_labels(label, 2, weights=weights)
    logits = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
    log_p = np.asarray(jax.nn.log_softmax(logits))
    expected = [-0.5 * log_p[0, 0], -3 * log_p[1, 1], 0, -3 * log_p[3, 1]]
    np.testing.assert_allclose(cross_entropy(logits, rows), expected, rtol=1e-5)
    np.testing.assert_array_equal(finetune.class_labels(label, 2), jax.nn.one_hot(label, 2))


def test_moving_average_follows_the_parameters():
    state, _ = run_steps(FINETUNE, 1, steps=1, tx=SGD)
    start = jax.device_get(
        init_variables(jax.random.key(0), FINETUNE[0], image_size=SIZE)["params"]
    )
    # Step 0 has decay min(0.9, 1/10).
    expected = jax.tree.map(lambda a, b: 0.1 * a + 0.9 * b, start, state.params)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(state.ema_params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_moving_average_warms_up_to_the_one_asked_for_and_is_evaluated():
    tx, one = optax.sgd(0.1), {"w": jnp.ones(())}
    state = create_train_state(jax.random.key(0), {"params": one, "batch_stats": {}}, tx, ema=True)
    # The weight is 0.9 and 0.8; the decay min(0.15, 1/10) and min(0.15, 2/11).
    for expected in (0.1 * 1 + 0.9 * 0.9, 0.15 * 0.91 + 0.85 * 0.8):
        state = apply_gradients(state, one, {}, tx=tx, ema=0.15)
        assert state.eval_variables["params"]["w"] == pytest.approx(expected)
    assert state.params["w"] == pytest.approx(0.8)
    assert state.replace(ema_params=None).eval_variables["params"] is state.params


class Plain(nn.Module):
    """A linear layer: nothing in it looks at other images, as BatchNorm does."""

    @nn.compact
    def __call__(self, x, *, train):
        return nn.Dense(8, use_bias=False)(x.reshape(len(x), -1))


def whole_image(rng, images):
    return images.astype(jnp.float32) / 255


@pytest.mark.parametrize(
    ("method", "equal", "atol"),
    # DINO's sharp teacher makes large gradients of large logits.
    [(SimSiam(), True, 1e-6), (DINO(), True, 1e-4), (SimCLR(), False, 1e-6)],
)
def test_accumulated_gradients_are_those_of_the_batch_only_for_losses_of_single_images(
    method, equal, atol
):
    head = DINOHead(layers=1, bottleneck=4, out=8) if method == DINO() else Plain()
    model = SiameseModel(Plain(), head, Plain())
    step = partial(pretrain_train_step, model=model, view=whole_image, method=method, total_steps=9)
    learned = []
    for parts, devices in ((1, 1), (4, 2)):
        mesh = make_mesh(devices)
        variables = init_variables(jax.random.key(0), model, image_size=40)
        options = {"ema": method.serves_target, "extra": first_extra(method, variables, width=8)}
        state = create_train_state(jax.random.key(1), variables, SGD, **options)
        state = replicate(state, mesh)
        state, _ = step(state, shard_batch(make_batch(), mesh), tx=SGD, accumulate=parts)
        kernel = state.params["backbone"]["Dense_0"]["kernel"]
        center = (state.extra or {}).get("memory", {}).get("center", jnp.zeros(8))
        learned.append(np.concatenate([np.ravel(kernel), center]))
    assert np.allclose(*learned, atol=atol) == equal


class Dropping(nn.Module):
    """A backbone that is one path, which is dropped for some images."""

    drop_path: float

    @nn.compact
    def __call__(self, images, *, train):
        return DropPath(self.drop_path)(images.reshape(len(images), -1)[:, :8], train)


class Counting(BYOL):
    """Counts the views of which each of the two networks has dropped all."""

    def loss(self, online, target, *, age, memory):
        loss, _, memory = super().loss(online, target, age=age, memory=memory)
        both = {"online": online["z"], "target": target["z"]}
        return loss, {name: jnp.sum(jnp.all(z == 0, axis=1)) for name, z in both.items()}, memory


def test_no_path_is_dropped_in_the_network_that_gives_the_targets():
    model, method = SiameseModel(Dropping(0.9), None, Plain()), Counting()
    variables = init_variables(jax.random.key(0), model, image_size=40)
    extra = first_extra(method, variables, width=8)
    state = create_train_state(jax.random.key(1), variables, SGD, extra=extra)
    _, dropped = pretrain_train_step(
        state, make_batch(), model=model, tx=SGD, method=method, view=whole_image, total_steps=9
    )
    assert dropped["online"] > 20 and dropped["target"] == 0  # of 32 views


@pytest.mark.parametrize("name", METHODS)
def test_step_of_every_method_gives_a_state_of_the_same_shape_and_finite_metrics(name):
    config = load_config(f"pretrain:atto,drawn,{name}")
    config.projection.hidden = 16
    model, method = create_siamese(config, Plain()), create_method(config)
    variables = init_variables(jax.random.key(0), model, image_size=40)
    extra = first_extra(method, variables, width=config.projection.out)
    options = {"ema": method.serves_target, "extra": extra}
    state = create_train_state(jax.random.key(1), variables, SGD, **options)
    before = jax.eval_shape(lambda: state)
    state, metrics = pretrain_train_step(
        state, make_batch(), model=model, tx=SGD, method=method, view=whole_image, total_steps=9
    )
    assert jax.eval_shape(lambda: state) == before
    assert all(np.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize(
    ("batch", "parts", "message"),
    [
        (1, 1, "leaves one image to compare with no other"),
        (32, 32, "leaves one image to compare with no other"),
        (32, 3, "does not divide into accumulate=3 parts"),
        (32, 0, "does not divide into accumulate=0 parts"),
        (32, 16, None),
    ],
)
def test_parts_of_a_batch_hold_images_to_compare(batch, parts, message):
    config = load_config("pretrain:atto,drawn,byol")
    config.batch_size, config.accumulate = batch, parts
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        check_accumulation(config, 1)


def test_batch_that_does_not_fit_the_devices_is_refused():
    with pytest.raises(ValueError, match="batch_size 100 is not divisible by 8 devices"):
        check_batch_size(100, make_mesh(8))
