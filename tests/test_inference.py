"""Probabilities averaged over views, against each view on its own; what is refused."""

import jax
import numpy as np
import pytest

from coatnet_jax import augment, inference
from coatnet_jax.config import load_config
from coatnet_jax.inference import build_model, check_sides, random_run


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


@pytest.mark.parametrize("sides", [(), (0.0,), (1.0, 1.1)])
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
