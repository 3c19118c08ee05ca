"""What the features of a run know of age: t-SNE pictures and a nearest-neighbour check.

The trained backbone is set beside an untrained one of the same config, because even random
convolutions sort faces a little; what pre-training adds is the difference. t-SNE is that of van der
Maaten and Hinton (2008) on unit-length features, so that its distances follow the cosine.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from coatnet_jax import plots
from coatnet_jax.ages import age_class
from coatnet_jax.inference import load_run, predict_split, random_run
from coatnet_jax.logs import environment
from coatnet_jax.metrics import knn_mae, mae
from coatnet_jax.pages import write_csv, write_json, write_report
from coatnet_jax.ssl.watch import spread
from input_pipeline.pipeline import open_split

NEIGHBOURS = 20
SMALLEST = 10  # t-SNE of fewer points shows nothing


def run(
    run_dir: str | Path,
    data_folder: str | Path,
    *,
    split: str = "validation",
    out: str | Path | None = None,
    max_points: int = 2000,
    perplexity: float = 30,
    seed: int = 0,
    batch_size: int = 256,
    knn_reference: str = "train",
    which: str = "best",
    splits: str | None = None,
) -> dict[str, Any]:
    """t-SNE and kNN age error of a run's features on one split; gives back what embed.json holds.

    At most `max_points` faces (drawn with `seed`) are laid out by t-SNE; the kNN error takes the
    whole split, with the split `knn_reference` as neighbours. Writes tsne.png, tsne.csv,
    embed.json, embed.md and embed.html under `out` (default `<run_dir>/embed`). Raises ValueError
    for a split too small, or one that would be its own neighbours.
    """
    if knn_reference == split:
        raise ValueError(
            f"knn_reference {split!r} is the split itself: every face would be its own neighbour"
        )
    trained = load_run(Path(run_dir), which=which, batch_size=batch_size)
    untrained = random_run(trained.config, batch_size=batch_size)
    splits = splits or trained.config.data.splits
    faces = open_split(data_folder, split, splits=splits)
    reference = open_split(data_folder, knn_reference, splits=splits)
    _check_size(len(faces))
    names = {"pretrain": "pre-trained", "finetune": "fine-tuned", "timm": "imported"}
    name = names[trained.stage]
    print(f"features of {len(faces):,} {split} and {len(reference):,} {knn_reference} faces …")
    features, scores = {}, {}
    for key, model in ((name, trained), ("untrained", untrained)):
        z, labels = predict_split(model, faces, model.features, batch_size)
        train_z, train_labels = predict_split(model, reference, model.features, batch_size)
        features[key] = z
        scores[key] = feature_scores(train_z, train_labels["age"], z, labels["age"])
    result = {
        "run": str(run_dir),
        "stage": trained.stage,
        "step": int(trained.step),
        "data": str(data_folder),
        "split": split,
        "splits": splits,
        "fingerprint": faces.fingerprint,
        "environment": environment(),
        "knn_reference": knn_reference,
        "images": len(faces),
        "perplexity": perplexity,
        "seed": seed,
        "constant_median_mae": constant_mae(reference.labels["age"], faces.labels["age"]),
        "features": scores,
    }
    out = Path(out) if out else Path(run_dir) / "embed"
    chosen = choose_points(len(faces), max_points, seed=seed)
    print(f"t-SNE of {len(chosen):,} faces, twice …")
    layouts = {
        key: tsne(z[chosen], perplexity=perplexity, seed=seed) for key, z in features.items()
    }
    write_results(out, result, layouts, chosen, faces.labels)
    print(summary(result))
    print(f"written to {out}: tsne.png, tsne.csv, embed.html, embed.md, embed.json")
    return result


def feature_scores(
    train_z: Float[np.ndarray, "m d"],
    train_age: np.ndarray,
    z: Float[np.ndarray, "n d"],
    age: np.ndarray,
) -> dict[str, float]:
    """kNN MAE in years (k = 20 or as many as there are) and the spread of the features."""
    for features in (train_z, z):
        _check_finite(features)
    k = min(NEIGHBOURS, len(train_z))
    return {"knn_mae": knn_mae(train_z, train_age, z, age, k=k), "embedding_std": spread(z)}


def constant_mae(train_age: np.ndarray, age: np.ndarray) -> float:
    """MAE in years of always answering the median training age."""
    return mae(age, np.full(len(age), float(np.median(train_age))))


def choose_points(n: int, max_points: int, *, seed: int) -> np.ndarray:
    """Sorted indices of all `n` faces, or of `max_points` drawn at random."""
    if n <= max_points:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).choice(n, max_points, replace=False))


def tsne(
    z: Float[np.ndarray, "n d"], *, perplexity: float = 30, seed: int = 0
) -> Float[np.ndarray, "n 2"]:
    """Two-dimensional t-SNE of unit-length features; the same input and seed give the same picture.

    PCA to at most 50 dimensions first, PCA initialisation; the perplexity is lowered to a third of
    the points where there are few. Raises ValueError for fewer than 10 points or NaN features.
    """
    n = len(z)
    _check_size(n)
    _check_finite(z)
    z = _unit(z)
    if spread(z) < 1e-5:
        # All faces at one point: there is no layout, and scikit-learn would divide by zero.
        return np.zeros((n, 2), np.float32)
    model = TSNE(init="pca", perplexity=min(perplexity, (n - 1) / 3), random_state=seed)
    # One thread: sums in a fixed order, and no threads that spin in wait where cores are shared.
    with threadpool_limits(1):
        z = PCA(min(50, n, z.shape[1]), random_state=seed).fit_transform(z)
        return model.fit_transform((z / z.std()).astype(np.float32))


def _unit(z: np.ndarray) -> np.ndarray:
    z = np.asarray(z, np.float64)
    return z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)


def _check_size(n: int) -> None:
    if n < SMALLEST:
        raise ValueError(f"t-SNE needs at least {SMALLEST} faces, the split holds {n}")


def _check_finite(z: np.ndarray) -> None:
    if not np.isfinite(z).all():
        raise ValueError("the features hold NaN: the run diverged, take an earlier checkpoint")


# --- writing -------------------------------------------------------------------------------------


def write_results(
    out: Path,
    result: Mapping[str, Any],
    layouts: Mapping[str, Float[np.ndarray, "n 2"]],
    chosen: np.ndarray,
    labels: Mapping[str, np.ndarray],
) -> None:
    """Write the files named in `run`; row i of each layout is the face `chosen[i]`."""
    picked = {key: np.asarray(labels[key])[chosen] for key in ("file", "age", "gender", "race")}
    notes = {key: f"kNN MAE {s['knn_mae']:.2f} years" for key, s in result["features"].items()}
    plots.tsne_grid(
        out / "tsne.png",
        [(key, notes[key], xy) for key, xy in layouts.items()],
        age=picked["age"],
        age_class=age_class(picked["age"]),
        gender=picked["gender"],
        race=picked["race"],
        title=f"t-SNE of the features of {len(chosen):,} {result['split']} faces",
    )
    write_csv(out / "tsne.csv", point_rows(picked, chosen, *layouts.values()))
    write_json(out / "embed.json", result)
    write_report(out, title="Features and age", sections=sections(result, out), name="embed")


def point_rows(
    picked: Mapping[str, np.ndarray], chosen: np.ndarray, xy: np.ndarray, xy_untrained: np.ndarray
) -> list[dict[str, Any]]:
    """One row a point: which face, its labels (-1 unknown), and where both layouts put it."""
    classes = age_class(picked["age"])
    return [
        {
            "index": int(index),
            "file": str(picked["file"][i]),
            "age": int(picked["age"][i]),
            "class": int(classes[i]),
            "gender": int(picked["gender"][i]),
            "race": int(picked["race"][i]),
            "x": f"{xy[i, 0]:.3f}",
            "y": f"{xy[i, 1]:.3f}",
            "x_untrained": f"{xy_untrained[i, 0]:.3f}",
            "y_untrained": f"{xy_untrained[i, 1]:.3f}",
        }
        for i, index in enumerate(chosen)
    ]


def summary(result: Mapping[str, Any]) -> str:
    """One line for the terminal."""
    errors = ", ".join(f"{key} {s['knn_mae']:.2f}" for key, s in result["features"].items())
    return f"kNN MAE in years: {errors}, always the median {result['constant_median_mae']:.2f}"


def sections(result: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Report sections from what embed.json holds and tsne.png in `folder`."""
    rows = [
        {
            "features": key,
            "kNN MAE, years": f"{s['knn_mae']:.2f}",
            "spread": f"{s['embedding_std']:.3f}",
        }
        for key, s in result["features"].items()
    ]
    constant = f"{result['constant_median_mae']:.2f}"
    rows.append(
        {"features": "none: always the median age", "kNN MAE, years": constant, "spread": "–"}
    )
    text = (
        f"Each of {result['images']:,} {result['split']} faces is given the mean age of its "
        f"{NEIGHBOURS} nearest {result['knn_reference']} faces by the cosine of their features; no "
        f"head is trained. Run `{result['run']}` at step {result['step']:,}."
    )
    note = "spread: 1 where the features fill the sphere, 0 where they collapsed to one point"
    caption = (
        "t-SNE of the same faces, coloured by what is known of them; below, an untrained backbone"
    )
    return [
        {
            "title": "Features",
            "blocks": [
                {"text": text},
                {"table": rows, "note": note},
                {"figure": folder / "tsne.png", "caption": caption},
            ],
        }
    ]
