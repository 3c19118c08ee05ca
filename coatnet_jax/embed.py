"""What the features of a run know of age: neighbours, linear probes and pictures of the space.

The trained backbone is set beside an untrained one of the same config, because even random
convolutions sort faces a little; what pre-training adds is the difference. t-SNE is that of van der
Maaten and Hinton (2008) and UMAP that of McInnes et al. (arXiv 1802.03426), both on unit-length
features, so that their distances follow the cosine.
"""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from threadpoolctl import threadpool_limits

from coatnet_jax import embed_plots, plots
from coatnet_jax.ages import age_class
from coatnet_jax.embed_page import caveats, sections, summary
from coatnet_jax.inference import load_run, predict_split, random_run
from coatnet_jax.logs import environment
from coatnet_jax.metrics import accuracy, balanced_accuracy, knn_age, knn_class, mae
from coatnet_jax.pages import write_csv, write_json, write_report
from coatnet_jax.probe import probe_age, probe_class
from coatnet_jax.ssl.watch import rank_me, spread
from coatnet_jax.training_set import told_so_far
from input_pipeline.pipeline import Faces, open_split

NEIGHBOURS = 20
SMALLEST = 10  # t-SNE of fewer points shows nothing
PERPLEXITIES = (30.0, 10.0, 100.0)

Layouts = dict[str, dict[str, Float[np.ndarray, "n 2"]]]  # {name of features: {layout: points}}


