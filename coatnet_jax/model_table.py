"""The table of backbones: parameters, multiply-accumulates, feature width and source of each."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from coatnet_jax.macs import count_macs
from coatnet_jax.models import BACKBONES, create_backbone, source
from coatnet_jax.pages import markdown_table


def run(names: Sequence[str] = (), *, image_size: int = 224) -> None:
    """Prints the table of these backbones, or of all; see `describe` for its columns.

    Of all of them, one that cannot take this image size keeps its row, with the reason below.
    Raises ValueError for an unknown name and where none can take the size.
    """
    rows, reasons = [], []
    for name in names or BACKBONES:
        create_backbone(name)  # an unknown name is wrong at every image size
        try:
            rows.append(describe(name, image_size=image_size))
        except ValueError as error:
            rows.append({"name": name, "source": source(name)})
            reasons.append(f"{name}: {error}")
    if len(reasons) == len(rows):
        raise ValueError(reasons[0])
    columns = list(max(rows, key=len))
    print(markdown_table([{column: row.get(column) for column in columns} for row in rows]))
    print(f"\nParameters of the backbone alone; multiply-adds of an image of {image_size} px.")
    print("\n".join(reasons))


def describe(name: str, *, image_size: int) -> dict[str, Any]:
    """A row: parameters in millions, multiply-adds in billions, width of the features, source.

    Nothing is computed or compiled. Raises ValueError where the backbone cannot take the size.
    """
    backbone = create_backbone(name)
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    # Drawing the parameters has nothing to do with the images and counts nothing.
    init = partial(backbone.init_with_output, jax.random.key(0), train=False)
    macs, (features, variables) = count_macs(init, images)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    return {
        "name": name,
        "parameters, M": parameters / 1e6,
        "multiply-adds, G": macs / 1e9,
        "features": features.shape[-1],
        "source": source(name),
    }
