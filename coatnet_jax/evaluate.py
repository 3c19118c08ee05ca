"""Evaluation of a fine-tuned run on one split: error in years, the four classes, and baselines.

Age and class are both read from the decoded age (by default the posterior median), so they never
disagree. Everything is set beside the two answers that need no picture: always the commonest class,
always the median age, both taken from the training split.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from coatnet_jax import plots
from coatnet_jax.ages import (
    CLASS_NAMES,
    DECODED,
    age_class,
    check_ages,
    class_probabilities,
    get_decoder,
)
from coatnet_jax.inference import load_run, predict_split
from coatnet_jax.logs import environment
from coatnet_jax.metrics import (
    accuracy,
    balanced_accuracy,
    confusion_matrix,
    cumulative_score,
    macro_f1,
    mae,
)
from coatnet_jax.pages import percent, write_csv, write_json, write_report
from coatnet_jax.terms import data_terms
from input_pipeline.pipeline import open_split


def run(
    run_dir: str | Path,
    data_folder: str | Path,
    *,
    split: str = "test",
    out: str | Path | None = None,
    flip: bool = True,
    batch_size: int = 256,
    which: str = "best",
    splits: str | None = None,
    decode: str | None = None,
) -> dict[str, Any]:
    """Evaluate a fine-tuned run and write its report; gives back what metrics.json holds.

    `flip` averages the picture and its mirror image, `which` names the checkpoint, `splits` the
    table of splits and `decode` how ages are read from probabilities (default: both the run's own).
    Writes metrics.json, report.md and .html, confusion.png, scatter.png, bands.png and
    predictions.csv under `out` (default `<run_dir>/evaluate/<split>`). Raises ValueError for a run
    without an age head.
    """
    model = load_run(Path(run_dir), which=which, batch_size=batch_size)
    if model.stage != "finetune":
        raise ValueError(
            f"{run_dir} is a {model.stage} run without an age head; evaluate a finetune run"
        )
    splits, decode = splits or model.config.data.splits, decode or model.decode
    get_decoder(decode)  # a misspelled one should fail before the pictures are read
    faces = open_split(data_folder, split, splits=splits)
    train = open_split(data_folder, "train", splits=splits)
    if not len(faces):
        raise ValueError(f"the split {split!r} of {data_folder} ({splits}) holds no faces")
    check_ages(faces.labels["age"], f"the split {split!r}")
    p, labels = predict_split(
        model, faces, lambda images: model.probabilities(images, flip=flip), batch_size
    )
    age = labels["age"]
    result = {
        "run": str(run_dir),
        "step": int(model.step),
        "which": which,
        "data": str(data_folder),
        "data_name": Path(data_folder).name,
        "split": split,
        "splits": splits,
        "fingerprint": faces.fingerprint,
        "flip": flip,
        "loss": model.config.loss.name,
        "environment": environment(),
        **score(p, age, train_age=train.labels["age"], decode=decode),
    }
    if model.has_attributes and _any_known(faces.labels):
        q, _ = predict_split(model, faces, model.attributes, batch_size)
        attributes = {"gender": q[:, :2], "race": q[:, 2:]}
        if table := attribute_table(attributes, labels, train.labels):
            result["attributes"] = table
    out = Path(out) if out else Path(run_dir) / "evaluate" / split
    write_results(out, result, p, age, np.asarray(faces.labels["file"])[labels["index"]])
    print(summary(result))
    print(f"written to {out}: report.html, report.md, metrics.json, predictions.csv")
    return result


def score(
    p: Float[np.ndarray, "n 117"],
    age: Int[np.ndarray, " n"],
    *,
    train_age: Int[np.ndarray, " m"],
    decode: str = "median",
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, Any]:
    """All measures of the age posteriors `p` against the true ages, as plain numbers.

    Errors are in years, rates are shares 0-1, intervals are 95 % bootstrap intervals over the
    faces. What cannot be computed because a class or band is empty is None. Raises ValueError when
    there are no faces or `p` holds NaN.
    """
    p, age, train_age = np.asarray(p, np.float64), np.asarray(age), np.asarray(train_age)
    if not len(age):
        raise ValueError("nothing to evaluate: the split holds no faces")
    if len(p) != len(age):
        raise ValueError(f"{len(p)} predictions for {len(age)} faces")
    if not np.isfinite(p).all():
        raise ValueError(
            "the predictions hold NaN: the run diverged, evaluate an earlier checkpoint"
        )
    predicted = get_decoder(decode)(p)
    true_class, predicted_class = age_class(age), age_class(predicted)
    error = np.abs(predicted - age)
    matrix = confusion_matrix(true_class, predicted_class, len(CLASS_NAMES))
    return {
        "images": len(age),
        "decode": decode,
        "mae": mae(age, predicted),
        "mae_interval": bootstrap_interval(error, seed=seed, resamples=resamples),
        "cs5": cumulative_score(predicted - age, within=5),
        "accuracy": accuracy(true_class, predicted_class),
        "accuracy_interval": bootstrap_interval(
            true_class == predicted_class, seed=seed, resamples=resamples
        ),
        "balanced_accuracy": balanced_accuracy(true_class, predicted_class),
        "accuracy_of_class_sums": accuracy(true_class, class_probabilities(p).argmax(-1)),
        "baseline": baseline(age, train_age),
        "classes": class_table(matrix, true_class, error),
        "confusion": matrix.tolist(),
        "bands": band_table(age, predicted),
    }


def baseline(age: Int[np.ndarray, " n"], train_age: Int[np.ndarray, " m"]) -> dict[str, Any]:
    """What two constant answers score: the training split's median age and its commonest class."""
    median = float(np.median(train_age))
    majority = int(np.bincount(age_class(train_age), minlength=len(CLASS_NAMES)).argmax())
    true_class = age_class(age)
    constant = np.full(len(age), majority)
    return {
        "median_age": median,
        "mae": mae(age, np.full(len(age), median)),
        "cs5": cumulative_score(age - median, within=5),
        "majority_class": CLASS_NAMES[majority],
        "accuracy": accuracy(true_class, constant),
        "balanced_accuracy": balanced_accuracy(true_class, constant),
    }


def class_table(
    matrix: Int[np.ndarray, "k k"],
    true_class: Int[np.ndarray, " n"],
    error: Float[np.ndarray, " n"],
) -> list[dict[str, Any]]:
    """Support, precision, recall, F1 and MAE (years) of each class; None where undefined.

    Precision is undefined where the class is never predicted, recall and MAE where it never occurs,
    F1 where neither happens.
    """
    rows = []
    for k, name in enumerate(CLASS_NAMES):
        hits, support, given = int(matrix[k, k]), int(matrix[k].sum()), int(matrix[:, k].sum())
        rows.append(
            {
                "class": name,
                "support": support,
                "precision": hits / given if given else None,
                "recall": hits / support if support else None,
                "f1": 2 * hits / (support + given) if support + given else None,
                "mae": float(error[true_class == k].mean()) if support else None,
            }
        )
    return rows


def band_table(
    age: Int[np.ndarray, " n"], predicted: Float[np.ndarray, " n"]
) -> list[dict[str, Any]]:
    """MAE and bias (mean of predicted - true), in years, of each band of ten true years."""
    rows = []
    for start in range(0, 120, 10):
        error = (predicted - age)[(age >= start) & (age < start + 10)]
        rows.append(
            {
                "band": f"{start}–{min(start + 9, 116)}",
                "support": len(error),
                "mae": float(np.abs(error).mean()) if len(error) else None,
                "bias": float(error.mean()) if len(error) else None,
            }
        )
    return rows


def attribute_table(
    p: Mapping[str, Float[np.ndarray, "n k"]],
    labels: Mapping[str, Int[np.ndarray, " n"]],
    train_labels: Mapping[str, Int[np.ndarray, " m"]],
) -> list[dict[str, Any]]:
    """Accuracy and macro-F1 of gender and race over the faces whose label is known.

    Beside the accuracy of always answering the commonest one of training.

    `p` holds class probabilities for 'gender' and 'race'; labels below zero are unknown. An
    attribute that is known of no face here, or was of none in training, has no row.
    """
    rows = []
    for name in ("gender", "race"):
        true, train = np.asarray(labels[name]), np.asarray(train_labels[name])
        known = int((true >= 0).sum())
        if not known or not (train >= 0).any():
            continue
        commonest = int(np.bincount(train[train >= 0], minlength=1).argmax())
        rows.append(
            {
                "attribute": name,
                "support": known,
                "accuracy": accuracy(true, p[name].argmax(-1)),
                "macro_f1": macro_f1(true, p[name].argmax(-1)),
                "constant": accuracy(true, np.full(len(true), commonest)),
            }
        )
    return rows


def _any_known(labels: Mapping[str, np.ndarray]) -> bool:
    return any((np.asarray(labels[name]) >= 0).any() for name in ("gender", "race"))


def bootstrap_interval(
    values: Float[np.ndarray, " n"], *, seed: int = 0, resamples: int = 1000
) -> list[float]:
    """[low, high]: 95 % percentile bootstrap interval of the mean (Efron & Tibshirani 1993)."""
    values = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    n = len(values)
    means = [values[rng.integers(0, n, n)].mean() for _ in range(resamples)]
    return [float(v) for v in np.quantile(means, [0.025, 0.975])]


# --- writing -------------------------------------------------------------------------------------


def write_results(
    out: Path,
    result: Mapping[str, Any],
    p: Float[np.ndarray, "n 117"],
    age: Int[np.ndarray, " n"],
    files: np.ndarray,
) -> None:
    """Write the files named in `run` under `out`; row i of `p` belongs to `files[i]`."""
    decode = result.get("decode", "median")
    predicted = get_decoder(decode)(np.asarray(p, np.float64))
    write_json(out / "metrics.json", result)
    write_csv(out / "predictions.csv", prediction_rows(p, age, files, decode=decode))
    plots.confusion(out / "confusion.png", np.array(result["confusion"]))
    plots.predicted_against_true(out / "scatter.png", age, predicted)
    plots.error_by_band(out / "bands.png", result["bands"], overall=result["mae"])
    title = f"Evaluation on the {result.get('split', '')} split".replace("  ", " ")
    write_report(out, title=title, sections=sections(result, out))


def prediction_rows(
    p: Float[np.ndarray, "n 117"],
    age: Int[np.ndarray, " n"],
    files: np.ndarray,
    *,
    decode: str = "median",
) -> list[dict[str, Any]]:
    """One row an image: index, file, true and predicted age and class, the class probabilities."""
    p = np.asarray(p, np.float64)
    predicted, classes = get_decoder(decode)(p), class_probabilities(p)
    true_class, predicted_class = age_class(np.asarray(age)), age_class(predicted)
    return [
        {
            "index": i,
            "file": str(files[i]),
            "age": int(age[i]),
            "predicted": f"{predicted[i]:.2f}",
            "class": CLASS_NAMES[true_class[i]],
            "predicted_class": CLASS_NAMES[predicted_class[i]],
            **{f"p_{name}": f"{classes[i, k]:.4f}" for k, name in enumerate(CLASS_NAMES)},
        }
        for i in range(len(p))
    ]


def summary(result: Mapping[str, Any]) -> str:
    """One line for the terminal."""
    base = result["baseline"]
    return (
        f"{result['images']:,} faces: MAE {result['mae']:.2f} years (constant {base['mae']:.2f}), "
        f"within 5 years {percent(result['cs5'])}, 4 classes {percent(result['accuracy'])} "
        f"(majority {percent(base['accuracy'])}), balanced {percent(result['balanced_accuracy'])}"
    )


def headline_table(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """The measures beside their 95 % intervals and the constant answers."""
    base = result["baseline"]
    years = "{:.2f}–{:.2f}".format(*result["mae_interval"])
    shares = "{:.1f}–{:.1f} %".format(*(100 * x for x in result["accuracy_interval"]))
    rows = [
        ("mean absolute error, years", f"{result['mae']:.2f}", years, f"{base['mae']:.2f}"),
        ("within 5 years (CS@5)", percent(result["cs5"]), "–", percent(base["cs5"])),
        ("accuracy, 4 classes", percent(result["accuracy"]), shares, percent(base["accuracy"])),
        (
            "balanced accuracy, 4 classes",
            percent(result["balanced_accuracy"]),
            "–",
            percent(base["balanced_accuracy"]),
        ),
        (
            "accuracy, largest class sum",
            percent(result["accuracy_of_class_sums"]),
            "–",
            percent(base["accuracy"]),
        ),
    ]
    return [
        {"measure": name, "model": value, "95 % interval": interval, "constant answer": constant}
        for name, value, interval, constant in rows
    ]


def sections(result: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Report sections from what metrics.json holds and the pictures in `folder`."""
    base = result["baseline"]
    about = (
        f"{result['images']:,} faces of the {result.get('split', '')} split, run "
        f"`{result.get('run', '')}` at step {result.get('step', 0):,}"
        f"{', averaged over the picture and its mirror image' if result.get('flip') else ''}. "
        f"The constant answer is {base['median_age']:.0f} years and class "
        f"{base['majority_class']}, the median and the commonest class of the training split."
    )
    decoded = DECODED[result.get("decode", "median")]
    about += f" An age is the {decoded}"
    about += f" of a run trained with `{result['loss']}`." if "loss" in result else "."
    classes = [
        {**row, **{key: percent(row[key]) for key in ("precision", "recall", "f1")}}
        for row in result["classes"]
    ]
    attributes = [
        {**row, **{key: percent(row.get(key)) for key in ("accuracy", "macro_f1", "constant")}}
        for row in result.get("attributes", [])
    ]
    headline = [{"text": about}, {"table": headline_table(result)}]
    if attributes:
        headline.append({"table": attributes, "note": "the auxiliary heads, known labels only"})
    return [
        {"title": "Results", "blocks": headline},
        {
            "title": "Age classes",
            "blocks": [
                {"table": classes, "note": f"mae in years; the class is that of the {decoded}"},
                _figure(folder / "confusion.png", "True class down, predicted class across"),
            ],
        },
        {
            "title": "Age in years",
            "blocks": [
                _figure(folder / "scatter.png", f"Predicted ({decoded}) against true age"),
                _figure(folder / "bands.png", "Mean absolute error by true age"),
                {"table": result["bands"], "note": "mae and bias (predicted − true) in years"},
            ],
        },
        {"title": "Terms", "blocks": [{"text": data_terms(result.get("data_name", ""))}]},
    ]


def _figure(path: Path, caption: str) -> dict[str, Any]:
    return {"figure": path, "caption": caption}
