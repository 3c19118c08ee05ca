"""The words of an evaluation's report, and its sections on calibration, intervals and groups."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coatnet_jax.ages import DECODED
from coatnet_jax.bootstrap import drawn_units
from coatnet_jax.conformal import METHOD
from coatnet_jax.groups import MINIMUM
from coatnet_jax.pages import percent, share_range
from coatnet_jax.terms import DISCOURAGED, LIMITS, LOCAL, OTHER_LIMITS, data_terms

Block = dict[str, Any]


def title(result: Mapping[str, Any]) -> str:
    """'Ages of 3,193 faces: utkface, test split'."""
    place = ", ".join(filter(None, [result.get("data_name", ""), _split_words(result)]))
    return f"Ages of {result['images']:,} faces" + (f": {place}" if place else "")


def _split_words(result: Mapping[str, Any]) -> str:
    split = result.get("split", "")
    return "all splits" if split == "all" else f"{split.replace('+', ' and ')} split" * bool(split)


def headline(result: Mapping[str, Any]) -> list[Block]:
    """The result as a few large figures and in words."""
    base = result["baseline"]
    facts = [
        (f"{result['mae']:.2f} years", "mean error", f"constant answer: {base['mae']:.2f}"),
        (
            percent(result["accuracy"]),
            "right of four classes",
            f"always {base['majority_class']}: {percent(base['accuracy'])}",
        ),
        (percent(result["cs5"]), "within 5 years", f"constant answer: {percent(base['cs5'])}"),
    ]
    if "conformal" in result:
        found = result["conformal"]
        note = f"should be 90 %; {found['width']:.0f} years wide"
        facts.append((percent(found["covered"]), "inside their interval", note))
    return [{"facts": facts}, {"text": in_words(result)}, {"text": circumstances(result)}]


def drawn_over(result: Mapping[str, Any]) -> str:
    """'over faces', or 'over 120 persons, …' where it is known who they are: what the bootstrap
    draws, of an evaluation or a comparison."""
    if "persons" not in result:
        return "over faces"
    return f"over {result['persons']:,} persons, each drawn with all of their photos"


def in_words(result: Mapping[str, Any]) -> str:
    """The measures as plain sentences."""
    found = result["calibration"]
    bias = result["bias"]
    low, high = result["bias_interval"]
    lean = (
        "neither too old nor too young"
        if low <= 0 <= high
        else f"{abs(bias):.1f} years too {'old' if bias > 0 else 'young'}"
    )
    gap = found["mean_confidence"] - result["accuracy"]
    surer = (
        "as sure as it may be"
        if abs(gap) < 0.02
        else f"too {'sure' if gap > 0 else 'modest'} by {100 * abs(gap):.0f} points"
    )
    return (
        f"Half of the faces are answered within **{result['median_error']:.1f} years** of their "
        f"label, nine of ten within {result['p90_error']:.0f}. On average the answers are "
        f"{lean}; by age it differs, see the groups below. Of its classes the model is sure with "
        f"{percent(found['mean_confidence'])} on average, and right in "
        f"{percent(result['accuracy'])}: "
        f"{surer}.{_widest_gap(result)}"
    )


def _widest_gap(result: Mapping[str, Any]) -> str:
    """The groups of gender and race with the least and the largest error, if they can be told."""
    rows = [r for r in result.get("groups", []) if r["by"] == "gender × race" and not r["few"]]
    if len(rows) < 2:
        return ""
    best, worst = (choose(rows, key=lambda row: row["mae"]) for choose in (min, max))
    told = best["mae_interval"][1] < worst["mae_interval"][0]
    doubt = "" if told else "; their 95 % intervals overlap"
    return (
        f" By gender and race the mean error lies between {best['mae']:.1f} years "
        f"({best['group']}) and {worst['mae']:.1f} ({worst['group']}){doubt}; the ages differ "
        "between these groups, too."
    )


def circumstances(result: Mapping[str, Any]) -> str:
    """Which run, which faces, which rules."""
    base = result["baseline"]
    sides = [f"{100 * side:.0f} %" for side in result.get("sides", [1.0])]
    seen = ", averaged over the picture and its mirror image" if result.get("flip") else ""
    if sides != ["100 %"]:
        each = "each" if seen else "each picture"
        centres = "centres" if len(sides) > 1 else "centre"
        seen += f", of {each} the {centres} with {' and '.join(sides)} of its side"
    text = (
        f"Run `{result.get('run', '')}` at step {result.get('step', 0):,}{seen}. The constant "
        f"answer is {base['median_age']:g} years and class {base['majority_class']}, the median "
        "and the commonest class of the training split."
    )
    text += f" An age is the {DECODED[result.get('decode', 'median')]}"
    text += f" of a run trained with `{result['loss']}`." if "loss" in result else "."
    trained = result.get("trained_on")
    if not trained:
        return text
    where = f"`{trained['data_name']}` (splits `{trained['splits']}`"
    text += (
        f" It was trained on {trained['faces']:,} faces of {where}, fingerprint "
        f"`{trained['fingerprint'][:12]}`)"
    )
    if not trained["same_data"]:
        text += f" and never saw `{result['data_name']}`: **this is a test on another data set**"
    if copies := torn_copies(result):
        text += f". **{copies}**"
    else:
        text += "; none of the faces evaluated here is among them (compared by pixels)."
    return text + _seen_before(result["leak_check"].get("before", []))


def _seen_before(stages: Sequence[Mapping[str, Any]] | None) -> str:
    """What earlier stages, trained on other faces than the run, saw of those evaluated."""
    if stages is None or any(stage["seen"] is None for stage in stages):
        return " Whether an earlier stage of the weights saw any of them is not known."
    return "".join(
        f" The {stage['stage']} stage before, on the splits `{stage['splits']}`"
        f"{' of `{}`'.format(stage['data']) if 'data' in stage else ''}, saw "
        f"{stage['seen']:,} of these pictures without their ages."
        for stage in stages
        if stage["seen"]
    )


def torn_copies(result: Mapping[str, Any]) -> str:
    """The scores without copies of training faces, where a published table tore such apart."""
    if not (rest := result.get("without_copies")):
        return ""
    low, high = rest["mae_interval"]
    return (
        f"{result['leak_check']['identical']:,} of these faces are pixel-identical copies of "
        f"training faces, for the splits {result['splits']!r} are taken as they were published. "
        f"The other {rest['images']:,}: MAE {rest['mae']:.2f} years ({low:.2f}–{high:.2f}), within "
        f"5 years {percent(rest['cs5'])}, 4 classes {percent(rest['accuracy'])}."
    )


def further_sections(result: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Calibration, intervals, groups, largest errors, terms; what was not measured is left out."""
    name = result.get("data_name", "")
    limits = LIMITS if name == "utkface" else OTHER_LIMITS
    terms = [data_terms(name)]
    trained = result.get("trained_on", {}).get("data_name", name)
    if data_terms(trained) not in terms:
        terms.append(data_terms(trained))
    blocks = [*terms, *([] if name.startswith("drawn") else [limits, DISCOURAGED])]
    return [
        {"title": "Calibration", "blocks": calibration_blocks(result, folder)},
        {"title": "90 % intervals", "blocks": interval_blocks(result)},
        {"title": "Groups", "blocks": group_blocks(result, folder)},
        {"title": "Largest errors", "blocks": worst_blocks(result, folder)},
        {"title": "Terms and limits", "blocks": [{"text": text} for text in blocks]},
    ]


