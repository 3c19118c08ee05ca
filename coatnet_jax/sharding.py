"""One mesh axis over all devices: batches are split over it, the train state is on every device.

Under `jax.jit` over global arrays BatchNorm statistics and the contrastive loss are over the global
batch as they stand, so the steps hold no axis names and no explicit communication.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(devices: int | None = None) -> Mesh:
    """Mesh with the single axis 'data' over the first `devices` devices (default: all)."""
    count = devices or jax.device_count()
    # Auto: the default, Explicit, rejects reshapes and `z @ z.T` over the split axis.
    return jax.make_mesh(
        (count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count]
    )


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raise ValueError where the global batch cannot be split evenly over the devices."""
    if batch_size % mesh.size:
        near = max(mesh.size, round(batch_size / mesh.size) * mesh.size)
        raise ValueError(
            f"batch_size {batch_size} is not divisible by {mesh.size} devices; "
            f"--config.batch_size={near} is"
        )


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch as global arrays split over the mesh's 'data' axis."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return {
        key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()
    }


def split_over(value: np.ndarray, mesh: Mesh) -> jax.Array:
    """An array that every process holds whole, as a global one split over the 'data' axis."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return jax.make_array_from_callback(value.shape, sharding, lambda part: value[part])


def gather(array: jax.Array) -> np.ndarray:
    """A global array as NumPy, whole in every process."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def replicate(tree, mesh: Mesh):
    """The tree with every leaf on all devices of the mesh; every process gives the same values."""
    sharding = NamedSharding(mesh, PartitionSpec())
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.jit(lambda x: x, out_shardings=sharding)(tree)
