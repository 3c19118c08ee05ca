"""What rounding a run's weights costs: the error and how far ages move, for files of several sizes.

    python benchmarks/rounding.py runs/finetune --mb 12 10

The faces are those of the run's validation split, as `evaluate` shows them. Sizes are rounded to as
`coatnet-jax release --max-mb` does, in turn; `alike` are 8-bit integers of the first size whose
steps are one share of the root mean square in every kernel, however large it is.
"""

import argparse
import tempfile
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from coatnet_jax.ages import get_decoder
from coatnet_jax.inference import load_run
from coatnet_jax.metrics import mae
from coatnet_jax.pages import markdown_table
from coatnet_jax.paths import data_folder
from coatnet_jax.quantise import quantise
from coatnet_jax.release_weights import (
    FILES,
    Packed,
    finest,
    load_released,
    pack_weights,
    save_weights,
)
from coatnet_jax.runtime import set_up
from coatnet_jax.weight_files import weights_data
from input_pipeline.pipeline import decode_once, evenly_spread, open_split


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="fine-tuning run")
    parser.add_argument("--mb", type=float, nargs="+", default=[12.0, 10.0], help="sizes")
    parser.add_argument("--limit", type=int, default=10**9, help="faces, evenly picked")
    arguments = parser.parse_args()
    set_up()
    run = load_run(arguments.run_dir, batch_size=64)
    run.config.model.dtype = "float32"
    data = run.config.data
    faces = open_split(data_folder(data.name, data.root), "validation", splits=data.splits)
    faces = faces.take(evenly_spread(len(faces), arguments.limit))
    faces = decode_once(faces, run.source_size)
    exact = {kind: run.variables[kind] for kind in ("params", "batch_stats")}
    versions = {"as they are": exact, "alike": unpacked(alike(exact, arguments.mb[0]))}
    for mb in arguments.mb:
        versions[f"{mb:g} MB"] = unpacked(pack_weights(exact, step=0, max_mb=mb))
    rows, answers = [], {}
    for name, version in versions.items():
        probabilities = replace(run, variables=version).probabilities(faces.pixels)
        answers[name] = get_decoder(run.decode)(probabilities)
        moved = np.abs(answers[name] - answers["as they are"])
        rows.append(
            {
                "weights": name,
                "MAE, years": f"{mae(faces.labels['age'], answers[name]):.3f}",
                "an age moves by, mean": f"{moved.mean():.3f}",
                "largest": f"{moved.max():.2f}",
            }
        )
        print(rows[-1], flush=True)
    print(f"\n{len(faces)} faces:\n\n{markdown_table(rows)}")


def alike(variables: Mapping[str, Any], mb: float) -> Packed:
    """Weights with steps of one share of the root mean square, as fine as this size lets."""
    arrays = {name: np.asarray(x) for name, x in flatten_dict(variables, sep="/").items()}

    def integers(share: float) -> bytes:
        parts = [quantise({k: v}, share / v.size**0.5) for k, v in arrays.items()]
        return weights_data(dict(ChainMap(*parts)), metadata={"step": "0"}, compressed=True)

    return Packed(FILES[1], finest(integers, coarsest=1.0, max_mb=mb))


def unpacked(packed: Packed) -> dict[str, Any]:
    """The variables that are read from a file of it."""
    with tempfile.TemporaryDirectory() as folder:
        save_weights(Path(folder), packed)
        return load_released(Path(folder))[0]


if __name__ == "__main__":
    main()