def run(
    run_dir: str | Path,
    data_folder: str | Path,
    *,
    split: str = "validation",
    out: str | Path | None = None,
    max_points: int = 2000,
    perplexity: float | Sequence[float] = PERPLEXITIES,
    with_umap: bool = False,
    show_faces: bool = True,
    seed: int = 0,
    knn_reference: str = "train",
    which: str = "best",
    splits: str | None = None,
) -> dict[str, Any]:
    """Scores and pictures of a run's features on one split; gives back what embed.json holds.

    The scores take the whole split; neighbours and linear probes learn from the split
    `knn_reference`. At most `max_points` faces (drawn with `seed`) are laid out, by t-SNE at each
    `perplexity` and with `with_umap` by UMAP, and those also give the silhouette. Writes under
    `out` (default `<run_dir>/embed`, of other faces than the run's validation split
    `<run_dir>/embed-…`): embed.html, embed.md, embed.json, tsne.png (the first perplexity),
    tsne_age.png (its ages alone, for other pages), perplexities.png (all), umap.png, layouts as CSV
    and, with `show_faces`, neighbours.png. `splits` is the table of splits (default: the run's own,
    of another set `default`). Raises ValueError for a split too small, one that would be its own
    neighbours, a perplexity that is not above 0, or UMAP where it is not installed.
    """
    if knn_reference == split:
        raise ValueError(
            f"neighbours and probes learn from the split {knn_reference!r}, where a face would be "
            "its own neighbour: give another --split, like validation or test"
        )
    umap = _import_umap() if with_umap else None
    trained = load_run(Path(run_dir), which=which)
    untrained = random_run(trained.config)
    trained_on = trained.config.data
    own_set = Path(data_folder).name == trained_on.name
    splits = splits or (trained_on.splits if own_set else "default")
    own_validation = own_set and splits == trained_on.splits and "validation" in split.split("+")
    faces = open_split(data_folder, split, splits=splits)
    reference = open_split(data_folder, knn_reference, splits=splits)
    if np.isin(faces.labels["file"], reference.labels["file"]).any():
        raise ValueError(
            f"the split {split!r} holds faces of {knn_reference!r}, from which neighbours and "
            "probes learn: give a split without them"
        )
    _check_size(min(len(faces), max_points))
    told = told_counts(Path(run_dir), Path(data_folder), faces, reference)
    chosen = choose_points(len(faces), max_points, seed=seed)
    perplexities = fitting_perplexities(perplexity, len(chosen))
    names = {"pretrain": "pre-trained", "finetune": "fine-tuned", "timm": "imported"}
    name = names[trained.stage]
    print(f"features of {len(faces):,} {split} and {len(reference):,} {knn_reference} faces …")
    features, banks, scores = {}, {}, {}
    for key, model in ((name, trained), ("untrained", untrained)):
        z, labels = predict_split(model, faces, model.features, done="embedded")
        train_z, train_labels = predict_split(model, reference, model.features, done="embedded")
        features[key], banks[key] = z, train_z
        print(f"neighbours and linear probes of the {key} features …", flush=True)
        scores[key] = feature_scores(train_z, train_labels["age"], z, labels["age"])
        scores[key]["silhouette"] = silhouette(z[chosen], age_class(labels["age"])[chosen])
    result = {
        "run": str(run_dir),
        "stage": trained.stage,
        "step": int(trained.step),
        "chosen_here": which == "best" and trained.stage != "timm" and own_validation,
        "told": told,
        "data": str(data_folder),
        "data_name": Path(data_folder).name,
        "split": split,
        "splits": splits,
        "fingerprint": faces.fingerprint,
        "environment": environment(),
        "knn_reference": knn_reference,
        "images": len(faces),
        "reference_images": len(reference),
        "neighbours": min(NEIGHBOURS, len(reference)),
        "points": len(chosen),
        "perplexity": perplexities[0],
        "perplexities": perplexities,
        "umap": umap.__version__ if umap else None,
        "seed": seed,
        "constant_median_mae": constant_mae(reference.labels["age"], faces.labels["age"]),
        "constant_class_accuracy": constant_accuracy(reference.labels["age"], faces.labels["age"]),
        "features": scores,
    }
    out = Path(out) if out else Path(run_dir) / _folder_name(result, own_set)
    listed = " and ".join(f"{p:g}" for p in perplexities)
    print(f"t-SNE of {len(chosen):,} faces, at perplexity {listed} …", flush=True)
    layouts = {
        key: lay_out(z[chosen], perplexities, seed=seed, umap=umap) for key, z in features.items()
    }
    (out / "neighbours.png").unlink(missing_ok=True)  # of an earlier run that showed faces
    if show_faces:
        embed_plots.neighbours(out / "neighbours.png", faces, reference, features, banks)
    write_results(out, result, layouts, chosen, faces.labels)
    print(summary(result))
    print(f"written to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    return result


def told_counts(
    run_dir: Path, data_folder: Path, faces: Faces, reference: Faces
) -> dict[str, int] | None:
    """Of how many `faces` and `reference` faces the backbone was told the ages, in its own training
    or in a stage before; None, with a word, where the faces that it was trained on are gone."""
    try:
        told = told_so_far(run_dir, data_folder)
    except (FileNotFoundError, ValueError) as error:
        print(f"not known of which of these faces the backbone was told the ages: {error}")
        return None
    return {
        "faces": int(told.among(faces).sum()),
        "reference": int(told.among(reference).sum()),
    }


def _folder_name(result: Mapping[str, Any], own_set: bool) -> str:
    """'embed' for the validation split of the run's own data; else with what differs, as in
    'embed-test' or 'embed-wild-test'."""
    parts = [] if own_set else [result["data_name"]]
    if parts or result["split"] != "validation":
        parts.append(result["split"])
    return "-".join(["embed", *parts])


def feature_scores(
    train_z: Float[np.ndarray, "m d"],
    train_age: np.ndarray,
    z: Float[np.ndarray, "n d"],
    age: np.ndarray,
) -> dict[str, float]:
    """MAE in years and accuracy 0-1 of the four classes, by neighbours and by linear probes.

    `knn_*` are of the 20 nearest training rows (or as many as there are), `probe_*` of ridge and of
    logistic regression, whose strengths are given beside them; `embedding_std` and `rank_me` are
    those of `ssl.watch`.
    """
    for features in (train_z, z):
        _check_finite(features)
    k = min(NEIGHBOURS, len(train_z))
    train_class, true_class = age_class(np.asarray(train_age)), age_class(np.asarray(age))
    years, ridge_strength = probe_age(train_z, train_age, z)
    classes, logistic_strength = probe_class(train_z, train_class, z)
    near = knn_class(train_z, train_class, z, k)
    return {
        "knn_mae": mae(np.asarray(age), knn_age(train_z, train_age, z, k)),
        "probe_mae": mae(np.asarray(age), years),
        "knn_accuracy": accuracy(true_class, near),
        "probe_accuracy": accuracy(true_class, classes),
        "knn_balanced_accuracy": balanced_accuracy(true_class, near),
        "probe_balanced_accuracy": balanced_accuracy(true_class, classes),
        "ridge_strength": ridge_strength,
        "logistic_strength": logistic_strength,
        "rank_me": rank_me(z),
        "embedding_std": spread(z),
        "dimensions": int(z.shape[1]),
    }


def silhouette(z: Float[np.ndarray, "n d"], classes: Int[np.ndarray, "n"]) -> float:
    """Mean silhouette of the classes by cosine distance, -1 to 1 (Rousseeuw 1987).

    Above 0 where rows lie nearer to their own class than to the next one; NaN where all are of one
    class, or each of its own.
    """
    if not 1 < len(np.unique(classes)) < len(z):
        return float("nan")
    return float(silhouette_score(_unit(z), classes, metric="cosine"))


def constant_mae(train_age: np.ndarray, age: np.ndarray) -> float:
    """MAE in years of always answering the median training age."""
    return mae(age, np.full(len(age), float(np.median(train_age))))


def constant_accuracy(train_age: np.ndarray, age: np.ndarray) -> float:
    """Accuracy 0-1 of always answering the commonest class of the training ages."""
    commonest = np.bincount(age_class(np.asarray(train_age))).argmax()
    return float(np.mean(age_class(np.asarray(age)) == commonest))


def choose_points(n: int, max_points: int, *, seed: int) -> np.ndarray:
    """Sorted indices of all `n` faces, or of `max_points` drawn at random."""
    if n <= max_points:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).choice(n, max_points, replace=False))


