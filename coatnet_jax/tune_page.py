"""The page of a tuning: the two checks, the sweep, the grid, and the command to go on with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coatnet_jax import tune_plots
from coatnet_jax.pages import percent, write_report
from coatnet_jax.terms import data_terms

Block = dict[str, Any]


def write_page(workdir: Path, result: Mapping[str, Any]) -> Path:
    """lr_sweep.png, heatmap.png, report.html and report.md of a finished tuning; the HTML's path.

    `result` is what tune.json holds.
    """
    runs = result["runs"]
    sweep, grid = ([row for row in runs if part in row["part"]] for part in ("sweep", "grid"))
    configured = result["config"]["lr"]
    constant = result["constant_mae"]
    curve = tune_plots.lr_sweep(
        workdir / "lr_sweep.png", sweep, constant=constant, configured=configured
    )
    table = tune_plots.heatmap(workdir / "heatmap.png", grid)
    sections = [
        {"title": "In short", "blocks": short_blocks(result)},
        {"title": "1. Before training", "blocks": untrained_blocks(result["untrained"])},
        {"title": "2. A few faces by heart", "blocks": [{"text": result["overfit"]["in_words"]}]},
        {
            "title": "3. Learning rate",
            "blocks": [
                {"text": sweep_text(sweep, result)},
                {"figure": curve, "caption": "Validation error after each short run"},
            ],
        },
        {
            "title": "4. Learning rate and weight decay",
            "blocks": [
                {"text": grid_text(grid)},
                {"figure": table, "caption": "Validation error; the least one framed"},
            ],
        },
        {
            "title": "All runs",
            "blocks": [{"table": [run_row(row) for row in runs], "note": "also in tune.csv"}],
        },
        {"title": "How far to trust it", "blocks": [{"text": text} for text in limits(result)]},
        {"title": "To go on", "blocks": [{"code": result["command"]}]},
    ]
    page, _ = write_report(workdir, title="Tuning of a fine-tuning", sections=sections)
    return page


def short_blocks(result: Mapping[str, Any]) -> list[Block]:
    """The values found and the two checks as large figures."""
    best, checked = result["best"], result["untrained"]
    measured = f"{checked['measured']:.4g}, in theory {checked['theory']:.4g}"
    share = result["overfit"].get("share_learned")
    facts = [
        (f"{best['lr']:g}", "learning rate", f"the config has {result['config']['lr']:g}"),
        (
            f"{best['weight_decay']:g}",
            "weight decay",
            f"the config has {result['config']['weight_decay']:g}",
        ),
        (
            f"{best['mae']:.2f} years",
            "validation error",
            f"after {best['steps']} steps; constant answer: {result['constant_mae']:.2f}",
        ),
        ("yes" if checked["agrees"] else "NO", "first loss as in theory", measured),
        (
            "yes" if result["overfit"]["learned"] else "NO",
            "learned by heart",
            f"{percent(share)} of the loss gone" if share is not None else "diverged",
        ),
    ]
    blocks: list[Block] = [{"facts": facts}, {"text": beside_own(result)}]
    if warning := too_short(result):
        blocks.append({"text": f"**{warning}**"})
    return blocks


def too_short(result: Mapping[str, Any]) -> str:
    """A warning where no run was any better than a constant answer; '' where one was."""
    best, constant = result["best"]["mae"], result["constant_mae"]
    if best < constant:
        return ""
    return (
        f"No run beats a constant answer ({best:.2f} years, constant {constant:.2f}): there is "
        "nothing to choose by yet. Give the runs more --steps."
    )


def beside_own(result: Mapping[str, Any]) -> str:
    """The best run beside that of the config's own rates, where these were tried."""
    best, own = result["best"], result["config"]
    rates = ("lr", "weight_decay")
    same = [row for row in result["runs"] if all(row[rate] == own[rate] for rate in rates)]
    if not same:
        return f"The config's own learning rate, {own['lr']:g}, was not tried."
    if same[0]["run"] == best["run"]:
        return "The config's own rates are the best of those tried."
    if same[0]["status"] != "done":
        return f"The config's own rates diverged: {same[0]['why']}."
    return (
        f"With the config's own rates the error is {same[0]['mae']:.2f} years, "
        f"{same[0]['mae'] - best['mae']:.2f} more than the least."
    )


