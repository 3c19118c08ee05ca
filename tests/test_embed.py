"""Layouts, the kNN check and the files of the embedding stage, over made-up features."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from coatnet_jax import embed, plots


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


def test_spread_is_one_on_the_sphere_and_zero_when_collapsed():
    z = np.random.default_rng(0).normal(size=(2000, 64))
    assert embed.spread(z) == pytest.approx(1, abs=0.01)
    assert embed.spread(np.ones((50, 64))) == pytest.approx(0, abs=1e-6)


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
    few = embed.feature_scores(train_z[:5], train_age[:5], z, age)  # fewer than 20 neighbours
    assert few["knn_mae"] == pytest.approx(np.mean(np.abs(train_age[:5].mean() - age)), abs=1e-4)


def test_constant_error_uses_the_training_median():
    assert embed.constant_mae(np.array([10, 20, 90]), np.array([20, 30, 70])) == 20.0


def test_points_are_chosen_once_each_and_by_seed():
    chosen = embed.choose_points(1000, 100, seed=0)
    assert len(np.unique(chosen)) == 100
    np.testing.assert_array_equal(chosen, embed.choose_points(1000, 100, seed=0))
    assert not np.array_equal(chosen, embed.choose_points(1000, 100, seed=1))
    np.testing.assert_array_equal(embed.choose_points(50, 100, seed=0), np.arange(50))


@pytest.mark.parametrize(
    ("z", "message"),
    [(np.ones((4, 8)), "at least 10 faces, the split holds 4"), (np.full((20, 8), np.nan), "NaN")],
)
def test_wrong_features_are_told_in_one_line(z, message):
    with pytest.raises(ValueError, match=message) as error:
        embed.tsne(z)
    assert "\n" not in str(error.value)


def fake_faces(n, seed):
    rng = np.random.default_rng(seed)
    labels = {
        "age": rng.integers(0, 100, n),
        "gender": rng.integers(-1, 2, n),
        "race": rng.integers(-1, 5, n),
        "file": np.array([f"{seed}/{i}.jpg" for i in range(n)]),
    }

    class Faces(SimpleNamespace):
        def __len__(self):
            return n

    return Faces(labels=labels, fingerprint="print")


@pytest.fixture
def joined(monkeypatch):
    """`embed.run` over fakes: trained features tell the age, untrained ones are noise."""
    config = ConfigDict({"stage": "pretrain", "data": {"splits": "default"}})
    faces = {"validation": fake_faces(80, 1), "train": fake_faces(120, 2)}

    def trained(ages):
        return np.stack([np.cos(ages / 40), np.sin(ages / 40), ages * 0], 1).astype(np.float32)

    def noise(ages):
        return np.random.default_rng(0).normal(size=(len(ages), 3)).astype(np.float32)

    def run(features, step):
        return SimpleNamespace(config=config, stage="pretrain", step=step, features=features)

    def predict_split(run, faces, fn, batch_size):
        return fn(faces.labels["age"]), {k: v for k, v in faces.labels.items() if k != "file"}

    monkeypatch.setattr(embed, "load_run", lambda *_, **__: run(trained, 9))
    monkeypatch.setattr(embed, "random_run", lambda *_, **__: run(noise, 0))
    monkeypatch.setattr(embed, "open_split", lambda folder, split, splits: faces[split])
    monkeypatch.setattr(embed, "predict_split", predict_split)
    return faces


def test_run_writes_picture_points_and_scores(joined, tmp_path):
    result = embed.run(tmp_path, "data", max_points=60, perplexity=8)
    folder = tmp_path / "embed"
    assert json.loads((folder / "embed.json").read_text()) == result
    scores = result["features"]
    assert scores["pre-trained"]["knn_mae"] < 5 < scores["untrained"]["knn_mae"]
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
        assert (row["x"], row["y"]) != (row["x_untrained"], row["y_untrained"])
    with Image.open(folder / "tsne.png") as image:
        assert image.width > image.height > 600
    assert "untrained" in (folder / "embed.md").read_text()


def test_a_split_cannot_be_its_own_neighbours(joined, tmp_path):
    with pytest.raises(ValueError, match="own neighbour"):
        embed.run(tmp_path, "data", split="train")


def test_too_small_a_split_is_refused_before_any_work(joined, tmp_path):
    joined["validation"] = fake_faces(3, 1)
    with pytest.raises(ValueError, match="the split holds 3"):
        embed.run(tmp_path, "data")


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