def calibration_blocks(result: Mapping[str, Any], folder: Path) -> list[Block]:
    """Are stated probabilities right, of classes and of ages?"""
    found = result["calibration"]
    rows = [
        {
            "interval": f"{100 * row['level']:.0f} %",
            "ages inside": percent(row["covered"]),
            "95 % interval": share_range(row["interval"]),
            "mean width, years": row["width"],
        }
        for row in found["intervals"]
    ]
    text = (
        "Stated probabilities as the model gives them; no temperature or other correction was "
        f"fitted. **ECE {percent(found['ece'])}**: so far is the share of right classes from the "
        "stated probability, on average over the faces (15 bins). On the right, flat is good; "
        "heaps at both ends mean that the distributions are too narrow, a hill that they are too "
        "wide."
    )
    note = "central intervals of the predicted distribution itself, before any calibration"
    return [
        {"text": text},
        {"figure": folder / "calibration.png", "caption": "Reliability of classes and of ages"},
        {"table": rows, "note": note},
    ]


def interval_blocks(result: Mapping[str, Any]) -> list[Block]:
    """The 90 % intervals that `predict` prints, and whether they keep their promise."""
    found = result.get("conformal")
    if not found:
        return []
    constants = found["constants"]
    rows = [
        {
            "90 % interval": name,
            "ages inside": percent(found[f"{kind}covered"]),
            "mean width, years": found[f"{kind}width"],
        }
        for name, kind in [("conformal", "")] * bool(constants) + [("posterior as it is", "raw_")]
    ]
    if not constants:
        why = "too few validation faces, or a release evaluated otherwise than it predicts"
        return [{"table": rows, "note": f"no constants for conformal intervals: {why}"}]
    years = constants["years"]
    moved = f"{abs(years):.1f} years {'outwards' if years >= 0 else 'inwards'}"
    text = (
        f"{METHOD[0].upper()}{METHOD[1:]}: both ends of the posterior's interval are moved "
        f"**{moved}**, so that 90 % of {constants['faces']:,} validation faces lie inside. Here "
        f"{percent(found['covered'])} do ({share_range(found['covered_interval'])}). The promise "
        "is an average over faces like those of the validation split, not one for every group; and "
        "as the checkpoint was chosen on the same faces, it holds only nearly."
    )
    blocks = [{"text": text}]
    if seen := found.get("calibrated_on_these", 0):
        blocks.append(
            {"text": f"**{seen:,} of these faces set the intervals: the share above is no test.**"}
        )
    if not result.get("trained_on", {}).get("same_data", True):
        text = "**These faces are of another data set, so the 90 % are no promise here.**"
        blocks.append({"text": text})
    return [*blocks, {"table": rows}]


