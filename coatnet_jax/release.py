"""A fine-tuned run as a small folder to hand on; those in the package are made so.

    coatnet-jax release runs/finetune --out=coatnet_jax/released --max-mb=12

`weights.safetensors` holds the parameters in bfloat16, half of their bytes, and BatchNorm's
statistics in float32. Where that is more than `--max-mb` allows, `weights.safetensors.gz` has the
kernels in 8-bit integers, rounded as finely as fits. The model computes in float32 from then on,
whatever it was trained in: for a CPU bfloat16 is slower. Beside the weights lie config.json and
run.json without the paths of the machine, evaluation.json and conformal.json, measured with these
very weights, MODEL_CARD.md, and `training_faces.safetensors`, by which other faces are told from
those trained on (`training_set`).

Every command that takes the folder of a run takes such a folder too.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coatnet_jax import conformal, evaluate
from coatnet_jax.checkpoint import FOLDER, load_variables
from coatnet_jax.config import read_json, save_config
from coatnet_jax.inference import check_sides, sides_of, trained_config
from coatnet_jax.lineage import stages_before
from coatnet_jax.pages import write_json
from coatnet_jax.release_card import INTEGERS, release_card
from coatnet_jax.release_weights import FILE, FILES, is_released, pack_weights, save_weights
from coatnet_jax.training_set import write_record

KEPT = ("started", "parameters", "data_fingerprint", "git_revision", "python", "versions")
KEPT += ("devices", "machine", "wall_seconds", "averaged")
EVALUATION, CARD = "evaluation.json", "MODEL_CARD.md"
NAMES = ("config.json", "run.json", EVALUATION, conformal.FILE, CARD)  # beside the weights
WANTED = ("parameters", "data_fingerprint", "git_revision", "devices")  # by the card


def write_release(
    run_dir: Path,
    data_folder: Path,
    out: Path,
    *,
    sides: Sequence[float] | None = None,
    max_mb: float | None = None,
) -> dict[str, Any]:
    """Write the best checkpoint of a run to `out` and evaluate what was written on the test split,
    and on the other sets that the run was evaluated on.

    `sides` take the place of the run's own `eval_sides`; choose them on the validation split.
    `max_mb` is how many million bytes the weights may take. Gives back the evaluation, whose report
    goes to `<run_dir>/released`. Raises ValueError for a run without an age head or one whose
    `init_from` is gone, where `out` is the report's folder or holds a run or other files of these
    names, or the weights take more than `max_mb`, and what `evaluate.run` raises; a release that
    was in `out` is replaced when all is done, not before.
    """
    run_dir, data_folder, out = Path(run_dir), Path(data_folder), Path(out)
    variables, step = load_variables(run_dir)
    config = trained_config(run_dir)
    if config.stage != "finetune":
        raise ValueError(
            f"{run_dir} is a {config.stage} run without an age head; release a finetune run"
        )
    if max_mb is not None and not max_mb > 0:
        raise ValueError(f"--max-mb is a size in million bytes, over 0, not {max_mb}")
    if sides is not None:
        config.eval_sides = check_sides(sides)
    told = read_json(run_dir / "run.json", wants=WANTED)
    before = stages_before(run_dir)
    released = {"step": step, "which": "best", "flip": True}
    released |= {"sides": list(sides_of(config)), "decode": config.loss.get("decode", "median")}
    others = _other_sets(run_dir, released, data_folder)
    if out.resolve() == run_dir.resolve() or (out / FOLDER).is_dir():
        raise ValueError(f"{out} is the folder of a run, which this would ruin; give another --out")
    report = run_dir / "released"
    if out.resolve() == report.resolve():
        raise ValueError(
            f"{out} is where the report on the release goes, which names every face; give another "
            "--out"
        )
    foreign = [] if is_released(out) else [name for name in NAMES if (out / name).exists()]
    if foreign:
        raise ValueError(
            f"{out} holds {', '.join(foreign)} of something else than a release, which this would "
            "replace; give another --out"
        )
    packed = pack_weights(variables, step=step, max_mb=max_mb)
    config.model.dtype = "float32"
    config.data.root, config.init_from, config.init_head = "", "", False
    if "distill" in config:
        config.distill.teachers = ""
    run = {key: told[key] for key in KEPT if key in told} | {"before": before, "step": step}
    run["finished"] = told.get("finished", is_released(run_dir))
    # What was rounded to integers once does not become finer.
    integers = packed.name != FILE or told.get("kept_in") == INTEGERS
    run["kept_in"] = INTEGERS if integers else "bfloat16"
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".release-") as scratch:
        new = Path(scratch) / out.name
        new.mkdir()
        write_record(new, run_dir, data_folder, config.data.splits)
        save_weights(new, packed)
        save_config(config, new / "config.json")
        write_json(new / "run.json", run)
        # The page outlives the scratch folder, so it names the one to come.
        result = evaluate.run(new, data_folder, out=report, show_faces=False, called=out)
        measured = {key: value for key, value in result.items() if key not in ("run", "data")}
        command = f"coatnet-jax release {run_dir.name}"
        measured["environment"] = {**result["environment"], "command": command}
        write_json(new / EVALUATION, measured)
        others = [_again(new, other, data_folder, report, called=out) for other in others]
        card = release_card(config, run, measured, others)
        (new / CARD).write_text(card, encoding="utf-8")
        out.mkdir(exist_ok=True)
        for name in {*FILES, conformal.FILE} - {path.name for path in new.iterdir()}:
            (out / name).unlink(missing_ok=True)  # of what was there before
        for path in new.iterdir():
            path.replace(out / path.name)
    size = len(packed.data) / 1e6
    print(f"released to {out}: {packed.name} ({size:.1f} MB), {CARD}, {EVALUATION}")
    return result


def _again(
    new: Path, other: Mapping[str, Any], data_folder: Path, report: Path, *, called: Path
) -> dict[str, Any]:
    """An evaluation on another set made once more, with the weights that are released."""
    name, split = other["data_name"], other["split"]
    return evaluate.run(
        new,
        data_folder.with_name(name),
        training_folder=data_folder,
        split=split,
        splits=other["splits"],
        out=report / f"{name}-{split}",
        show_faces=False,
        called=called,
    )


def _other_sets(
    run_dir: Path, released: Mapping[str, Any], data_folder: Path
) -> list[dict[str, Any]]:
    """The run's evaluations on sets that it was not trained on; those made in another way than
    what is `released` (its step, flip, sides, …), or whose set is not beside `data_folder` any
    more, are named and left out."""
    results = []
    for path in sorted(run_dir.glob("evaluate/*/metrics.json")):
        result = read_json(path, wants=("trained_on", "step", "data_name"))
        if result["trained_on"]["same_data"]:
            continue
        other = [
            f"{key} {result[key]}, the release {value}"
            for key, value in released.items()
            if result.get(key, value) != value
        ]
        folder = data_folder.with_name(result["data_name"])
        if other:
            print(
                f"{path.parent} has {'; '.join(other)}: left out of the card; evaluate again to "
                "have it there"
            )
        elif not folder.is_dir():
            print(f"{folder} is missing: {path.parent} is left out of the card")
        else:
            results.append(result)
    return results
