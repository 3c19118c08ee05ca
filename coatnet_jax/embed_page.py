"""The words of `embed`: what its numbers are, and the sections of its page."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from coatnet_jax.pages import percent
from coatnet_jax.terms import LOCAL, data_terms

Block = dict[str, Any]

HOW = (
    "No backbone is trained here. **kNN**: each face is given the mean age of its {neighbours} "
    "nearest {knn_reference} faces by the cosine of their features, and their commonest class. "
    "**Linear probe**: ridge regression for the age, logistic regression for the class, on "
    "standardised features of the {knn_reference} faces alone; every fifth of these chooses the "
    "strength of regularisation, so no {split} face has a part in what is scored on it."
)
READING = (
    "RankMe (arXiv 2210.02885) is the effective number of dimensions; spread is 1 where the "
    "features fill the sphere, 0 where they collapsed to one point; silhouette is above 0 where "
    "faces lie nearer to their own age class than to the next one (-1 to 1, by the cosine, over "
    "the {points:,} faces of the pictures)"
)
CLOUDS = (
    "Distances between far groups and the sizes of groups mean little in such pictures, and noise "
    "can look like groups at a low perplexity: compare with the untrained backbone and between "
    "perplexities, and trust the table."
)
SAW_AGES = (
    "**The backbone was trained with the ages of {reference_told} {knn_reference} faces.** Its "
    "features fit those better than new ones, so neighbours and probes that learn from them are no "
    "fair comparison with self-supervised features."
)
TOLD = (
    "**The backbone was told the ages of {told} of the {images:,} {split} faces**, in its own "
    "training or in a stage before (what it started from, or a teacher), so the scores are too "
    "good: give another `--split`, or with `--name` a set, whose faces no stage was trained on."
)
CHOSEN_HERE = (
    "**Faces of this very split chose the checkpoint** among those of the training, so the scores "
    "are a little too good: `--split=test` gives them for faces that chose nothing."
)


def summary(result: Mapping[str, Any]) -> str:
    """Two lines for the terminal."""

    def listed(measure: str) -> str:
        return ", ".join(f"{key} {s[measure]:.2f}" for key, s in result["features"].items())

    constant = f"always the median {result['constant_median_mae']:.2f}"
    return (
        f"kNN MAE in years: {listed('knn_mae')}, {constant}\n"
        f"linear probe MAE in years: {listed('probe_mae')}; RankMe: {listed('rank_me')}"
    )


def sections(result: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Report sections from what embed.json holds and the pictures in `folder`."""
    text = (
        f"{result['images']:,} {result['split']} faces. "
        + HOW.format(**{"neighbours": 20, **result})
        + f" Run `{result['run']}` at step {result['step']:,}."
    )
    blocks = [
        *headline(result),
        {"text": text},
        {"table": score_rows(result), "note": READING.format(points=result.get("points", 0))},
    ]
    told = result.get("told")
    if told is None and result.get("stage") == "finetune":  # not known, or of an older version
        blocks.append({"text": SAW_AGES.format(reference_told="the", **result)})
    elif told and told["reference"]:
        of_all = f"{told['reference']:,} of the {result['reference_images']:,}"
        blocks.append({"text": SAW_AGES.format(reference_told=of_all, **result)})
    if told and told["faces"]:
        blocks.append({"text": TOLD.format(**{**result, "told": f"{told['faces']:,}"})})
    if result.get("chosen_here"):
        blocks.append({"text": CHOSEN_HERE})
    return [
        {"title": "Features", "blocks": blocks},
        {"title": "Latent space", "blocks": cloud_blocks(result, folder)},
        {"title": "Nearest neighbours", "blocks": neighbour_blocks(result, folder)},
    ]