def group_blocks(result: Mapping[str, Any], folder: Path) -> list[Block]:
    """Errors by age, gender, race and crossings: as dots, and as tables to unfold."""
    rows = result.get("groups", [])
    if not rows:
        return []
    drawn = drawn_units(result)
    text = (
        f"Bars are 95 % bootstrap intervals over {drawn}. Groups of fewer than {MINIMUM} {drawn} "
        "are shown, but say nothing; groups differ in their ages and pictures, so that a "
        "difference between them has more than one cause."
    )
    total, unknown = result["images"], result.get("unknown", {})
    # Where nothing of the kind is known there are no such groups to miss anyone.
    unknown = [f"{key} of {n:,}" for key, n in unknown.items() if 0 < n < total]
    if unknown:
        text += f" Unknown, and in no group: {', '.join(unknown)} faces."
    captions = {
        "groups_age.png": "By true age; the number of faces in brackets",
        "groups.png": "By gender, by race, and by both; the number of faces in brackets",
    }
    blocks: list[Block] = [{"text": text}]
    for name, caption in captions.items():
        if (folder / name).is_file():
            blocks.append({"figure": folder / name, "caption": caption})
    for by in dict.fromkeys(row["by"] for row in rows):
        inside = [row for row in rows if row["by"] == by]
        empty = [row["group"] for row in inside if not row["support"]]
        note = f"no faces: {'; '.join(empty)}" if empty else ""
        table = group_rows([row for row in inside if row["support"]])
        blocks.append({"table": table, "summary": f"Table by {by}", "note": note})
    return blocks


def group_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Groups as a table shows them; ⚠ marks those of too few faces."""

    def years(interval):
        return "{:.2f}–{:.2f}".format(*interval) if interval else "–"

    return [
        {
            row["by"]: row["group"],
            "faces": f"{row['support']:,} ⚠ few" if row["few"] else row["support"],
            "MAE, years": row["mae"],
            "95 %": years(row["mae_interval"]),
            "bias, years": f"{row['bias']:+.2f}",
            "CS@5": percent(row["cs5"]),
            "4 classes": percent(row["accuracy"]),
            "95 % ": share_range(row["accuracy_interval"]) if row["accuracy_interval"] else "–",
            "inside 90 %": percent(row["covered"]),
            "width, years": row["width"],
        }
        for row in rows
    ]


def worst_blocks(result: Mapping[str, Any], folder: Path) -> list[Block]:
    """The sheet of the largest errors, where it was drawn."""
    if not (folder / "worst.png").is_file():
        return []
    text = "Look here first: some are wrong labels, some are crops that show no face."
    drawn = result.get("data_name", "").startswith("drawn")
    warning = [] if drawn else [{"text": f"**{LOCAL}** `--no-faces` leaves them out."}]
    caption = "The faces with the largest errors"
    return [*warning, {"text": text}, {"figure": folder / "worst.png", "caption": caption}]
