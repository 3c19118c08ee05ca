"""Runs side by side on the same faces: means over seeds, and paired differences to the first run.

Reads what `evaluate` left in each run, metrics.json and predictions.csv, so nothing is predicted
again; a run that was not evaluated yet is evaluated first.
"""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from coatnet_jax import evaluation_plots
from coatnet_jax.ages import age_class
from coatnet_jax.bootstrap import bootstrap_interval, paired_difference, persons_of
from coatnet_jax.checkpoint import FOLDER, best_step
from coatnet_jax.config import flat, read_json
from coatnet_jax.evaluation_page import drawn_over
from coatnet_jax.pages import (
    markdown_table,
    percent,
    share_range,
    write_csv,
    write_json,
    write_report,
)
from coatnet_jax.release_weights import is_released
from coatnet_jax.stage import FREE_KEYS, LATER_KEYS
from coatnet_jax.terms import data_terms

MEASURES = ("mae", "accuracy", "balanced_accuracy", "cs5", "bias")
# What older configs do not hold, and what it was before it could be chosen.
OLDER = {"model.mean": [0.485, 0.456, 0.406], "model.std": [0.229, 0.224, 0.225]}
OLDER |= {key: list(v) if isinstance(v, tuple) else v for key, v in LATER_KEYS.items()}
HOW = ("which", "flip", "sides", "decode")  # an evaluation was made
WANTED = ("data_name", "step", "images", "conformal", *MEASURES)  # of metrics.json


@dataclass(frozen=True)
class Evaluated:
    """A run's name, its evaluation (metrics.json), its flat config, and its predictions by face.

    identities: of the faces whose person is known.
    """

    name: str
    metrics: Mapping[str, Any]
    config: Mapping[str, Any]
    predictions: Mapping[tuple[str, str], tuple[int, float]]  # (file, hash): (age, predicted)
    identities: Mapping[tuple[str, str], str] = field(default_factory=dict)


def run(
    run_dirs: Sequence[str | Path],
    *,
    evaluation: str = "test",
    out: str | Path = "comparison",
    evaluate: Callable[[Path], Any] | None = None,
) -> dict[str, Any]:
    """Compare runs and write report.html, .md, runs.csv, comparison.json and .png under `out`.

    `evaluation` names the folder in `RUN/evaluate`; `evaluate(run_dir)` makes a missing one, and
    without it a missing one is refused. Gives back what comparison.json holds. Raises ValueError
    for fewer than two runs, runs evaluated on other data, and runs without a face in common.
    """
    paths = [Path(path) for path in run_dirs]
    if len(paths) < 2 or len({path.resolve() for path in paths}) < len(paths):
        raise ValueError("give at least two runs to compare, each once")
    for path in paths:
        if why := _why_to_evaluate(path, evaluation):
            _evaluate(path, evaluation, evaluate, why=why)
    runs = [
        read_run(path, evaluation, name=name)
        for path, name in zip(paths, _names(paths), strict=True)
    ]
    result = compare(runs)
    out = Path(out)
    write_json(out / "comparison.json", {"evaluation": evaluation, **result})
    write_csv(out / "runs.csv", csv_rows(result))
    evaluation_plots.runs_side_by_side(out / "comparison.png", result["runs"])
    title = f"{len(runs)} runs on {result['common_faces']:,} faces: {result['data_name']}"
    write_report(out, title=title, sections=sections(result, out))
    print(markdown_table(run_rows(result)))
    print(f"written to {out}: report.html, report.md, runs.csv, comparison.json, comparison.png")
    return result


def _why_to_evaluate(path: Path, evaluation: str) -> str:
    """Why a run's evaluation cannot be taken as it is: missing, or of an older checkpoint."""
    told = path / "evaluate" / evaluation / "metrics.json"
    if not told.is_file():
        return "there is no evaluation" if path.is_dir() else "no such run: there is no evaluation"
    metrics = read_json(told)
    if metrics.get("which", "best") != "best":
        return ""
    then = now = metrics.get("step")
    if (path / FOLDER).is_dir():
        now = best_step(path)
    elif is_released(path):  # another may have taken the place of the one that was evaluated
        now = read_json(path / "run.json", optional=True).get("step", then)
    return "" if then == now else f"the best step is {now} now, of step {then} is"


def _evaluate(path: Path, evaluation: str, evaluate: Callable | None, *, why: str) -> None:
    """Make the evaluation of a run, or raise ValueError that says how."""
    if evaluate is None or not (path / "config.json").is_file():
        other = "" if evaluation == "test" else " with the flags that this one is made with"
        raise ValueError(
            f"{why} {path}/evaluate/{evaluation}: make it with coatnet-jax evaluate {path}{other}"
        )
    print(f"{why} {path}/evaluate/{evaluation}: evaluating it", flush=True)
    evaluate(path)


