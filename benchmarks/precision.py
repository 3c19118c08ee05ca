"""How far float32 as the device rounds it, bfloat16 and cuDNN's attention are from exact float32.

    python benchmarks/precision.py --models coatnet_0 --image-size 256

A training step's features and gradients with random weights, against float32 products of the
highest precision on the same device: the norm of the difference over the norm. A GPU rounds the
factors of float32 products to 10 bits unless told otherwise, bfloat16 keeps 7. Gradients are those
of the mean over the images of a random projection of the features.
"""

import argparse

import jax
import jax.numpy as jnp

from coatnet_jax.models import create_backbone
from coatnet_jax.pages import markdown_table
from coatnet_jax.runtime import set_up

EXACT = ("float32", "xla", "highest")
OTHERS = {
    "float32": ("float32", "xla", "default"),
    "bfloat16": ("bfloat16", "xla", "default"),
    "bfloat16, cuDNN attention": ("bfloat16", "cudnn", "default"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["coatnet_0"])
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    arguments = parser.parse_args()
    set_up()
    print(f"{jax.devices()[0].device_kind}, {arguments.image_size} px, batch {arguments.batch}\n")
    rows = []
    for name in arguments.models:
        exact = outputs(name, EXACT, arguments)
        for label, setting in OTHERS.items():
            if setting[1] == "cudnn" and jax.default_backend() != "gpu":
                continue
            features, gradients = (
                distance(ours, theirs)
                for ours, theirs in zip(outputs(name, setting, arguments), exact, strict=True)
            )
            rows.append(
                {
                    "model": name,
                    "computed in": label,
                    "features": f"{features:.1e}",
                    "gradients": f"{gradients:.1e}",
                }
            )
    print(markdown_table(rows))


def outputs(name: str, setting: tuple[str, str, str], arguments) -> tuple[dict, dict]:
    """Features and gradients of the parameters, the same weights and images for every setting."""
    dtype, attention, precision = setting
    model = create_backbone(name, dtype=dtype, attention=attention)
    size = arguments.image_size
    images = jax.random.normal(jax.random.key(0), (arguments.batch, size, size, 3))
    weights = create_backbone(name)  # of the plain attention: cuDNN's has no say in the weights
    variables = jax.jit(lambda: weights.init(jax.random.key(1), images[:1], train=False))()

    @jax.jit
    def step(params):
        def loss_fn(params):
            these = {**variables, "params": params}
            features, _ = model.apply(these, images, train=True, mutable=["batch_stats"])
            towards = jax.random.normal(jax.random.key(2), features.shape)
            return (features * towards).sum() / len(features), features

        gradients, features = jax.grad(loss_fn, has_aux=True)(params)
        return features, gradients

    with jax.default_matmul_precision(precision):
        features, gradients = step(variables["params"])
    return {"features": features}, gradients


def distance(ours: dict, theirs: dict) -> float:
    """Norm of the difference of two trees of arrays over the norm of the second."""
    squares = [
        [jnp.square(a.astype(jnp.float32)).sum() for a in jax.tree.leaves(tree)]
        for tree in (jax.tree.map(jnp.subtract, ours, theirs), theirs)
    ]
    return float(jnp.sqrt(sum(squares[0]) / sum(squares[1])))


if __name__ == "__main__":
    main()