def untrained_blocks(found: Mapping[str, Any]) -> list[Block]:
    """First loss beside theory."""
    verdict = (
        "They agree"
        if found["agrees"]
        else "**They do not agree: look for an error in labels, loss or head before going on**"
    )
    text = (
        f"A model that knows nothing answers uniformly, so the loss `{found['loss_name']}` should "
        f"begin at {found['theory']:.4g}: {found['formula'] or 'that of a uniform answer'}, as a "
        f"mean over {found['faces']} training faces. It begins at **{found['measured']:.4g}**. "
        f"{verdict} (within {percent(found['tolerance'])})."
    )
    return [{"text": text}]


def sweep_text(rows: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> str:
    """How the sweep was run, what diverged, and whether the best lies at an end of the grid."""
    good = [row for row in rows if row["status"] == "done"]
    best = min(good, key=lambda row: row["mae"])
    text = (
        f"Runs of {result['plan']['steps']} steps each, with the weight decay "
        f"{result['config']['weight_decay']:g} and the same batches in the same order. "
        f"The least error, {best['mae']:.2f} years, is at **{best['lr']:g}**."
    )
    if bad := [f"{row['lr']:g} ({row['why']})" for row in rows if row["status"] != "done"]:
        text += f" Diverged: {'; '.join(bad)}."
    ends = {"smallest": min(row["lr"] for row in rows), "largest": max(row["lr"] for row in rows)}
    for name, end in ends.items():
        if best["lr"] == end and len(rows) > 1:
            beyond = "smaller" if name == "smallest" else "larger"
            text += f" **It is the {name} one tried: add {beyond} ones with `--lrs`.**"
    return text


def grid_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """How far the errors of the grid lie apart, and how little weight decay can do so soon."""
    good = [row for row in rows if row["status"] == "done"]
    best = min(good, key=lambda row: row["mae"])
    same_lr = [row["mae"] for row in good if row["lr"] == best["lr"]]
    return (
        f"With the learning rate {best['lr']:g} the weight decays differ by "
        f"{max(same_lr) - min(same_lr):.2f} years, from {min(same_lr):.2f} to {max(same_lr):.2f}."
    )


def run_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A run as the table shows it; rates as they are typed."""
    accuracy = row["accuracy"]
    return {
        "learning rate": f"{row['lr']:g}",
        "weight decay": f"{row['weight_decay']:g}",
        "part": row["part"].replace("+", ", "),
        "status": row["status"],
        "MAE, years": row["mae"],
        "4 classes": "–" if accuracy is None else percent(accuracy),
        "training loss": row["loss"],
        "seconds": row["seconds"],
    }


def limits(result: Mapping[str, Any]) -> list[str]:
    """What short runs on one seed can and cannot tell."""
    best, faces = result["best"], result["data"]["faces"]
    rate = best["lr"] * result["config"]["batch_size"] / 128
    shrunk = min(1.0, rate * best["weight_decay"] * best["steps"] / 2)
    return [
        f"Chosen on {faces['validation']:,} validation faces of `{result['data']['name']}` "
        f"(fingerprint `{result['fingerprint'][:12]}`); the test split was not opened. "
        "The validation error of the best run is a little too good, because it was chosen by it.",
        "One run a pair, one seed: differences of the size that another seed makes mean nothing. "
        f"In {best['steps']} steps weight decay shrinks the weights by about "
        f"{100 * shrunk:.2g} % at most, so short runs tell little of it; a long training "
        "often wants a somewhat smaller learning rate than a short one.",
        data_terms(result["data"]["name"]),
    ]
