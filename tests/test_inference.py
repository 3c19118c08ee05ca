"""Probabilities averaged over views, against each view on its own; what is refused."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from coatnet_jax import augment, inference
from coatnet_jax.checkpoint import save_variables
from coatnet_jax.config import load_config, save_config
from coatnet_jax.inference import build_model, check_sides, load_run, normalisation, random_run
from coatnet_jax.teachers import open_teachers


@pytest.fixture(scope="module", autouse=True)
def quick_compiles(small_atto):
    small_atto(inference)


@pytest.mark.parametrize("flip", [False, True])
def test_probabilities_are_the_mean_over_centres_and_mirror_images(flip):
    config = load_config("finetune:atto,drawn,tiny")
    config.model.image_size = 32
    config.eval_sides = (1.0, 0.75)
    run = random_run(config, batch_size=8)
    images = np.random.default_rng(0).integers(0, 256, (5, 40, 40, 3)).astype(np.uint8)
    model = build_model(config)
    apply = jax.jit(
        lambda views: jax.nn.softmax(model.apply(run.variables, views, train=False)["age"])
    )
    expected = []
    for cut in (images, images[:, 5:35, 5:35]):
        views = augment.eval_view(cut, size=32)
        expected.append(apply(views))
        if flip:
            expected.append(apply(views[:, :, ::-1]))
    assert len(expected) == 2 * (1 + flip)
    found = run.probabilities(images, flip=flip)
    np.testing.assert_allclose(found, np.mean(expected, axis=0), atol=2e-6)
    assert np.abs(found - expected[0]).max() > 1e-5  # else the mean would prove nothing


def test_a_run_that_trained_with_cudnns_attention_is_of_use_on_every_device(tmp_path):
    config = load_config("finetune:atto,drawn,tiny")
    config.model.image_size = 32
    config.eval_sides = (1.0, 0.75)
    plain = random_run(config.copy_and_resolve_references(), batch_size=8)
    config.model.attention = "cudnn"
    save_variables(tmp_path, jax.device_get(plain.variables))
    save_config(config, tmp_path / "config.json")
    images = np.random.default_rng(0).integers(0, 256, (5, 40, 40, 3)).astype(np.uint8)
    run = load_run(tmp_path, batch_size=8)
    found = run.probabilities(images, flip=False)
    np.testing.assert_array_equal(found, plain.probabilities(images, flip=False))

    config.distill.teachers = str(tmp_path)
    ((teacher,), _) = open_teachers(config)
    assert teacher.model.backbone.attention == "xla"


def test_attributes_are_two_genders_then_five_races(monkeypatch):
    class Colours(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            mean = images.mean((1, 2))
            return {name: nn.Dense(n, name=name)(mean) for name, n in (("gender", 2), ("race", 5))}

    monkeypatch.setattr(inference, "build_model", lambda config: Colours())
    config = load_config("finetune:atto,drawn,tiny")
    config.model.image_size = 8
    run = random_run(config, batch_size=4)
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)
    mean = (images.mean((1, 2)) / 255 - config.model.mean) / config.model.std
    expected = []
    for head in ("gender", "race"):
        exp = np.exp(mean @ run.variables["params"][head]["kernel"])  # biases start at zero
        expected.append(exp / exp.sum(1, keepdims=True))
    found = run.attributes(images)
    np.testing.assert_allclose(found, np.hstack(expected), atol=1e-5)
    assert run.attribute_heads == ("gender", "race")
    run.config.loss.race = 0.0
    assert run.attribute_heads == ("gender",)
    run.config.stage = "pretrain"
    assert run.attribute_heads == ()


@pytest.mark.parametrize("sides", [(), (0.0,), (1.0, 1.1), ("1.0,0.9x",), (None,), None])
def test_sides_that_are_no_shares_are_refused(sides):
    with pytest.raises(ValueError, match="over 0 and at most 1, like") as error:
        check_sides(sides)
    assert "\n" not in str(error.value)


def test_runs_that_name_no_sides_see_the_whole_picture():
    config = load_config("finetune:atto,drawn,tiny")
    config.model.image_size = 32
    assert random_run(config).sides == (1.0, 0.9)
    with config.unlocked():
        del config.eval_sides
    assert random_run(config).sides == (1.0,)


def test_runs_that_name_no_mean_and_std_are_seen_with_those_of_imagenet():
    config = load_config("finetune:atto,drawn,tiny")
    with config.unlocked():
        del config.model.mean, config.model.std
    assert normalisation(config) == {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