def headline(result: Mapping[str, Any]) -> list[Block]:
    """The linear probe and the neighbours as large figures, with what they are held against."""
    scores = result["features"]
    trained = next(iter(scores.values()))
    if "probe_mae" not in trained:  # embed.json of an older version
        return []
    beside = scores["untrained"]
    constant = result["constant_median_mae"]
    majority = percent(result["constant_class_accuracy"])
    facts = [
        (
            f"{trained[f'{kind}_mae']:.2f} years",
            f"{words}: mean error",
            f"untrained {beside[f'{kind}_mae']:.2f}, constant {constant:.2f}",
        )
        for kind, words in (("probe", "linear probe"), ("knn", "nearest neighbours"))
    ]
    facts += [
        (
            percent(trained["probe_accuracy"]),
            "linear probe: right of four classes",
            f"untrained {percent(beside['probe_accuracy'])}, majority {majority}",
        ),
        (
            f"{trained['rank_me']:.0f} of {trained['dimensions']}",
            "dimensions in use (RankMe)",
            f"untrained {beside['rank_me']:.0f}",
        ),
    ]
    return [{"facts": facts}]


def score_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each measure: trained and untrained features, and the constant answer."""
    constant = f"{result['constant_median_mae']:.2f}"
    majority = percent(result.get("constant_class_accuracy"))
    measures = [
        ("kNN MAE, years", "knn_mae", "{:.2f}".format, constant),
        ("linear probe MAE, years", "probe_mae", "{:.2f}".format, constant),
        ("kNN, four classes", "knn_accuracy", percent, majority),
        ("linear probe, four classes", "probe_accuracy", percent, majority),
        ("kNN, balanced accuracy", "knn_balanced_accuracy", percent, "–"),
        ("linear probe, balanced accuracy", "probe_balanced_accuracy", percent, "–"),
        ("RankMe", "rank_me", "{:.1f}".format, "–"),
        ("spread", "embedding_std", "{:.3f}".format, "–"),
        ("silhouette of the classes", "silhouette", "{:+.3f}".format, "–"),
    ]

    def shown(value: float | None, words: Callable) -> str:
        return "–" if value is None or math.isnan(value) else words(value)

    return [
        {
            "": name,
            **{key: shown(s.get(measure), words) for key, s in result["features"].items()},
            "constant answer": constant_answer,
        }
        for name, measure, words, constant_answer in measures
    ]


def cloud_blocks(result: Mapping[str, Any], folder: Path) -> list[Block]:
    """The point clouds that were drawn."""
    below = "; below, an untrained backbone"
    captions = {
        "tsne.png": f"t-SNE of the same faces, coloured by what is known of them{below}",
        "perplexities.png": f"t-SNE at several perplexities, coloured by age{below}",
        "umap.png": f"UMAP of the same faces{below}",
    }
    figures = [
        {"figure": folder / name, "caption": caption, "wide": True}
        for name, caption in captions.items()
        if (folder / name).is_file()
    ]
    return [*figures, {"text": CLOUDS}] if figures else []


def neighbour_blocks(result: Mapping[str, Any], folder: Path) -> list[Block]:
    """The faces with their neighbours, where they were drawn, and for whose eyes they are."""
    if not (folder / "neighbours.png").is_file():
        return []
    text = (
        f"On each line a {result['split']} face, then the {result['knn_reference']} faces nearest "
        "to it by their features; below each one its age, and the cosine. What they share is what "
        "the features hold: age, or light, pose and background."
    )
    drawn = result.get("data_name", "").startswith("drawn")
    warning = [] if drawn else [{"text": f"**{LOCAL}** `--no-faces` leaves them out."}]
    caption = "Faces from young to old and their nearest neighbours"
    figure = {"figure": folder / "neighbours.png", "caption": caption, "wide": True}
    return [*warning, {"text": text}, figure]


def caveats(result: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """How to repeat it, and the terms of the data."""
    blocks: list[Block] = []
    if "environment" in result:
        found = result["environment"]
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        code = f"{found['command']}\nrevision {found['git_revision']}; {versions}"
        code += f"\nsplits {result['splits']}, fingerprint {result['fingerprint']}"
        blocks.append({"code": code, "summary": "Command, versions and data"})
    if "data_name" in result:
        blocks.append({"text": data_terms(result["data_name"])})
    return [{"title": "Terms and how to repeat it", "blocks": blocks}]
