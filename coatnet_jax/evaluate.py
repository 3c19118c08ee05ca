"""Evaluation of a fine-tuned run on one split: error in years, the four classes, and baselines.

Age and class are both read from the decoded age (by default the posterior median), so they never
disagree. Everything is set beside the two answers that need no picture: always the commonest class,
always the median age, both taken from the training split. As arXiv 2307.04570 asks of the field,
splits are fixed files, checkpoints are chosen on the validation split alone, and no face trained on
is ever evaluated.
"""

import errno
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from coatnet_jax import evaluation_page, evaluation_plots, plots
from coatnet_jax.ages import (
    CLASS_NAMES,
    DECODED,
    age_class,
    check_ages,
    class_probabilities,
    get_decoder,
)
from coatnet_jax.bootstrap import balanced_accuracy_interval, bootstrap_interval, persons_of
from coatnet_jax.calibration import calibration
from coatnet_jax.conformal import (
    LEVEL,
    conformal_interval,
    posterior_interval,
    read_constants,
    save_constants,
    widening,
)
from coatnet_jax.groups import group_table, unknown_counts
from coatnet_jax.inference import Run, load_run, predict_split
from coatnet_jax.leaks import trained_on
from coatnet_jax.logs import environment
from coatnet_jax.metrics import (
    accuracy,
    balanced_accuracy,
    confusion_matrix,
    cumulative_score,
    macro_f1,
    mae,
)
from coatnet_jax.pages import percent, share_range, write_csv, write_json, write_report
from coatnet_jax.release_weights import PACKAGED, SMALL
from coatnet_jax.training_set import open_training_set
from input_pipeline.pipeline import Faces, open_split

# Scores that are given a second time where a published table of splits tears copies apart.
WITHOUT_COPIES = ("images", "mae", "mae_interval", "cs5", "accuracy", "baseline")


