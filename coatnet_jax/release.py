"""A fine-tuned run as a small folder to hand on; the one in the package is made so.

    coatnet-jax release runs/finetune --out=coatnet_jax/released

`weights.safetensors` holds the parameters in bfloat16, half of their bytes, and BatchNorm's
statistics in float32. Beside it lie config.json and run.json without the paths of the machine,
evaluation.json and conformal.json, measured with these very weights, and MODEL_CARD.md. Every
command that takes the folder of a run takes such a folder too.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coatnet_jax import evaluate
from coatnet_jax.checkpoint import load_variables
from coatnet_jax.config import read_config, save_config
from coatnet_jax.inference import check_sides
from coatnet_jax.pages import write_json
from coatnet_jax.release_card import release_card
from coatnet_jax.release_weights import FILE, save_weights

KEPT = ("started", "parameters", "data_fingerprint", "git_revision", "python", "versions")
KEPT += ("devices", "machine", "wall_seconds", "step")


def write_release(
    run_dir: Path, data_folder: Path, out: Path, *, sides: Sequence[float] | None = None
) -> dict[str, Any]:
    """Write the best checkpoint of a run to `out` and evaluate what was written on the test split.

    `sides` take the place of the run's own `eval_sides`; choose them on the validation split.
    Gives back the evaluation, whose report goes to `<run_dir>/released`. Raises ValueError for a
    run without an age head or one whose `init_from` is gone, and what `evaluate.run` raises.
    """
    run_dir, out = Path(run_dir), Path(out)
    variables, step = load_variables(run_dir)
    config = read_config(run_dir / "config.json")
    if config.stage != "finetune":
        raise ValueError(
            f"{run_dir} is a {config.stage} run without an age head; release a finetune run"
        )
    if sides is not None:
        config.eval_sides = check_sides(sides)
    before = _stages_before(config.init_from)
    out.mkdir(parents=True, exist_ok=True)
    save_weights(out / FILE, variables, step=step)
    config.data.root, config.init_from = "", ""
    save_config(config, out / "config.json")
    told = json.loads((run_dir / "run.json").read_text())
    run = {key: told[key] for key in KEPT if key in told} | {"before": before}
    if "soup" in told:
        run["averaged"] = _taken(told)
    write_json(out / "run.json", run)
    report = run_dir / "released"
    result = evaluate.run(out, data_folder, out=report, show_faces=False)
    measured = {key: value for key, value in result.items() if key not in ("run", "data")}
    command = f"coatnet-jax release {run_dir.name}"
    measured["environment"] = {**result["environment"], "command": command}
    write_json(out / "evaluation.json", measured)
    card = release_card(config, run, measured, _other_sets(run_dir))
    (out / "MODEL_CARD.md").write_text(card, encoding="utf-8")
    size = (out / FILE).stat().st_size / 1e6
    print(f"released to {out}: {FILE} ({size:.1f} MB), MODEL_CARD.md, evaluation.json")
    return result


def _stages_before(init_from: str) -> list[dict[str, Any]]:
    """The stages that the backbone went through before, the first one first.

    Raises ValueError where the folder of one is gone: a card must not call trained weights random.
    """
    if not init_from:
        return []
    path = Path(init_from) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{path} is missing, and the model card says where the weights come from: put the "
            "folder of the run back, or correct init_from in the config.json of the run after it"
        )
    config = read_config(path)
    told = {"stage": config.stage, "image_size": config.model.image_size}
    if config.stage == "timm":
        told["name"] = config.timm.name
    else:
        told |= {"data": config.data.name, "epochs": config.epochs}
        told |= {"method": config.method} if "method" in config else {}
    record = path.with_name("run.json")
    run = json.loads(record.read_text()) if record.is_file() else {}
    if averaged := run.get("averaged", _taken(run) if "soup" in run else 0):
        told["averaged"] = averaged
    return [*(run.get("before") or _stages_before(config.get("init_from", ""))), told]


def _taken(run: dict[str, Any]) -> int:
    """The number of runs whose mean a soup's run.json tells of."""
    return sum(row["taken"] for row in run["soup"]["runs"])


def _other_sets(run_dir: Path) -> list[dict[str, Any]]:
    """The run's evaluations on sets that it was not trained on."""
    results = [json.loads(p.read_text()) for p in sorted(run_dir.glob("evaluate/*/metrics.json"))]
    return [result for result in results if not result["trained_on"]["same_data"]]
