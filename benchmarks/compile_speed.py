"""Seconds to compile a model's training step on the CPU, with loops unrolled as XLA has it and
rolled as the command line sets it.

    python benchmarks/compile_speed.py                    # coatnet_0, 224 px, batch 16

Every compilation is a process of its own and nothing is read from the disk; blocks one by one and
scanned, with both settings in turns, medians.
"""

import argparse
import os
import statistics

from model_speed import Ours, Process

from coatnet_jax.pages import markdown_table
from coatnet_jax.xla_flags import EXTRA_OPTIONS, ROLLED_LOOPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="coatnet_0")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model, size, batch = arguments.model, arguments.image_size, arguments.batch
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    # One that means nothing keeps the other away: it is not set beside options that are there.
    loops = {"unrolled": "xla_none", "rolled": ROLLED_LOOPS}
    ways = {"one by one": {}, "scanned": {"scan": True}}
    seconds = {(blocks, kind): [] for blocks in ways for kind in loops}
    for number in range(arguments.rounds):
        for (blocks, kind), taken in seconds.items():
            os.environ["XLA_FLAGS"] = f"--{EXTRA_OPTIONS}={loops[kind]}"
            process = Process(Ours, model, size, batch, "float32", ways[blocks])
            process.wait()
            process.close()
            taken.append(process.compile_seconds["train"])
            print(f"{number + 1}: {blocks}, {kind}: {taken[-1]:.1f} s", flush=True)
    rows = []
    for blocks in ways:
        medians = {kind: statistics.median(seconds[blocks, kind]) for kind in loops}
        row = {kind: f"{median:.1f} s" for kind, median in medians.items()}
        ratio = medians["unrolled"] / medians["rolled"]
        rows.append({"blocks": blocks, **row, "ratio": f"{ratio:.2f}"})
    print(f"\n{model}, {size} px, batch {batch}: a training step, medians of {arguments.rounds}\n")
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
