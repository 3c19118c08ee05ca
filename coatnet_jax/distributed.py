"""One training in several processes, on one machine or many: how they find each other and agree.

Every process runs the same command and holds its share of the devices and of each batch. Process 0
is the one that prints and writes; all of them save the checkpoint, to a folder that all can see.
"""

import os
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils


def start(spec: str) -> None:
    """Join the processes that `config.distributed` names; nothing for ''.

    'auto' asks the cluster (TPU pod, SLURM, Open MPI, Kubernetes); `HOST:PORT,PROCESSES,INDEX`
    names the address of process 0, how many there are and which one this is. To be called before
    anything is computed. Other processes than 0 are silent from then on, but for their errors.
    Raises ValueError for anything else, or where no cluster is found.
    """
    if not spec:
        return
    options = {} if spec == "auto" else _parse(spec)
    try:
        jax.distributed.initialize(**options)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"config.distributed={spec} could not be started ({str(error).splitlines()[0][:200]}); "
            "without a cluster that JAX knows give HOST:PORT,PROCESSES,INDEX to each process"
        ) from None
    if jax.default_backend() == "cpu":
        # XLA crashes where it writes down what it compiled for several CPU devices.
        jax.config.update("jax_enable_compilation_cache", False)
    any_process(False)  # connected now, while all are here: later some may keep others waiting
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # open to the end


def _parse(spec: str) -> dict:
    parts = spec.split(",")
    numbers = [int(part) for part in parts[1:] if part.isdigit()]
    if len(parts) != 3 or len(numbers) != 2 or ":" not in parts[0] or numbers[1] >= numbers[0]:
        raise ValueError(
            f"config.distributed={spec}: give auto, or HOST:PORT,PROCESSES,INDEX with an index "
            "from 0, as in 10.0.0.1:1234,2,0 and 10.0.0.1:1234,2,1"
        )
    names = ("num_processes", "process_id")
    return {"coordinator_address": parts[0], **dict(zip(names, numbers, strict=True))}


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether `flag` holds in any process. All have to ask, and wait for each other."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())