def read_run(path: Path, evaluation: str, *, name: str = "") -> Evaluated:
    """A run's evaluation from its files. Raises ValueError where it is older than the measures."""
    folder = path / "evaluate" / evaluation
    metrics, table = read_json(folder / "metrics.json"), folder / "predictions.csv"
    rows = []
    if table.is_file():
        with table.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
    older = any(key not in metrics for key in WANTED) or (rows and "pixel_hash" not in rows[0])
    if older or len(rows) != metrics["images"]:
        why = "was written by an older version" if older else "is damaged (faces are missing)"
        raise ValueError(f"{folder} {why}: run coatnet-jax evaluate {path} again")
    keyed = {(row["file"], row["pixel_hash"]): row for row in rows}
    predictions = {face: (int(row["age"]), float(row["predicted"])) for face, row in keyed.items()}
    identities = {face: row["identity"] for face, row in keyed.items() if row.get("identity")}
    config = OLDER | flat(read_json(path / "config.json"))
    config |= {f"evaluate.{key}": metrics[key] for key in HOW if key in metrics}
    if averaged := read_json(path / "run.json", optional=True).get("averaged"):
        config["averaged"] = averaged  # a soup has the config of its best run
    return Evaluated(name or path.name, metrics, config, predictions, identities)


def compare(runs: Sequence[Evaluated]) -> dict[str, Any]:
    """Each run on the faces that all have, differences to the first, seeds joined, settings.

    Raises ValueError where there is no common face or an age differs between runs.
    """
    names = {run.metrics["data_name"] for run in runs}
    common = sorted(set.intersection(*(set(run.predictions) for run in runs)))
    if len(names) > 1 or not common:
        places = "; ".join(f"{run.name} on {run.metrics['data_name']}" for run in runs)
        raise ValueError(f"the runs were evaluated on no common faces ({places})")
    if len(common) == 1:
        raise ValueError("the runs have one face in common, which tells no difference")
    # Evaluations of an older version do not say who is on a photo: any run may.
    known = {face: person for run in runs for face, person in run.identities.items()}
    persons = persons_of([known.get(face, "") for face in common])
    age = np.array([runs[0].predictions[face][0] for face in common])
    scores = []
    for run in runs:
        if any(run.predictions[face][0] != a for face, a in zip(common, age, strict=True)):
            raise ValueError(f"{run.name} was evaluated with other ages than {runs[0].name}")
        predicted = np.array([run.predictions[face][1] for face in common])
        scores.append(
            {"mae": np.abs(predicted - age), "accuracy": age_class(predicted) == age_class(age)}
        )
    rows = []
    for run, score in zip(runs, scores, strict=True):
        row: dict[str, Any] = {"run": run.name, "faces": len(run.predictions)}
        row |= {"step": run.metrics["step"], "seed": run.config.get("seed")}
        for key, values in score.items():
            row[key] = float(values.mean())
            row[f"{key}_interval"] = bootstrap_interval(values, groups=persons)
            if run is not runs[0]:
                found = paired_difference(scores[0][key], values, groups=persons)
                row[f"{key}_difference"] = found
        row["evaluated"] = {key: run.metrics[key] for key in MEASURES}
        row["covered"] = run.metrics["conformal"]["covered"]
        row["trained_splits"] = run.metrics.get("trained_on", {}).get("splits", "")
        rows.append(row)
    return {
        "data_name": names.pop(),
        "common_faces": len(common),
        **({} if persons is None else {"persons": len(np.unique(persons))}),
        "left_out": {run.name: len(run.predictions) - len(common) for run in runs},
        "runs": rows,
        "seeds": seed_groups(runs, rows),
        "settings": differing(runs),
    }


