"""The report of a whole demonstration: data, pre-training, fine-tuning, results, predictions.

It reads only what the stages left in the working folder, so it can be written again at any time,
and what is not there is left out.
"""

import csv
import json
import shlex
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from coatnet_jax import embed, evaluate, training_plots
from coatnet_jax.ages import DECODED
from coatnet_jax.config import flat, read_json
from coatnet_jax.pages import cell, percent, write_report
from coatnet_jax.terms import LOCAL, data_terms

__all__ = ["run_report", "write_report"]

STAGES = (("pretrain", "Pre-training"), ("finetune", "Fine-tuning"))
# Keys of a config that tell one run from another, in the order of the table.
HYPERPARAMETERS = (
    "model.name", "model.image_size", "model.dtype", "model.drop_path", "epochs", "batch_size",
    "optim.name", "optim.lr", "optim.weight_decay", "optim.warmup_epochs", "optim.layer_decay",
    "loss.name", "loss.temperature", "loss.sigma", "mixup", "ema", "init_from", "distill.teachers",
    "seed",
)  # fmt: skip

_read_optional = partial(read_json, optional=True)


def run_report(workdir: str | Path) -> Path:
    """Write `<workdir>/report.html` and `report.md` from what the stages left.

    Takes prepare.json (of the folder, or the copy data.json that a run keeps), pretrain/ with its
    embed/, finetune/ with evaluate/test/, and predictions/. Raises FileNotFoundError when none of
    these is there; gives back the path of the HTML page.
    """
    workdir = Path(workdir)
    runs = {stage: workdir / stage for stage, _ in STAGES if (workdir / stage).is_dir()}
    test = _read_optional(workdir / "finetune" / "evaluate" / "test" / "metrics.json")
    if not runs and not test:
        raise FileNotFoundError(
            f"nothing to report in {workdir}: it holds neither pretrain/ nor finetune/"
        )
    data = find_data(workdir)
    sections = [
        {"title": "In short", "blocks": short_blocks(data, runs, test)},
        {"title": "Data", "blocks": data_blocks(data)},
        {"title": "Model and training", "blocks": training_blocks(runs)},
        *(
            {"title": title, "blocks": curve_blocks(runs[stage], workdir / "figures", title)}
            for stage, title in STAGES
            if stage in runs
        ),
        *_embed_sections(runs),
        *(evaluate.sections(test, runs["finetune"] / "evaluate" / "test") if test else []),
        {"title": "Predictions", "blocks": prediction_blocks(workdir)},
        {"title": "To repeat it", "blocks": repeat_blocks(runs)},
    ]
    page, _ = write_report(workdir, title="coatnet-jax: age from faces", sections=sections)
    return page


def find_data(workdir: Path) -> dict[str, Any]:
    """What is known of the data: the copy of prepare.json beside a run, or prepare.json itself, {}
    without both. The copy first: several sets may have been prepared under `workdir`."""
    places = [workdir / stage / "data.json" for stage, _ in STAGES]
    places += [workdir / "prepare.json", *sorted(workdir.glob("data/**/prepare.json"))]
    data = next((found for place in places if (found := _read_optional(place))), {})
    configs = [_read_optional(workdir / stage / "config.json") for stage, _ in STAGES]
    names = [config["data"]["name"] for config in configs if "name" in config.get("data", {})]
    return {"name": names[0], **data} if names else data