def fitting_perplexities(perplexity: float | Sequence[float], n: int) -> list[float]:
    """The perplexities in the order given, lowered to a third of `n` points and rounded to two
    digits behind the point, each one once.

    Raises ValueError where one is not above 0 then.
    """
    given = [perplexity] if np.isscalar(perplexity) else list(perplexity)
    if not given or not all(round(p, 2) > 0 for p in given):
        raise ValueError(f"perplexities are numbers above 0 (5 to 100 are usual), not {given}")
    return list(dict.fromkeys(round(float(min(p, (n - 1) / 3)), 2) for p in given))


def lay_out(
    z: Float[np.ndarray, "n d"],
    perplexities: Sequence[float],
    *,
    seed: int,
    umap: ModuleType | None = None,
) -> dict[str, Float[np.ndarray, "n 2"]]:
    """{'tsne 30': points, …, 'umap': points}: t-SNE at each perplexity, UMAP where it is given."""
    points = {f"tsne {p:g}": tsne(z, perplexity=p, seed=seed) for p in perplexities}
    return points | ({"umap": umap_layout(z, umap, seed=seed)} if umap else {})


def umap_layout(
    z: Float[np.ndarray, "n d"], umap: ModuleType, *, seed: int = 0
) -> Float[np.ndarray, "n 2"]:
    """UMAP of unit-length features, 15 neighbours and PCA start; a seed fixes the picture."""
    z = _unit(z)
    if spread(z) < 1e-5:
        return np.zeros((len(z), 2), np.float32)
    z = PCA(min(50, *z.shape), random_state=seed).fit_transform(z)
    neighbours = min(15, len(z) - 1)
    model = umap.UMAP(n_neighbors=neighbours, init="pca", random_state=seed, n_jobs=1)
    return np.asarray(model.fit_transform(z.astype(np.float32)))


def _import_umap() -> ModuleType:
    try:
        return importlib.import_module("umap")
    except ImportError:
        raise ValueError(
            "UMAP needs a package: pip install 'umap-learn>=0.5.6', or leave out --umap"
        ) from None


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
        raise ValueError(
            f"t-SNE needs at least {SMALLEST} faces, here are {n}: give a larger split or set, or "
            "more --max-points"
        )


