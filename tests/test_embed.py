"""Layouts, the kNN check and the files of the embedding stage, over made-up features."""

import csv
import io
import json
import re
import sys
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from coatnet_jax import embed, embed_plots, plots
from coatnet_jax.main import _parser
from coatnet_jax.metrics import mae
from coatnet_jax.probe import probe_age
from coatnet_jax.training_set import ToldAges


def clusters(n=90, d=24, seed=0):
    """Features in three far-apart bundles, and which bundle each is of."""
    rng = np.random.default_rng(seed)
    group = rng.integers(0, 3, n)
    return (np.eye(3, d)[group] * 8 + rng.normal(0, 0.3, (n, d))).astype(np.float32), group


def test_tsne_keeps_clusters_together_and_is_deterministic():
    z, group = clusters()
    xy = embed.tsne(z, perplexity=10, seed=1)
    np.testing.assert_array_equal(xy, embed.tsne(z, perplexity=10, seed=1))
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=-1) + 1e9 * np.eye(len(xy))
    assert np.all(group[distance.argmin(axis=1)] == group)


def test_tsne_does_not_see_the_length_of_features():
    z, _ = clusters(40)
    longer = z * np.random.default_rng(0).choice([0.5, 2, 4], (len(z), 1)).astype(np.float32)
    np.testing.assert_allclose(embed.tsne(longer), embed.tsne(z), atol=1e-3)


def test_tsne_lowers_perplexity_for_few_points_and_survives_a_collapse():
    assert embed.tsne(clusters(12)[0], perplexity=30).shape == (12, 2)
    collapsed = np.ones((20, 8), np.float32)
    np.testing.assert_array_equal(embed.tsne(collapsed), np.zeros((20, 2)))


def test_knn_error_is_that_of_a_loop_over_neighbours():
    (train_z, _), (z, _) = clusters(60), clusters(30, seed=1)
    rng = np.random.default_rng(2)
    train_age, age = rng.integers(0, 90, 60), rng.integers(0, 90, 30)
    errors = []
    for i in range(30):
        cosine = [float(z[i] @ row / np.linalg.norm(z[i]) / np.linalg.norm(row)) for row in train_z]
        errors.append(abs(train_age[np.argsort(cosine)[-20:]].mean() - age[i]))
    scores = embed.feature_scores(train_z, train_age, z, age)
    assert scores["knn_mae"] == pytest.approx(np.mean(errors), abs=1e-4)
    assert scores["probe_mae"] == mae(age, probe_age(train_z, train_age, z)[0])
    few = embed.feature_scores(train_z[:5], train_age[:5], z, age)  # fewer than 20 neighbours
    assert few["knn_mae"] == pytest.approx(np.mean(np.abs(train_age[:5].mean() - age)), abs=1e-4)


def test_class_scores_are_right_where_bundles_are_classes():
    (train_z, train_group), (z, group) = clusters(60), clusters(30, seed=1)
    ages = np.array([5, 30, 70])
    scores = embed.feature_scores(train_z, ages[train_group], z, ages[group])
    assert scores["knn_accuracy"] == scores["probe_accuracy"] == 1
    # By another rule of ages the same bundles say nothing of two of the classes.
    mixed = embed.feature_scores(train_z, ages[train_group % 2], z, ages[group])
    assert mixed["knn_accuracy"] == mixed["probe_accuracy"] == np.mean(group < 2)
    assert mixed["knn_balanced_accuracy"] == pytest.approx(2 / 3)


def test_constant_answers_are_the_training_split_s():
    train, age = np.array([10, 20, 30, 90]), np.array([20, 30, 70])
    assert embed.constant_mae(train[[0, 1, 3]], age) == 20.0
    assert embed.constant_accuracy(train, age) == pytest.approx(2 / 3)


def test_silhouette_is_that_of_a_loop():
    rng = np.random.default_rng(0)
    z, classes = rng.normal(size=(24, 5)), np.arange(24) % 3
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    values = []
    for i in range(24):
        far = [[1 - unit[i] @ unit[j] for j in range(24) if classes[j] == c and j != i]
               for c in range(3)]  # fmt: skip
        own = np.mean(far[classes[i]])
        other = min(np.mean(far[c]) for c in range(3) if c != classes[i])
        values.append((other - own) / max(own, other))
    assert embed.silhouette(z, classes) == pytest.approx(np.mean(values), abs=1e-6)
    assert np.isnan(embed.silhouette(z, np.zeros(24, int)))