def run(
    run_dir: str | Path,
    data_folder: str | Path,
    *,
    training_folder: str | Path | None = None,
    split: str = "test",
    out: str | Path | None = None,
    flip: bool = True,
    batch_size: int | None = None,
    which: str = "best",
    splits: str | None = None,
    show_faces: bool = True,
    decode: str | None = None,
    sides: Sequence[float] | None = None,
    called: str | Path | None = None,
) -> dict[str, Any]:
    """Evaluate a fine-tuned run and write its report; gives back what metrics.json holds.

    `data_folder` may be another set than `training_folder` (default: the same), in which the run's
    training and validation faces lie; a released model can do without those. `split` may be joined
    (`train+test`) or `all`. `flip` averages the picture and its mirror image, `which` names the
    checkpoint, `splits` the table of splits (default: the run's own, or of another set `default`),
    `decode` how ages are read from the probabilities and `sides` the centres they are averaged over
    (default: the run's own). The results call the run `called` (default: `run_dir`).

    Writes metrics.json, report.md and .html, their pictures and predictions.csv under `out`
    (default: a folder of its own in `<run_dir>/evaluate`, of a packaged model in `evaluation` or
    `evaluation_small`); with `show_faces` worst.png too. The constants of the 90 % intervals go to
    `<run_dir>/conformal.json`. Raises ValueError for a run without an age head, and where a face
    was trained on; copies that a published table of splits tears apart are counted instead
    (`check_no_leak`).
    """
    run_dir, data_folder = Path(run_dir), Path(data_folder)
    training_folder = Path(training_folder or data_folder)
    model = load_run(run_dir, which=which, batch_size=batch_size, sides=sides)
    if model.stage != "finetune":
        raise ValueError(
            f"{run_dir} is a {model.stage} run without an age head; evaluate a finetune run"
        )
    decode = decode or model.decode
    get_decoder(decode)  # a misspelled one should fail before the pictures are read
    trained = open_training_set(run_dir, training_folder, model.config.data.splits)
    own_set = data_folder.resolve() == training_folder.resolve()
    splits = splits or (trained.splits if own_set else "default")
    faces = open_split(data_folder, split, splits=splits)
    if len(faces) < 2:
        raise ValueError(
            f"the split {split!r} of {data_folder} ({splits}) holds {len(faces) or 'no'} face(s): "
            "an error takes two or more; coatnet-jax predict tells single ages"
        )
    leak_check = trained.check(faces, run_dir=run_dir, folder=training_folder)
    check_ages(faces.labels["age"], f"the split {split!r}")
    p, labels = predict_split(
        model, faces, partial(model.probabilities, flip=flip), done="evaluated"
    )
    age, rows = labels["age"], labels["index"]
    identity = np.asarray(faces.labels["identity"])[rows]
    persons = persons_of(identity)
    result = {
        "run": str(called or run_dir),
        "step": int(model.step),
        "which": which,
        "data": str(data_folder),
        "data_name": data_folder.name,
        "split": split,
        "splits": splits,
        "fingerprint": faces.fingerprint,
        "trained_on": {
            "data_name": training_folder.name,
            "splits": trained.splits,
            "fingerprint": trained.fingerprint,
            "faces": len(trained.labels["age"]),
            "same_data": own_set,
        },
        "leak_check": leak_check,
        "flip": flip,
        "sides": list(model.sides),
        "loss": model.config.loss.name,
        "environment": environment(),
        **score(p, age, train_age=trained.labels["age"], persons=persons, decode=decode),
    }
    reports = {PACKAGED.resolve(): "evaluation", SMALL.resolve(): "evaluation_small"}
    packaged = reports.get(run_dir.resolve())
    # Only of what `predict` does, kept for it or taken from what was kept.
    as_predicted = which == "best" and flip and sides is None
    if trained.validation is not None:
        kept = bool(packaged) and read_constants(run_dir, step=model.step) is not None
        keep = as_predicted and not kept
        constants = conformal_constants(model, trained.validation, flip=flip, keep=keep)
    else:
        constants = read_constants(run_dir, step=model.step) if as_predicted else None
    low, high = intervals(p, constants, decode=decode)
    result["conformal"] = interval_scores(p, age, low, high, constants, persons=persons)
    if constants and trained.validation is not None:
        seen = trained_on(faces, trained.validation)
        result["conformal"]["calibrated_on_these"] = int(seen.sum())
    if leak_check["identical"]:
        apart = ~trained_on(faces, trained.train)[rows]
        scores = score(
            p[apart],
            age[apart],
            train_age=trained.labels["age"],
            persons=persons_of(identity[apart]),
            decode=decode,
        )
        result["without_copies"] = {key: scores[key] for key in WITHOUT_COPIES}
    result["unknown"] = unknown_counts(labels)
    measures = face_measures(p, age, low, high, decode=decode)
    result["groups"] = group_table(measures, labels, persons=persons)
    if heads := [key for key in model.attribute_heads if (faces.labels[key] >= 0).any()]:
        q, _ = predict_split(model, faces, model.attributes, done=f"read {' and '.join(heads)} of")
        both = {"gender": q[:, :2], "race": q[:, 2:]}
        if table := attribute_table({key: both[key] for key in heads}, labels, trained.labels):
            result["attributes"] = table
    out = Path(out) if out else Path(packaged or run_dir / "evaluate") / _folder_name(result)
    columns = {key: np.asarray(faces.labels[key])[rows] for key in ("pixel_hash", "gender", "race")}
    columns |= {"low": np.round(low, 2), "high": np.round(high, 2)}
    if (identity != "").any():
        # As the labels hold it, digits instead of the name (`names.person_id`): who is on a photo
        # is personal, and to draw one person's photos together the name is not needed.
        columns["identity"] = identity
    (out / "worst.png").unlink(missing_ok=True)  # of an earlier run that showed faces
    if show_faces:
        predicted = get_decoder(decode)(np.asarray(p, np.float64))
        evaluation_plots.worst_errors(out / "worst.png", faces, rows, age, predicted, low, high)
    write_results(out, result, p, age, np.asarray(faces.labels["file"])[rows], columns=columns)
    print(summary(result))
    print(f"written to {out}: report.html, report.md, metrics.json, predictions.csv")
    return result


def _folder_name(result: Mapping[str, Any]) -> str:
    """'test', and before it what differs from the run's own data and table of splits."""
    trained = result["trained_on"]
    parts = [] if trained["same_data"] else [result["data_name"]]
    if result["splits"] != (trained["splits"] if trained["same_data"] else "default"):
        parts.append(Path(result["splits"]).stem)
    return "-".join([*parts, result["split"]])


def conformal_constants(
    model: Run, validation: Faces, *, flip: bool, keep: bool
) -> dict[str, Any] | None:
    """The constants of the 90 % intervals, from the validation faces; None where those are too few.

    With `keep` they are also written to `conformal.json` of the run, which `predict` reads, or a
    line says that they cannot be.
    """
    if len(validation) < math.ceil(LEVEL / (1 - LEVEL) - 1e-9):
        print(f"{len(validation)} validation faces are too few for conformal intervals: left out")
        return None
    p, labels = predict_split(
        model, validation, partial(model.probabilities, flip=flip), done="calibrated on"
    )
    constants = {
        "level": LEVEL,
        "years": widening(p, labels["age"]),
        "faces": len(validation),
        "split": "validation",
        "fingerprint": validation.fingerprint,
        "step": int(model.step),
    }
    if keep:
        try:
            save_constants(model.run_dir, constants)
        except OSError as error:  # of somebody else's run, say, whose results go to another --out
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            print(f"{model.run_dir} cannot be written to: predict will not have its intervals")
    return constants