def _check_finite(z: np.ndarray) -> None:
    if not np.isfinite(z).all():
        raise ValueError("the features hold NaN: the run diverged, take another run")


# --- writing -------------------------------------------------------------------------------------


def write_results(
    out: Path,
    result: Mapping[str, Any],
    layouts: Layouts,
    chosen: np.ndarray,
    labels: Mapping[str, np.ndarray],
) -> None:
    """Write the files named in `run`; row i of each layout is the face `chosen[i]`."""
    picked = {key: np.asarray(labels[key])[chosen] for key in ("file", "age", "gender", "race")}
    known = {key: picked[key] for key in ("age", "gender", "race")}
    known["age_class"] = age_class(picked["age"])
    kinds = list(next(iter(layouts.values())))
    tsnes = [kind for kind in kinds if kind.startswith("tsne")]
    for name in ("umap.png", "umap.csv", "perplexities.png"):  # of an earlier run
        (out / name).unlink(missing_ok=True)
    faces = f"the features of {len(chosen):,} {result['split']} faces"
    notes = {key: f"kNN MAE {s['knn_mae']:.2f} years" for key, s in result["features"].items()}
    for name, shown in (("tsne", tsnes), ("umap", [k for k in kinds if k == "umap"])):
        if not shown:
            continue
        plots.tsne_grid(
            out / f"{name}.png",
            [(key, notes[key], points[shown[0]]) for key, points in layouts.items()],
            title=f"{'t-SNE' if name == 'tsne' else 'UMAP'} of {faces}",
            **known,
        )
        write_csv(out / f"{name}.csv", point_rows(picked, chosen, layouts, shown))
    embed_plots.by_age(
        out / "tsne_age.png",
        [
            (key, age_errors(result["features"][key]), points[tsnes[0]])
            for key, points in layouts.items()
        ],
        age=picked["age"],
        title=f"t-SNE of {faces}",
    )
    if len(tsnes) > 1:
        values = {float(kind.split()[1]): kind for kind in tsnes}
        embed_plots.perplexities(
            out / "perplexities.png",
            {key: [xy[values[v]] for v in sorted(values)] for key, xy in layouts.items()},
            sorted(values),
            age=picked["age"],
        )
    write_json(out / "embed.json", result)
    page = sections(result, out) + caveats(result, out)
    write_report(out, title=f"Features and age: {result['run']}", sections=page, name="embed")


def age_errors(scores: Mapping[str, float]) -> str:
    """'age error in years: kNN 11.37, linear probe 10.51' of those that are known."""
    names = {"knn_mae": "kNN", "probe_mae": "linear probe"}
    errors = [f"{name} {scores[key]:.2f}" for key, name in names.items() if key in scores]
    return f"age error in years: {', '.join(errors)}"


def point_rows(
    picked: Mapping[str, np.ndarray], chosen: np.ndarray, layouts: Layouts, kinds: Sequence[str]
) -> list[dict[str, Any]]:
    """One row a point: which face, its labels (-1 unknown), and where each layout puts it.

    `x` and `y` are of the first of `kinds` and the run's features; `x_untrained` of the untrained,
    and `x_tsne_10` of another kind.
    """
    columns = {}
    for kind in kinds:
        for key, points in layouts.items():
            end = "_untrained" * (key == "untrained")
            end += f"_{kind.replace(' ', '_')}" * (kind != kinds[0])
            columns |= {f"{axis}{end}": points[kind][:, i] for i, axis in enumerate("xy")}
    classes = age_class(picked["age"])
    return [
        {
            "index": int(index),
            "file": str(picked["file"][i]),
            "age": int(picked["age"][i]),
            "class": int(classes[i]),
            "gender": int(picked["gender"][i]),
            "race": int(picked["race"][i]),
            **{name: f"{values[i]:.3f}" for name, values in columns.items()},
        }
        for i, index in enumerate(chosen)
    ]