def test_perplexities_are_lowered_to_the_points_and_each_kept_once():
    assert embed.fitting_perplexities([30, 10, 100], 200) == [30, 10, 66.33]
    assert embed.fitting_perplexities([30, 10, 100], 31) == [10]
    assert embed.fitting_perplexities(30, 1000) == [30]
    for wrong in ([], [30, 0], [-1], [float("nan")], [0.004]):  # the last one rounds to 0
        with pytest.raises(ValueError, match="numbers above 0"):
            embed.fitting_perplexities(wrong, 100)


@pytest.mark.slow  # Numba compiles
def test_umap_keeps_clusters_together_and_is_deterministic():
    umap = pytest.importorskip("umap", reason="pip install umap-learn")
    z, group = clusters()
    xy = embed.umap_layout(z, umap, seed=1)
    np.testing.assert_array_equal(xy, embed.umap_layout(z, umap, seed=1))
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=-1) + 1e9 * np.eye(len(xy))
    assert np.all(group[distance.argmin(axis=1)] == group)
    np.testing.assert_array_equal(embed.umap_layout(np.ones((20, 8)), umap), np.zeros((20, 2)))


def test_missing_umap_is_told_before_any_work(joined, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ValueError, match="pip install 'umap-learn"):
        embed.run(tmp_path, "data", with_umap=True)
    assert not list(tmp_path.iterdir())


def test_points_are_chosen_once_each_and_by_seed():
    chosen = embed.choose_points(1000, 100, seed=0)
    assert len(np.unique(chosen)) == 100
    np.testing.assert_array_equal(chosen, embed.choose_points(1000, 100, seed=0))
    assert not np.array_equal(chosen, embed.choose_points(1000, 100, seed=1))
    np.testing.assert_array_equal(embed.choose_points(50, 100, seed=0), np.arange(50))


@pytest.mark.parametrize(
    ("z", "message"),
    [(np.ones((4, 8)), "at least 10 faces, here are 4"), (np.full((20, 8), np.nan), "NaN")],
)
def test_wrong_features_are_told_in_one_line(z, message):
    with pytest.raises(ValueError, match=message) as error:
        embed.tsne(z)
    assert "\n" not in str(error.value)