def intervals(
    p: Float[np.ndarray, "n 117"],
    constants: Mapping[str, Any] | None,
    *,
    decode: str = "median",
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """(low, high) in years of the 90 % intervals: conformal, without constants the posterior's."""
    if constants:
        return conformal_interval(p, constants["years"], decode=decode)
    return posterior_interval(p)


def interval_scores(
    p: Float[np.ndarray, "n 117"],
    age: Int[np.ndarray, " n"],
    low: Float[np.ndarray, " n"],
    high: Float[np.ndarray, " n"],
    constants: Mapping[str, Any] | None,
    *,
    persons: Int[np.ndarray, " n"] | None = None,
) -> dict[str, Any]:
    """Share of ages inside, mean width in years, each with its 95 % interval, over `persons` where
    they are given; those of the raw posterior beside."""
    inside = (low <= age) & (age <= high)
    raw_low, raw_high = posterior_interval(p)
    return {
        "constants": constants,
        "covered": float(inside.mean()),
        "covered_interval": bootstrap_interval(inside, groups=persons),
        "width": float((high - low).mean()),
        "width_interval": bootstrap_interval(high - low, groups=persons),
        "raw_covered": float(((raw_low <= age) & (age <= raw_high)).mean()),
        "raw_width": float((raw_high - raw_low).mean()),
    }


def face_measures(
    p: Float[np.ndarray, "n 117"],
    age: Int[np.ndarray, " n"],
    low: Float[np.ndarray, " n"],
    high: Float[np.ndarray, " n"],
    *,
    decode: str = "median",
) -> dict[str, Float[np.ndarray, " n"]]:
    """What `groups` averages, one value a face: errors in years, shares as 0 or 1."""
    predicted = get_decoder(decode)(np.asarray(p, np.float64))
    error = predicted - age
    return {
        "mae": np.abs(error),
        "bias": error,
        "cs5": np.abs(error) <= 5,
        "accuracy": age_class(predicted) == age_class(age),
        "covered": (low <= age) & (age <= high),
        "width": high - low,
    }


def score(
    p: Float[np.ndarray, "n 117"],
    age: Int[np.ndarray, " n"],
    *,
    train_age: Int[np.ndarray, " m"],
    persons: Int[np.ndarray, " n"] | None = None,
    decode: str = "median",
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, Any]:
    """All measures of the age posteriors `p` against the true ages, as plain numbers.

    Errors are in years, rates are shares 0-1, intervals are 95 % bootstrap intervals over the
    faces; with `persons`, a number a face (`bootstrap.persons_of`), over these, and how many they
    are is there too. What cannot be computed because a class or band is empty is None. Raises
    ValueError when there are no faces or `p` holds NaN.
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
    signed = predicted - age
    error = np.abs(signed)
    hit = true_class == predicted_class
    confidence = class_probabilities(p / p.sum(-1, keepdims=True))
    matrix = confusion_matrix(true_class, predicted_class, len(CLASS_NAMES))
    interval = partial(bootstrap_interval, groups=persons, seed=seed, resamples=resamples)
    return {
        "images": len(age),
        **({} if persons is None else {"persons": len(np.unique(persons))}),
        "decode": decode,
        "mae": mae(age, predicted),
        "mae_interval": interval(error),
        "median_error": float(np.median(error)),
        "p90_error": float(np.quantile(error, 0.9)),
        "bias": float(signed.mean()),
        "bias_interval": interval(signed),
        "cs5": cumulative_score(signed, within=5),
        "cs5_interval": interval(error <= 5),
        "cs": cumulative_scores(signed),
        "accuracy": accuracy(true_class, predicted_class),
        "accuracy_interval": interval(hit),
        "balanced_accuracy": balanced_accuracy(true_class, predicted_class),
        "balanced_accuracy_interval": balanced_accuracy_interval(
            true_class, predicted_class, groups=persons, seed=seed, resamples=resamples
        ),
        "accuracy_of_class_sums": accuracy(true_class, class_probabilities(p).argmax(-1)),
        "baseline": baseline(age, train_age),
        "classes": class_table(matrix, true_class, error),
        "confusion": matrix.tolist(),
        "bands": band_table(age, predicted),
        "calibration": calibration(
            p,
            age,
            confidence=np.take_along_axis(confidence, predicted_class[:, None], axis=1)[:, 0],
            hit=hit,
            persons=persons,
            seed=seed,
            resamples=resamples,
        ),
    }


def cumulative_scores(error: Float[np.ndarray, " n"]) -> list[float]:
    """CS@1 to CS@10: the shares of faces with an error of at most 1, 2 … 10 years."""
    return [cumulative_score(error, within=years) for years in range(1, 11)]


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
        "cs": cumulative_scores(age - median),
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

    `p` holds class probabilities for 'gender', 'race' or both; labels below zero are unknown. An
    attribute that is known of no face here, or was of none in training, has no row.
    """
    rows = []
    for name in p:
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


# --- writing -------------------------------------------------------------------------------------


def write_results(
    out: Path,
    result: Mapping[str, Any],
    p: Float[np.ndarray, "n 117"],
    age: Int[np.ndarray, " n"],
    files: np.ndarray,
    *,
    columns: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write the files named in `run` under `out`; row i of `p` belongs to `files[i]`.

    `columns` are further ones of predictions.csv, a value a face.
    """
    decode = result.get("decode", "median")
    predicted = get_decoder(decode)(np.asarray(p, np.float64))
    write_json(out / "metrics.json", result)
    rows = prediction_rows(p, age, files, decode=decode)
    for name, values in (columns or {}).items():
        for row, value in zip(rows, np.asarray(values).tolist(), strict=True):
            row[name] = value
    write_csv(out / "predictions.csv", rows)
    plots.confusion(out / "confusion.png", np.array(result["confusion"]))
    plots.predicted_against_true(out / "scatter.png", age, predicted)
    plots.error_by_band(out / "bands.png", result["bands"], overall=result["mae"])
    evaluation_plots.draw_all(out, result)
    write_report(out, title=evaluation_page.title(result), sections=sections(result, out))


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
    """One line for the terminal, and one more where copies of faces were trained on."""
    base = result["baseline"]
    line = (
        f"{result['images']:,} faces: MAE {result['mae']:.2f} years (constant {base['mae']:.2f}), "
        f"within 5 years {percent(result['cs5'])}, 4 classes {percent(result['accuracy'])} "
        f"(majority {percent(base['accuracy'])}), balanced {percent(result['balanced_accuracy'])}"
    )
    copies = evaluation_page.torn_copies(result)
    return f"{line}\n{copies}" if copies else line


def headline_table(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """The measures beside their 95 % intervals and the constant answers."""
    base = result["baseline"]
    years = "{:.2f}–{:.2f}".format(*result["mae_interval"])
    bias = "{:+.2f} to {:+.2f}".format(*result["bias_interval"])
    rows = [
        ("mean absolute error, years", f"{result['mae']:.2f}", years, f"{base['mae']:.2f}"),
        ("median error, years", f"{result['median_error']:.2f}", "–", "–"),
        ("bias (predicted − true), years", f"{result['bias']:+.2f}", bias, "–"),
        (
            "within 5 years (CS@5)",
            percent(result["cs5"]),
            share_range(result["cs5_interval"]),
            percent(base["cs5"]),
        ),
        (
            "accuracy, 4 classes",
            percent(result["accuracy"]),
            share_range(result["accuracy_interval"]),
            percent(base["accuracy"]),
        ),
        (
            "balanced accuracy, 4 classes",
            percent(result["balanced_accuracy"]),
            share_range(result["balanced_accuracy_interval"]),
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
    decoded = DECODED[result.get("decode", "median")]
    classes = [
        {**row, **{key: percent(row[key]) for key in ("precision", "recall", "f1")}}
        for row in result["classes"]
    ]
    attributes = [
        {**row, **{key: percent(row.get(key)) for key in ("accuracy", "macro_f1", "constant")}}
        for row in result.get("attributes", [])
    ]
    note = f"the 95 % bootstrap intervals are {evaluation_page.drawn_over(result)}"
    table = {"table": headline_table(result), "note": note}
    headline = [*evaluation_page.headline(result), table]
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
                _figure(folder / "cs.png", "Faces with an error of at most so many years"),
                _figure(folder / "bands.png", "Mean absolute error by true age"),
                {"table": result["bands"], "note": "mae and bias (predicted − true) in years"},
            ],
        },
        *evaluation_page.further_sections(result, folder),
    ]


def _figure(path: Path, caption: str) -> dict[str, Any]:
    return {"figure": path, "caption": caption}