def short_blocks(
    data: Mapping[str, Any], runs: Mapping[str, Path], test: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The result in one sentence, and what the data are."""
    blocks = []
    if test:
        base = test["baseline"]
        blocks.append(
            {
                "text": f"On {test['images']:,} test faces the mean absolute error is "
                f"**{test['mae']:.2f} years** (always answering {base['median_age']:g}: "
                f"{base['mae']:.2f}), and **{percent(test['accuracy'])}** fall into the right one "
                f"of four age classes (always answering {base['majority_class']}: "
                f"{percent(base['accuracy'])})."
            }
        )
    found = _read_optional(runs["pretrain"] / "embed" / "embed.json") if "pretrain" in runs else {}
    if found:
        errors = found["features"]
        before, after = errors["untrained"]["knn_mae"], errors["pre-trained"]["knn_mae"]
        blocks.append(
            {
                "text": "The age error of the nearest neighbours among the features is "
                f"**{after:.2f} years** after pre-training, which sees no age, and {before:.2f} "
                "with an untrained backbone."
            }
        )
    name = data.get("name", "")
    blocks.append({"text": data_terms(name)})
    if not name.startswith("drawn"):
        blocks.append({"text": LOCAL})
    return blocks


def data_blocks(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """prepare.json as tables: plain entries in one, splits and classes as a row each."""
    plain: dict[str, Any] = {}
    counts = []
    for key, value in data.items():
        name = key.replace("_", " ")
        if key in ("format", "source_id", "bytes") or value in ("", None, {}):
            continue
        if key == "protocols":
            counts.append({"table": [_protocol_row(*item) for item in value.items()]})
        elif key in ("splits", "classes"):
            counts.append({"table": [{name: "faces", **value}]})
        elif isinstance(value, Mapping):
            plain[name] = _listed(value, " " if key == "versions" else ": ")
        elif key == "fingerprint":
            plain[name] = value[:12]
        else:
            plain[name] = value
    table = [{"data": name, "value": value} for name, value in plain.items()]
    return [{"table": table}] * bool(table) + counts


def _protocol_row(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "splits": name,
        **{split: found["splits"].get(split) for split in ("train", "validation", "test")},
        "groups in two splits": found["straddling_groups"],
        "fingerprint": found["fingerprint"][:12],
    }


def training_blocks(runs: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Hyperparameters and circumstances of the runs side by side."""
    configs = {stage: flat(_read_optional(path / "config.json")) for stage, path in runs.items()}
    settings = {
        # as written: 0.999 must not be rounded to 1.00
        stage: {key: str(config[key]) for key in HYPERPARAMETERS if config.get(key, "") != ""}
        for stage, config in configs.items()
    }
    facts = {stage: _facts(_read_optional(path / "run.json")) for stage, path in runs.items()}
    same = {
        name: value
        for name, value in facts[next(iter(runs))].items()
        if len(runs) > 1 and all(fact.get(name) == value for fact in facts.values())
    }
    own = {
        stage: {name: value for name, value in fact.items() if name not in same}
        for stage, fact in facts.items()
    }
    tables = [
        _side_by_side("setting", settings, order=HYPERPARAMETERS),
        _side_by_side("run", own),
        [{"both runs": name, "value": value} for name, value in same.items()],
    ]
    return [{"table": table} for table in tables if table]


def _side_by_side(
    title: str, columns: Mapping[str, Mapping[str, Any]], *, order: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """Rows of every name in any column, '–' where a column has not got it."""
    found = dict.fromkeys(name for column in columns.values() for name in column)
    names = [name for name in order if name in found] if order else list(found)
    return [
        {title: name, **{key: column.get(name) for key, column in columns.items()}}
        for name in names
    ]


def _facts(info: Mapping[str, Any]) -> dict[str, Any]:
    """run.json in words; unknown entries are shown as they are."""
    facts: dict[str, Any] = {}
    for key, value in info.items():
        if key in ("command", "stage") or value in ("", None):
            continue
        if key == "parameters":
            facts["parameters"] = f"{value / 1e6:.2f} M"
        elif key == "wall_seconds":
            facts["wall time"] = f"{value / 60:.1f} min"
        elif key == "devices":
            facts["devices"] = f"{len(value)} × {value[0]}" if value else None
        elif key in ("data_fingerprint", "label_digest"):
            facts[key.replace("_", " ")] = value[:12]
        elif key == "before":
            facts["stages before"] = "; ".join(map(_stage_in_words, value)) or None
        elif isinstance(value, Mapping):
            facts[key] = _listed(value)
        else:
            facts[key.replace("_", " ")] = value
    return facts


def _stage_in_words(stage: Mapping[str, Any]) -> str:
    """A stage that the weights went through: 'pretrain, image size 48, …'."""
    told = {key.replace("_", " "): value for key, value in stage.items() if key != "stage"}
    if "fingerprint" in told:
        told["fingerprint"] = told["fingerprint"][:12]
    return ", ".join([stage["stage"], *([_listed(told)] if told else [])])


def _listed(values: Mapping[str, Any], between: str = " ") -> str:
    """'jax 0.10.2, numpy 2.4.6'; '–' for nothing."""
    return ", ".join(f"{name}{between}{cell(value)}" for name, value in values.items()) or "–"


def curve_blocks(run_dir: Path, figures: Path, title: str) -> list[dict[str, Any]]:
    """The curves of metrics.jsonl as a picture under `figures`; nothing where there are none."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file() or not training_plots.read_metrics(path):
        return []
    picture = training_plots.training_curves(
        figures / f"{run_dir.name}_curves.png", path, title=training_plots.run_title(run_dir)
    )
    return [{"figure": picture, "caption": f"{title}: training and validation over the steps"}]


def _embed_sections(runs: Mapping[str, Path]) -> list[dict[str, Any]]:
    found = []
    for path in runs.values():
        result = _read_optional(path / "embed" / "embed.json")
        if result and (path / "embed" / "tsne.png").is_file():
            found += embed.sections(result, path / "embed")
    return found


def prediction_blocks(workdir: Path) -> list[dict[str, Any]]:
    """The sheet of annotated pictures; nothing where no predictions were made."""
    folder = workdir / "predictions"
    if not (folder / "predictions.png").is_file():
        return []
    decode = (
        _read_optional(workdir / "finetune" / "config.json").get("loss", {}).get("decode", "median")
    )
    interval = (
        "the interval is calibrated to hold the ages of 90 % of faces like those of the "
        "validation split"
        if _interval_kinds(folder / "predictions.csv") == {"conformal"}
        else "90 % of the predicted distribution lie in the interval"
    )
    text = (
        f"The predicted age is the {DECODED[decode]}, {interval}, and the bars are the "
        "probabilities of the four age classes."
    )
    caption = "The first pictures of `predictions.csv`"
    return [{"text": text}, {"figure": folder / "predictions.png", "caption": caption}]


def _interval_kinds(path: Path) -> set[str]:
    """What predictions.csv says of the intervals; nothing where it is not there."""
    if not path.is_file():
        return set()
    with path.open(newline="", encoding="utf-8") as lines:
        return {row.get("interval", "") for row in csv.DictReader(lines)}


def repeat_blocks(runs: Mapping[str, Path]) -> list[dict[str, Any]]:
    """The command of each run, and its whole config folded."""
    blocks = []
    for stage, path in runs.items():
        command = _read_optional(path / "run.json").get("command")
        if command:
            blocks.append({"code": _short_command(command)})
        config = _read_optional(path / "config.json")
        if config:
            blocks.append({"code": json.dumps(config, indent=2), "summary": f"Config of {stage}"})
    return blocks


def _short_command(command: str) -> str:
    """The command line without the folder the program lies in."""
    try:
        program, *rest = shlex.split(command)
    except ValueError:  # older runs did not quote what the shell would take apart
        return command
    return shlex.join([Path(program).name, *rest])