def bytes_of(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def fake_faces(n, seed):
    rng = np.random.default_rng(seed)
    labels = {
        "age": rng.integers(0, 100, n),
        "gender": rng.integers(-1, 2, n),
        "race": rng.integers(-1, 5, n),
        "file": np.array([f"{seed}/{i}.jpg" for i in range(n)]),
        "pixel_hash": np.array([f"{seed:032x}{i:032x}" for i in range(n)]),
    }

    class Faces(SimpleNamespace):
        def __len__(self):
            return n

        def read_images(self, rows):
            return [bytes_of(np.full((8, 8, 3), self.labels["age"][row])) for row in rows]

    return Faces(labels=labels, fingerprint="print")


@pytest.fixture
def joined(monkeypatch):
    """`embed.run` over fakes: trained features tell the age, untrained ones are noise."""
    config = ConfigDict({"stage": "pretrain", "data": {"name": "data", "splits": "default"}})
    faces = {"validation": fake_faces(80, 1), "train": fake_faces(120, 2)}

    def trained(ages):
        return np.stack([np.cos(ages / 40), np.sin(ages / 40), ages * 0], 1).astype(np.float32)

    def noise(ages):
        return np.random.default_rng(0).normal(size=(len(ages), 3)).astype(np.float32)

    def run(features, step):
        return SimpleNamespace(config=config, stage="pretrain", step=step, features=features)

    def predict_split(run, faces, fn, **_):
        return fn(faces.labels["age"]), {k: v for k, v in faces.labels.items() if k != "file"}

    monkeypatch.setattr(embed, "load_run", lambda *_, **__: run(trained, 9))
    monkeypatch.setattr(embed, "random_run", lambda *_, **__: run(noise, 0))
    monkeypatch.setattr(embed, "open_split", lambda folder, split, splits: faces[split])
    monkeypatch.setattr(embed, "predict_split", predict_split)
    monkeypatch.setattr(embed, "told_so_far", lambda *_: ToldAges((), np.zeros(0, np.uint64), ()))
    return faces


def test_run_writes_picture_points_and_scores(joined, tmp_path):
    result = embed.run(tmp_path, "data", max_points=60, perplexity=[8, 5])
    folder = tmp_path / "embed"
    assert json.loads((folder / "embed.json").read_text()) == result
    scores = result["features"]
    for measure in ("knn_mae", "probe_mae"):
        assert scores["pre-trained"][measure] < 5 < scores["untrained"][measure]
    assert scores["pre-trained"]["silhouette"] > scores["untrained"]["silhouette"]
    assert result["perplexities"] == [8, 5]
    with (folder / "tsne.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 60
    labels = joined["validation"].labels
    for row in rows:
        i = int(row["index"])
        assert row["file"] == labels["file"][i]
        assert [int(row[k]) for k in ("age", "gender", "race")] == [
            labels[k][i] for k in ("age", "gender", "race")
        ]
        assert len({row[f"x{end}"] for end in ("", "_untrained", "_tsne_5")}) == 3
    with Image.open(folder / "tsne.png") as image:
        assert image.width > image.height > 600
    page = (folder / "embed.md").read_text()
    for words in ("untrained", "tsne.png", "perplexities.png", "neighbours.png", "do not publish"):
        assert words in page
    assert "http" not in (folder / "embed.html").read_text().replace("arxiv", "")
    # For other pages: its panels are in tsne.png too.
    assert (folder / "tsne_age.png").is_file() and "tsne_age.png" not in page


def test_faces_are_left_out_where_asked(joined, tmp_path):
    embed.run(tmp_path, "data", max_points=20)
    assert (tmp_path / "embed" / "neighbours.png").is_file()
    embed.run(tmp_path, "data", max_points=20, show_faces=False)
    assert not (tmp_path / "embed" / "neighbours.png").exists()
    assert "neighbours.png" not in (tmp_path / "embed" / "embed.md").read_text()


def test_other_splits_and_sets_have_folders_of_their_own(joined, tmp_path):
    joined["test"] = fake_faces(40, 3)
    for name, options in (
        ("embed", {"data_folder": "data"}),
        ("embed-test", {"data_folder": "data", "split": "test"}),
        ("embed-wild-validation", {"data_folder": "elsewhere/wild"}),
    ):
        embed.run(tmp_path, max_points=20, show_faces=False, **options)
        told = json.loads((tmp_path / name / "embed.json").read_text())
        assert told["split"] == options.get("split", "validation")
        assert told["data"] == options["data_folder"] and told["splits"] == "default"
        chosen = "chose the checkpoint" in (tmp_path / name / "embed.md").read_text()
        assert chosen == told["chosen_here"] == (name == "embed")
    embed.run(tmp_path, "data", max_points=20, show_faces=False, which="latest")
    assert not json.loads((tmp_path / "embed/embed.json").read_text())["chosen_here"]
    assert len(list(tmp_path.glob("embed*"))) == 3


def test_faces_whose_ages_were_told_are_counted_on_the_page(joined, tmp_path, monkeypatch, capsys):
    def page(told):
        monkeypatch.setattr(embed, "told_so_far", told)
        embed.run(tmp_path, "data", max_points=20, show_faces=False)
        kept = json.loads((tmp_path / "embed/embed.json").read_text())["told"]
        return kept, (tmp_path / "embed/embed.md").read_text()

    hashes = [joined[name].labels["pixel_hash"] for name in ("validation", "train")]
    told = ToldAges([*hashes[0][:3], *hashes[1][:100], "0"], np.zeros(0, np.uint64), ())
    kept, text = page(lambda *_: told)
    assert kept == {"faces": 3, "reference": 100}
    assert "told the ages of 3 of the 80 validation faces" in text
    assert "trained with the ages of 100 of the 120 train faces" in text
    (advice,) = [line for line in text.splitlines() if "told the ages of 3" in line]
    flags = set(re.findall(r"--[a-z-]+", advice))
    commands = next(a for a in _parser()._actions if a.dest == "command")
    assert flags and flags <= commands.choices["embed"]._option_string_actions.keys()
    kept, text = page(lambda *_: ToldAges((), np.zeros(0, np.uint64), ()))
    assert kept == {"faces": 0, "reference": 0}
    assert "told the ages" not in text and "with the ages of" not in text

    def gone(*_):
        raise FileNotFoundError("it is missing")

    assert page(gone)[0] is None
    assert "not known of which of these faces" in capsys.readouterr().out


def test_neighbours_are_drawn_nearest_first(joined, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(embed_plots, "_face", lambda ax, faces, row, note="": drawn.append(row))
    faces, reference = joined["validation"], joined["train"]
    age, others = (f.labels["age"][:, None] / 100 for f in (faces, reference))
    features = {"a": np.hstack([np.cos(age), np.sin(age)])}
    banks = {"a": np.hstack([np.cos(others), np.sin(others)])}
    embed_plots.neighbours(tmp_path / "n.png", faces, reference, features, banks)
    lines = np.array(drawn).reshape(8, 4)
    asked = faces.labels["age"][lines[:, 0]]
    assert np.all(np.diff(asked) > 0)
    off = np.abs(reference.labels["age"][lines[:, 1:]] - asked[:, None])
    expected = [np.sort(np.abs(reference.labels["age"] - a))[:3] for a in asked]
    np.testing.assert_array_equal(off, expected)


def test_a_split_cannot_be_its_own_neighbours(joined, tmp_path):
    with pytest.raises(ValueError, match="own neighbour"):
        embed.run(tmp_path, "data", split="train")


def test_too_small_a_split_is_refused_before_any_work(joined, tmp_path):
    joined["validation"] = fake_faces(3, 1)
    with pytest.raises(ValueError, match="at least 10 faces, here are 3"):
        embed.run(tmp_path, "data")


def test_picture_of_ages_colours_the_same_faces_by_age_in_both_clouds(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(embed_plots, "save_figure", lambda figure, _: drawn.append(figure))
    age = np.array([0, 20, 40, 80, 116])
    clouds = [(name, f"of {name}", np.stack([age, i + age], 1)) for i, name in enumerate("ab")]
    embed_plots.by_age(tmp_path / "t.png", clouds, age=age, title="t-SNE")
    panels = [ax for ax in drawn[0].axes if ax.get_xlabel()]
    assert [(ax.get_title("left"), ax.get_xlabel()) for ax in panels] == [
        ("a", "of a"),
        ("b", "of b"),
    ]
    for i, ax in enumerate(panels):
        (dots,) = ax.collections
        x, y = dots.get_offsets().T
        assert sorted(x) == list(age) and np.all(y == x + i)
        # viridis from 0 to 80 years, and older ones as at 80
        expected = matplotlib.colormaps["viridis"](np.minimum(x / 80, 1))
        np.testing.assert_allclose(dots.get_facecolors(), expected, atol=1 / 255)


def test_age_errors_are_those_that_are_known():
    scores = {"probe_mae": 10.512, "knn_mae": 11.371, "rank_me": 57.4}
    assert embed.age_errors(scores) == "age error in years: kNN 11.37, linear probe 10.51"
    assert embed.age_errors({"knn_mae": 9.0}) == "age error in years: kNN 9.00"


def test_picture_has_no_column_for_what_is_unknown_of_every_face(tmp_path):
    age, xy = np.arange(30), np.random.default_rng(0).normal(size=(30, 2))
    known, unknown = np.arange(30) % 2, np.full(30, -1)
    widths = []
    for gender, race in ((known, known), (known, unknown), (unknown, unknown)):
        path = plots.tsne_grid(
            tmp_path / "tsne.png",
            [("a", "", xy)],
            age=age,
            age_class=age // 10,
            gender=gender,
            race=race,
        )
        with Image.open(path) as image:
            widths.append(image.width)
    assert widths[0] * 0.9 > widths[1] > widths[1] * 0.9 > widths[2]
