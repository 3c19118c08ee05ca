"""The model card of a released model, from what its evaluation measured."""

from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from coatnet_jax.bootstrap import drawn_units
from coatnet_jax.evaluation_page import torn_copies
from coatnet_jax.inference import sides_of
from coatnet_jax.terms import DISCOURAGED, LIMITS, OTHER_LIMITS, data_terms, training_split

INTEGERS = "8-bit integers"
HEADINGS = {"age": "Age band", "gender": "Gender, as labelled", "race": "Group, as labelled"}


def release_card(
    config: ml_collections.ConfigDict,
    run: Mapping[str, Any],
    result: Mapping[str, Any],
    others: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Markdown: what it is, its training, terms, results by group, calibration, limits, use.

    `run` is run.json, `result` the metrics on the test split, `others` those on other data sets.
    """
    name = config.data.name
    parts = [
        f"# {config.model.name}: age from a face, {config.model.image_size} px",
        _what(config, run),
        "## Terms",
        data_terms(name),
        "## Training",
        *_training(config, run),
        "## Results",
        _scores(result),
        *_groups(result),
        "## Calibration",
        _calibration(result),
        *_others(others),
        "## Limits",
        LIMITS if name == "utkface" else OTHER_LIMITS,
        "## Use",
        DISCOURAGED,
    ]
    return "\n\n".join(parts) + "\n"


def _what(config: ml_collections.ConfigDict, run: Mapping[str, Any]) -> str:
    averaged = run.get("averaged", 1)
    mean = f", the mean of {averaged} such runs (arXiv 2203.05482)" if averaged > 1 else ""
    return (
        f"{run['parameters'] / 1e6:.2f} M parameters, kept in {run.get('kept_in', 'bfloat16')}"
        f"{mean}. Its answer is the {config.loss.get('decode', 'median')} of a probability for "
        f"each age from 0 to 116, the mean over {_views(config)} and the mirror image."
    )


def _views(config: ml_collections.ConfigDict) -> str:
    shares = [f"{100 * side:.0f} %" for side in sides_of(config)]
    if shares == ["100 %"]:
        return "the picture"
    return f"the centres of the picture with {' and '.join(shares)} of its side"


def _training(config: ml_collections.ConfigDict, run: Mapping[str, Any]) -> list[str]:
    """A table with a row for every stage, in their order, and what holds of all or of the last."""
    before = run.get("before", [])
    taught = [stage for stage in before if "teacher" in stage]
    last = {"stage": "finetune", "epochs": config.epochs, "image_size": config.model.image_size}
    last |= {"data": config.data.name, "splits": config.data.splits}
    own = [*(stage for stage in before if stage not in taught), last]
    rows = [_stage(stage) for stage in own]
    if own[0]["stage"] != "timm":
        rows[0][0] += ", from random weights"
    if not run.get("finished", True):
        rows[-1][0] += f", stopped at step {run['step']}"
    parts = [_table(("stage", "epochs", "px", "data"), rows)]
    if taught:
        names = " and ".join(dict.fromkeys(stage["teacher"] for stage in taught))
        parts.append(f"Distilled from {names}, whose answers are mixed into the labels.")
        rows = [_stage(stage) for stage in taught]
        parts.append(_table(("stage of a teacher", "epochs", "px", "data"), rows))
    outside = any(stage["stage"] == "timm" for stage in before)
    devices = ", ".join(" ".join(dict.fromkeys(name.split())) for name in run["devices"])
    minutes = f", {run['wall_seconds'] / 60:.0f} minutes" if "wall_seconds" in run else ""
    parts.append(
        f"{'' if outside else 'No outside weights or labels. '}Seed {config.seed}, data "
        f"fingerprint `{run['data_fingerprint'][:16]}`; the last stage: revision "
        f"`{run['git_revision']}`, {devices}{minutes}."
    )
    return parts


def _stage(stage: Mapping[str, Any]) -> list[str]:
    """Its row of a table: what (and of which teacher), epochs, size, data."""
    of = f"{stage['teacher']}: " if "teacher" in stage else ""
    if stage["stage"] == "timm":
        return [f"{of}training of timm's `{stage['name']}`, outside of this project", "", "", ""]
    if stage["stage"] == "finetune":
        averaged = stage.get("averaged", 1)
        what = f"mean of {averaged} fine-tunings" if averaged > 1 else "fine-tuning"
    else:
        what = f"pre-training, `{stage.get('method', 'simclr')}`"
    trained_on = training_split(stage["data"], stage.get("splits", "default"))
    return [of + what, f"{stage['epochs']:g}", str(stage["image_size"]), trained_on]


def _scores(result: Mapping[str, Any]) -> str:
    base = result["baseline"]

    def percents(ends: Sequence[float]) -> str:
        return f"{100 * ends[0]:.1f}-{100 * ends[1]:.1f} %"

    low, high = result["mae_interval"]
    rows = [
        ("mean absolute error, years", f"{result['mae']:.2f}", f"{low:.2f}-{high:.2f}",
         f"{base['mae']:.2f}"),
        ("median error, years", f"{result['median_error']:.2f}", "", ""),
    ]  # fmt: skip
    for key, label in (
        ("cs5", "within 5 years"),
        ("accuracy", "4 classes (<18, 18-40, 41-60, >60)"),
        ("balanced_accuracy", "4 classes, balanced"),
    ):
        ends = percents(result[f"{key}_interval"])
        rows.append((label, f"{100 * result[key]:.1f} %", ends, f"{100 * base[key]:.1f} %"))
    copies = torn_copies(result)
    unseen = "" if copies else ", none of them trained on"
    title = (
        f"{result['images']:,} faces of the {result['split']} split{unseen}; with 95 % bootstrap "
        f"intervals over {drawn_units(result)}, beside the best constant answer."
    )
    if copies:
        title += f" {copies}"
    return title + "\n\n" + _table(("", "model", "95 % interval", "constant"), rows)


def _groups(result: Mapping[str, Any]) -> list[str]:
    parts = []
    for by, heading in HEADINGS.items():
        rows = [
            (
                row["group"],
                f"{row['support']:,}",
                f"{row['mae']:.2f}{_range(row['mae_interval'])}",
                f"{row['bias']:+.2f}",
            )
            for row in result["groups"]
            if row["by"] == by and row["support"]
        ]
        if rows:
            parts.append(_table((heading, "faces", "MAE, years (95 %)", "bias, years"), rows))
    return parts


def _range(interval: Sequence[float] | None) -> str:
    """' (low-high)'; nothing for a single face, which has no interval."""
    return f" ({interval[0]:.2f}-{interval[1]:.2f})" if interval else ""


def _calibration(result: Mapping[str, Any]) -> str:
    text = (
        "Expected calibration error of the probability of the class: "
        f"{100 * result['calibration']['ece']:.1f} %."
    )
    found = result["conformal"]
    if found.get("constants"):
        text += (
            f" The 90 % intervals (split conformal, set on the validation split) cover "
            f"{100 * found['covered']:.1f} % of the ages and are {found['width']:.1f} years wide "
            "on average; the guarantee is for faces like those of the data set, not for each group."
        )
    return text


def _others(others: Sequence[Mapping[str, Any]]) -> list[str]:
    if not others:
        return []
    rows = [
        (
            f"{result['data_name']}, {result['split']}",
            f"{result['images']:,}",
            f"{result['mae']:.2f}",
            f"{100 * result['accuracy']:.1f} %",
            f"{100 * result['conformal']['covered']:.1f} %",
        )
        for result in others
    ]
    columns = ("set", "faces", "MAE, years", "4 classes", "coverage of the 90 % interval")
    return ["## Other pictures", _table(columns, rows)]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
