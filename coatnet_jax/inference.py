"""A trained run as functions of pictures: features, age probabilities, whole splits in batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from coatnet_jax.age_losses import get_age_loss
from coatnet_jax.augment import IMAGE_MEAN, IMAGE_STD, eval_view
from coatnet_jax.config import read_config
from coatnet_jax.release_weights import is_released, load_released
from coatnet_jax.sharding import gather, make_mesh, replicate, split_over
from coatnet_jax.traced import traced_once
from input_pipeline.face_crops import GEOMETRIES, Geometry
from input_pipeline.progress import Count, say

if TYPE_CHECKING:
    from flax import linen as nn

    from coatnet_jax.heads import AgeModel
    from input_pipeline.pipeline import Faces


def build_model(config: ml_collections.ConfigDict) -> "nn.Module":
    """The model of a run's config: SiameseModel for pre-training, AgeModel for fine-tuning.

    And for weights that were imported from timm (stage 'timm') its classifier.
    """
    # Imported here: a photo's age from a traced program needs no model, and Flax with all
    # architectures takes longer to import than the face to find.
    from coatnet_jax.heads import AgeModel
    from coatnet_jax.import_timm import classifier
    from coatnet_jax.models import create_backbone
    from coatnet_jax.optim import first_trained_stage
    from coatnet_jax.ssl.methods import create_siamese

    options = {"drop_path": config.model.drop_path, "dtype": config.model.dtype}
    for name, default in (("remat", False), ("scan", False), ("attention", "xla")):
        # Left at its default, an option is not asked of the models that lack it.
        if (value := config.model.get(name, default)) != default:
            options[name] = value
    if config.stage == "timm":
        return classifier(config.model.name, classes=config.model.classes, **options)
    if config.stage == "pretrain":
        return create_siamese(config, create_backbone(config.model.name, **options))
    frozen_below = first_trained_stage(config.optim.train_from)
    backbone = create_backbone(config.model.name, frozen_below=frozen_below, **options)
    return AgeModel(backbone, **get_age_loss(config.loss.name).head)


def normalisation(config: ml_collections.ConfigDict) -> dict[str, tuple[float, ...]]:
    """`mean` and `std` of a run's views; ImageNet's where its config is older than these keys."""
    return {
        "mean": tuple(config.model.get("mean", IMAGE_MEAN)),
        "std": tuple(config.model.get("std", IMAGE_STD)),
    }


def image_format(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What a run's views look like: `size` in pixels, and `mean` and `std` of the channels."""
    return {"size": config.model.image_size, **normalisation(config)}


def check_sides(sides: Sequence[float]) -> tuple[float, ...]:
    """`sides` as a tuple; ValueError unless there are some, all over 0 and at most 1."""
    try:
        shares = tuple(float(side) for side in sides)
    except (TypeError, ValueError):  # None or a word: a tuple that was mistyped comes as one
        shares = ()
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ValueError(
            f"eval_sides are shares of a picture's side, over 0 and at most 1, like (1.0, 0.9), "
            f"not {sides}"
        )
    return shares


def sides_of(config: ml_collections.ConfigDict) -> tuple[float, ...]:
    """The `eval_sides` of a run's config, checked; of an older one the whole picture."""
    return check_sides(config.get("eval_sides", (1.0,)))


VIEW = ("size", "mean", "std")  # static arguments of the steps, those of `image_format`


@partial(jax.jit, static_argnames=("model", *VIEW))
def features_step(
    variables: Any, images: UInt8[Array, "b h w 3"], *, model: "nn.Module", **view: Any
) -> Float[Array, "b d"]:
    """The backbone's pooled features of whole images."""
    return model.apply(variables, eval_view(images, **view), train=False)["features"]


@partial(jax.jit, static_argnames=("model", "flip", "loss_name", "sides", *VIEW))
def probabilities_step(
    variables: Any,
    images: UInt8[Array, "b h w 3"],
    *,
    model: "AgeModel",
    flip: bool,
    loss_name: str = "kl_l1",
    sides: tuple[float, ...] = (1.0,),
    **view: Any,
) -> Float[Array, "b 117"]:
    """Probabilities of the ages 0-116: the mean over the centres of the image that keep the shares
    `sides` of its side and, with `flip`, over the mirror images of these.

    `loss_name` is the age loss of the model, which says how its outputs are read.
    """
    read = get_age_loss(loss_name).probabilities
    views = [eval_view(images, side=side, **view) for side in sides]
    if flip:
        views += [view[:, :, ::-1] for view in views]
    # One batch for all, which compiles once; each image's views stay on the device that has it.
    joined = jnp.stack(views, axis=1).reshape(-1, *views[0].shape[1:])
    probabilities = read(model.apply(variables, joined, train=False)["age"])
    return probabilities.reshape(len(images), len(views), -1).mean(1)


