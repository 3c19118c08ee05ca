"""Seconds to compile a model's training step on the CPU, with glibc's cache of each thread as it
comes and as the command line sets it.

    python benchmarks/compile_speed.py                    # coatnet_0, 224 px, batch 16

XLA compiles in as many threads as there are cores. With the one arena that large arrays want they
wait for each other at every small piece of memory, unless each keeps enough of its own. Every
compilation is a process of its own and nothing is read from the disk; blocks one by one and
scanned, with both settings in turns, medians.
"""

import argparse
import os
import statistics

from model_speed import Ours, Process

from coatnet_jax.allocator import with_thread_caches
from coatnet_jax.pages import markdown_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="coatnet_0")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model, size, batch = arguments.model, arguments.image_size, arguments.batch
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    os.environ.pop("GLIBC_TUNABLES", None)
    environments = {"glibc's caches": {}, "larger caches": with_thread_caches(os.environ)}
    ways = {"one by one": {}, "scanned": {"scan": True}}
    seconds = {(blocks, caches): [] for blocks in ways for caches in environments}
    for number in range(arguments.rounds):
        for (blocks, caches), taken in seconds.items():
            contender = model, size, batch, "float32", ways[blocks]
            process = Process(Ours, *contender, environment=environments[caches])
            process.wait()
            process.close()
            taken.append(process.compile_seconds["train"])
            print(f"{number + 1}: {blocks}, {caches}: {taken[-1]:.1f} s", flush=True)
    rows = []
    for blocks in ways:
        medians = {caches: statistics.median(seconds[blocks, caches]) for caches in environments}
        before, after = medians.values()
        row = {caches: f"{median:.1f} s" for caches, median in medians.items()}
        rows.append({"blocks": blocks, **row, "ratio": f"{before / after:.2f}"})
    print(f"\n{model}, {size} px, batch {batch}: a training step, medians of {arguments.rounds}\n")
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
