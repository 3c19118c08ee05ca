"""Where the memory of the device runs out: an error in one line that says how to mend it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ml_collections

from input_pipeline.errors import first_line


@contextmanager
def exhaustion_explained(mend: Callable[[], str]) -> Iterator[None]:
    """Turn JAX's error where the memory is exhausted into a ValueError that ends with `mend()`."""
    try:
        yield
    except RuntimeError as error:  # of which JAX's own is a subclass
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        import jax

        device = jax.devices()[0].device_kind
        raise ValueError(
            f"the memory of the device ({device}) ran out ({first_line(error)}): {mend()}"
        ) from error


def more_memory() -> str:
    """Where a command that has no batch of its own to make smaller can find memory."""
    import jax

    if jax.default_backend() == "cpu":
        return "end other programs that hold some of it"
    return (
        "end what else holds it (another command or notebook; on an NVIDIA GPU nvidia-smi names "
        "it), or compute on the CPU: put JAX_PLATFORMS=cpu before the command"
    )


def less_memory(
    config: ml_collections.ConfigDict, workdir: Path, *, other_folder: bool = False
) -> str:
    """What lets a training do with less; with a new folder where it cannot go on in its own.

    `other_folder`: where that is so before there is a checkpoint.
    """
    from coatnet_jax.checkpoint import has_checkpoint
    from coatnet_jax.models import has_option

    ways = []
    if has_option(config.model.name, "remat") and not config.model.get("remat", False):
        ways.append("give --config.model.remat=True (the same result, in more time)")
    ways.append(f"lower --config.batch_size ({config.batch_size} now)")
    if "accumulate" in config:
        ways.append(
            f"give --config.accumulate={2 * config.accumulate} (images are then compared within "
            "a part of the batch alone)"
        )
    advice = " or ".join(ways)
    if has_checkpoint(workdir):
        return (
            f"{advice}, in a new --workdir; the last checkpoint in {workdir} is kept, and the same "
            "command goes on from it, with the same batch, where more memory is free"
        )
    return f"{advice}, in a new --workdir" if other_folder else advice