def apply_in_batches(
    step: Callable, variables: Any, images: np.ndarray, *, batch_size: int, mesh: Mesh
) -> np.ndarray:
    """`step(variables, images)` over any number of images [n,H,W,3], as one NumPy array [n, …].

    Every call has the same shape: the last batch is padded, so the step compiles once. Several
    processes share the work of each batch; all of them give the same images and get all outputs.
    """
    batch_size = -(-batch_size // mesh.size) * mesh.size
    outputs = []
    for start in range(0, len(images), batch_size):
        chunk = images[start : start + batch_size]
        padded = np.zeros((batch_size, *images.shape[1:]), images.dtype)
        padded[: len(chunk)] = chunk
        outputs.append(gather(step(variables, split_over(padded, mesh)))[: len(chunk)])
    return np.concatenate(outputs)


def usual_batch_size() -> int:
    """Pictures, views counted, that a device sees at once: on a CPU 64, for which coatnet_0 at
    128 px takes 0.9 GiB instead of 3.5 and no longer, elsewhere 256."""
    return 64 if jax.default_backend() == "cpu" else 256


def predict_split(
    run: "Run", faces: "Faces", fn: Callable, *, done: str | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(`fn(images)` of every face in order [n, …], the faces' age, gender, race and index [n]).

    `fn` is `run.features` or `run.probabilities`; it sees batches of one shape. With `done`, a
    word like 'evaluated', it says how far it is.
    """
    # Imported here: Grain and TFDS take longer to import than a photo's face to find.
    from input_pipeline.pipeline import eval_loader

    outputs, labels = [], []
    count = Count(done or "", len(faces), f"faces of {faces.split}", progress=say if done else None)
    for batch in eval_loader(faces, batch_size=run.batch_size, image_size=run.source_size):
        real = batch["weight"] > 0
        outputs.append(fn(batch["image"])[real])
        labels.append({key: batch[key][real] for key in ("age", "gender", "race", "index")})
        count(int(real.sum()))
    joined = {key: np.concatenate([part[key] for part in labels]) for key in labels[0]}
    return np.concatenate(outputs), joined


@partial(jax.jit, static_argnames=("model", *VIEW))
def attributes_step(
    variables: Any, images: UInt8[Array, "b h w 3"], *, model: "AgeModel", **view: Any
) -> Float[Array, "b 7"]:
    """Probabilities of the two genders and the five races, side by side."""
    out = model.apply(variables, eval_view(images, **view), train=False)
    return jnp.concatenate([jax.nn.softmax(out[key]) for key in ("gender", "race")], axis=-1)


@dataclass(frozen=True)
class Run:
    """A run's model and weights; `run_dir` and `step` are None and 0 for untrained weights.

    `programs` is a folder where `probabilities` keeps what it traced, for the next process.
    """

    config: ml_collections.ConfigDict
    variables: Any
    mesh: Mesh
    run_dir: Path | None = None
    step: int = 0
    batch_size: int = field(default_factory=usual_batch_size)
    programs: Path | None = None

    @property
    def stage(self) -> str:
        """'pretrain', 'finetune', or 'timm' for imported weights."""
        return self.config.stage

    @property
    def image_size(self) -> int:
        """Side in pixels of the images that the model sees."""
        return self.config.model.image_size

    @property
    def source_size(self) -> int:
        """Side in pixels of the images to hand to `features` and `probabilities`."""
        return self.config.data.image_size

    @property
    def geometry(self) -> Geometry:
        """Where eyes and mouth lie in the crops that were trained on; ValueError if unknown."""
        name = self.config.data.get("crop", "utkface")  # runs of old do not say it
        if name not in GEOMETRIES:
            raise ValueError(
                f"data.crop is {name!r} in {self.run_dir}: known are {', '.join(GEOMETRIES)}"
            )
        return GEOMETRIES[name]

    @property
    def decode(self) -> str:
        """How ages are read from the probabilities: 'median', 'mean' or 'argmax'."""
        return self.config.loss.get("decode", "median")

    @property
    def sides(self) -> tuple[float, ...]:
        """Shares of a picture's side of the centres whose probabilities are averaged."""
        return sides_of(self.config)

    @property
    def answers_one_age(self) -> bool:
        """Whether the run's loss is a regression, whose probabilities say nothing of doubt."""
        return get_age_loss(self.config.loss.name).point

    def features(self, images: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n d"]:
        """Features of the backbone."""
        return apply_in_batches(
            self._features_step, self.variables, images, batch_size=self.batch_size, mesh=self.mesh
        )

    def probabilities(
        self, images: UInt8[np.ndarray, "n h w 3"], *, flip: bool = True
    ) -> Float[np.ndarray, "n 117"]:
        """Probabilities of the ages 0-116. Raises ValueError for a pre-training run."""
        views = len(self.sides) * (1 + flip)
        if self.programs and self.mesh.size == 1:
            key = f"probabilities {flip} {self.config.to_json(sort_keys=True)}"
            make = partial(self._probabilities_step, flip)
            step = traced_once(make, folder=self.programs, key=key)
        else:
            step = self._probabilities_step(flip)
        return apply_in_batches(
            step,
            self.variables,
            images,
            batch_size=max(1, self.batch_size // views),  # so many views are in the memory at once
            mesh=self.mesh,
        )

    @property
    def attribute_heads(self) -> tuple[str, ...]:
        """Of 'gender' and 'race' those whose heads were trained."""
        if self.stage != "finetune":
            return ()
        return tuple(key for key in ("gender", "race") if self.config.loss[key] > 0)

    def attributes(self, images: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n 7"]:
        """Probabilities of the genders (two columns) and races (five) of UTKFace's labels."""
        step = partial(attributes_step, model=build_model(self.config), **image_format(self.config))
        return apply_in_batches(
            step, self.variables, images, batch_size=self.batch_size, mesh=self.mesh
        )

    @property
    def _features_step(self) -> Callable:
        return partial(features_step, model=build_model(self.config), **image_format(self.config))

    def _probabilities_step(self, flip: bool) -> Callable:
        if self.stage != "finetune":
            raise ValueError(
                f"{self.run_dir} is a {self.stage} run, which has no age head; give the "
                "folder of a finetune run"
            )
        return partial(
            probabilities_step,
            model=build_model(self.config),
            flip=flip,
            loss_name=self.config.loss.name,
            sides=self.sides,
            **image_format(self.config),
        )


def trained_config(run_dir: Path) -> ml_collections.ConfigDict:
    """The config of a run whose weights are to be used: with the attention that every device has.

    Weights know nothing of cuDNN's, and this may be another machine or dtype than the training's.
    """
    config = read_config(run_dir / "config.json")
    config.model.attention = "xla"
    return config


def load_run(
    run_dir: Path,
    *,
    which: str = "best",
    batch_size: int | None = None,
    sides: Sequence[float] | None = None,
    programs: Path | None = None,
) -> Run:
    """A trained run: its 'best' or 'latest' checkpoint or that of a step.

    `batch_size` is `usual_batch_size` unless given, `sides` take the place of the run's own
    `eval_sides`, `programs` is as in `Run`. Raises FileNotFoundError or ValueError in one line
    where the folder holds no such run.
    """
    run_dir = Path(run_dir)
    if is_released(run_dir):
        variables, step = load_released(run_dir, which=which)
    else:
        # Imported here: Orbax takes longer to import than a released model to load.
        from coatnet_jax.checkpoint import load_variables

        variables, step = load_variables(run_dir, which=which)
    config = trained_config(run_dir)
    if sides is not None:
        config.eval_sides = check_sides(sides)
    mesh = make_mesh()
    batch_size = batch_size or usual_batch_size()
    return Run(config, replicate(variables, mesh), mesh, run_dir, step, batch_size, programs)


def random_run(config: ml_collections.ConfigDict, *, batch_size: int | None = None) -> Run:
    """The same model with untrained weights, to compare with."""
    from coatnet_jax.train_state import init_variables

    variables = init_variables(
        jax.random.key(config.seed), build_model(config), image_size=config.model.image_size
    )
    mesh = make_mesh()
    batch_size = batch_size or usual_batch_size()
    return Run(config, replicate(variables, mesh), mesh, batch_size=batch_size)