def seed_groups(
    runs: Sequence[Evaluated], rows: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Mean and standard deviation (n - 1) over runs that differ in nothing but the seed."""
    groups: dict[str, list[int]] = {}
    for i, run in enumerate(runs):
        rest = {key: run.config[key] for key in run.config if key not in ("seed", *FREE_KEYS)}
        groups.setdefault(json.dumps(rest, sort_keys=True), []).append(i)
    found = []
    for members in groups.values():
        if len({runs[i].config.get("seed") for i in members}) < 2:
            continue
        row: dict[str, Any] = {"runs": [runs[i].name for i in members]}
        for key in ("mae", "accuracy"):
            values = [rows[i][key] for i in members]
            row[key], row[f"{key}_sd"] = float(np.mean(values)), float(np.std(values, ddof=1))
        found.append(row)
    return found


def differing(runs: Sequence[Evaluated]) -> list[dict[str, Any]]:
    """The settings that are not the same in all runs, a column a run; None where unknown to one."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key not in FREE_KEYS)
    rows = []
    for key in keys:
        values = [run.config.get(key) for run in runs]
        if any(value != values[0] for value in values):
            named = zip((run.name for run in runs), values, strict=True)
            rows.append({"setting": key, **dict(named)})
    return rows


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' own names; with as many of those above as it takes to tell them apart, and from
    the column beside theirs in `differing`."""
    parts = [path.resolve().parts for path in paths]
    depth = 1
    while len({("setting",), *(part[-depth:] for part in parts)}) <= len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


# --- writing -------------------------------------------------------------------------------------


def run_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs as a table shows them."""
    rows = []
    for run in result["runs"]:
        mae, accuracy = run.get("mae_difference"), run.get("accuracy_difference")
        rows.append(
            {
                "run": run["run"],
                "MAE, years": f"{run['mae']:.2f}",
                "95 %": "{:.2f}–{:.2f}".format(*run["mae_interval"]),
                "difference to the first": _signed(mae, 1, " years"),
                "4 classes": percent(run["accuracy"]),
                "95 % ": share_range(run["accuracy_interval"]),
                "difference to the first ": _signed(accuracy, 100, " points"),
            }
        )
    return rows


def _signed(found: Mapping[str, Any] | None, scale: float, unit: str) -> str:
    """'-0.31 (-0.42 to -0.20) years'; '–' for the first run."""
    if found is None:
        return "–"
    value, (low, high) = scale * found["difference"], (scale * end for end in found["interval"])
    return f"{value:+.2f} ({low:+.2f} to {high:+.2f}){unit}"


def csv_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs with every interval in columns of its own."""
    rows = []
    for run in result["runs"]:
        row = {key: run[key] for key in ("run", "seed", "step", "faces")}
        for key in ("mae", "accuracy"):
            low, high = run[f"{key}_interval"]
            found = run.get(f"{key}_difference", {"difference": "", "interval": ["", ""]})
            row |= {key: run[key], f"{key}_low": low, f"{key}_high": high}
            row |= {f"{key}_difference": found["difference"]}
            row |= dict(
                zip(
                    (f"{key}_difference_low", f"{key}_difference_high"),
                    found["interval"],
                    strict=True,
                )
            )
        rows.append(row)
    return rows


def in_words(result: Mapping[str, Any]) -> str:
    """What the differences of the MAE allow to say, run by run."""
    first = result["runs"][0]["run"]
    sentences = []
    for run in result["runs"][1:]:
        low, high = run["mae_difference"]["interval"]
        if low <= 0 <= high:
            sentences.append(f"`{run['run']}` and `{first}` cannot be told apart by their MAE.")
        else:
            change = run["mae_difference"]["difference"]
            better = "smaller" if change < 0 else "larger"
            sentences.append(
                f"The MAE of `{run['run']}` is **{abs(change):.2f} years {better}** than that of "
                f"`{first}` ({abs(high if change < 0 else low):.2f} to "
                f"{abs(low if change < 0 else high):.2f})."
            )
    return " ".join(sentences)


def sections(result: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Sections of the report from what comparison.json holds."""
    left_out = {name: n for name, n in result["left_out"].items() if n}
    about = (
        f"Every run on the same {result['common_faces']:,} faces. Differences are paired: each "
        "face is drawn with the answers of both runs, so that hard faces cancel out. The 95 % "
        f"bootstrap intervals are {drawn_over(result)}; how much a training varies by itself, only "
        "several seeds tell."
    )
    if left_out:
        listed = ", ".join(f"{n:,} of {name}" for name, n in left_out.items())
        about += f" Faces that not all runs have are left out: {listed}."
    splits = {run["trained_splits"] for run in result["runs"]}
    if len(splits) > 1:
        about += " **The runs were trained on different splits.**"
    seeds = [
        {
            "runs that differ in the seed alone": ", ".join(row["runs"]),
            "seeds": len(row["runs"]),
            "MAE, years": f"{row['mae']:.2f} ± {row['mae_sd']:.2f}",
            "4 classes": f"{100 * row['accuracy']:.1f} ± {100 * row['accuracy_sd']:.1f} %",
        }
        for row in result["seeds"]
    ]
    settings = [
        {key: "–" if value is None else str(value) for key, value in row.items()}
        for row in result["settings"]
    ]
    note = "mean ± standard deviation over the seeds"
    return [
        {
            "title": "Side by side",
            "blocks": [
                {"text": in_words(result)},
                {"text": about},
                {"figure": folder / "comparison.png", "caption": "With 95 % intervals"},
                {"table": run_rows(result)},
            ],
        },
        {"title": "Seeds", "blocks": [{"table": seeds, "note": note}] if seeds else []},
        {
            "title": "What differs",
            "blocks": [{"table": settings} if settings else {"text": "Every setting is the same."}],
        },
        {"title": "Terms", "blocks": [{"text": data_terms(result["data_name"])}]},
    ]
