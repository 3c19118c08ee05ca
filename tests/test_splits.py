"""Splits: copies stay together, ages are divided alike, and nothing hangs on the order of files."""

import gzip
import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from coatnet_jax.training_set import read_record
from input_pipeline.splits import (
    SplitRow,
    assign_splits,
    fingerprint,
    label_digest,
    match_splits,
    read_splits,
    straddling_groups,
    write_splits,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    ages = rng.choice([5, 26, 26, 26, 26, 50, 70, 110], 3000)
    hashes = np.array([f"{i:05d}" for i in range(3000)])
    copies = rng.choice(3000, 200, replace=False)
    hashes[copies[:100]] = hashes[copies[100:]]  # 100 pairs, many of them with two ages
    return hashes, ages


def test_identical_pictures_never_part(images):
    hashes, ages = images
    splits = assign_splits(hashes, ages)
    assert straddling_groups(hashes, splits) == 0
    assert straddling_groups(hashes, np.random.default_rng(1).permutation(splits)) > 20


def test_fractions_hold_overall_and_within_every_age(images):
    hashes, ages = images
    splits = assign_splits(hashes, ages)
    fractions = {"train": 0.7, "validation": 0.15, "test": 0.15}
    for name, share in fractions.items():
        assert abs((splits == name).sum() - share * len(ages)) <= 2
        for age in np.unique(ages):
            inside = ages == age
            # the copies with another age are counted elsewhere than where they were placed
            assert abs((splits[inside] == name).sum() - share * inside.sum()) <= 15


@pytest.mark.parametrize("names", ["abcde", "edcba", "vwxyz", "caebd"])
def test_groups_are_placed_by_age_each_where_most_is_lacking(names):
    # By hand: 0.7, 0.15 and 0.15 of 1, 2, 3, 4 and 5 images, less what each split has.
    expected = ["train", "train", "validation", "train", "test"]
    assert assign_splits(list(names), [10, 20, 30, 40, 50]).tolist() == expected
    # Two copies with the ages 10 and 60 are placed first, by the lower of the two.
    pair = assign_splits([*names, names[0]], [10, 20, 30, 40, 50, 60]).tolist()
    assert pair == ["train", "validation", "train", "test", "train", "train"]


def test_split_does_not_depend_on_the_order_of_files(images):
    hashes, ages = images
    splits = assign_splits(hashes, ages)
    order = np.random.default_rng(2).permutation(len(ages))
    np.testing.assert_array_equal(assign_splits(hashes[order], ages[order]), splits[order])
    assert fingerprint(hashes[order], splits[order]) == fingerprint(hashes, splits)


def test_seed_changes_the_split(images):
    hashes, ages = images
    changed = (assign_splits(hashes, ages, seed=1) != assign_splits(hashes, ages)).mean()
    assert 0.3 < changed < 0.7  # two independent draws differ in 1 - .7² - 2·.15² = 0.465


def test_fingerprint_sees_a_single_move(images):
    hashes, ages = images
    splits = assign_splits(hashes, ages)
    before = fingerprint(hashes, splits)
    splits[0] = "test" if splits[0] != "test" else "train"
    assert fingerprint(hashes, splits) != before


def test_fingerprint_tells_what_was_done_to_the_pictures(images):
    hashes, ages = images
    splits = assign_splits(hashes, ages)
    names = ("", "crop 1", "crop 2")
    assert len({fingerprint(hashes, splits, transform_id=name) for name in names}) == 3


def test_digest_of_labels_sees_a_single_age_and_no_order():
    whole = label_digest(["b", "a", "a"], [30, 20, 21], [0, -1, 1])
    assert whole == hashlib.sha256(b"a 20 -1\na 21 1\nb 30 0\n").hexdigest()
    assert whole == label_digest(["a", "a", "b"], [21, 20, 30], [1, -1, 0])
    assert whole != label_digest(["a", "a", "b"], [21, 20, 31], [1, -1, 0])


def test_other_fractions_and_wrong_ones(images):
    hashes, ages = images
    halves = Counter(assign_splits(hashes, ages, fractions=(("a", 0.5), ("b", 0.5))).tolist())
    assert abs(halves["a"] - halves["b"]) <= 2
    with pytest.raises(ValueError, match="sum to 1"):
        assign_splits(hashes, ages, fractions=(("a", 0.5), ("b", 0.6)))
    with pytest.raises(ValueError, match="3000 groups but 2 ages"):
        assign_splits(hashes, ages[:2])


def test_written_splits_are_read_back(tmp_path):
    path = tmp_path / "default.csv"
    files = ["b, with comma.jpg", "a .jpg"]
    write_splits(path, files, ["2", "1"], ["train", "test"])
    assert read_splits(path) == {"a .jpg": ("test", "1"), "b, with comma.jpg": ("train", "2")}
    write_splits(path, files, ["2", "1"], ["train", ""])  # in no split
    assert read_splits(path) == {"b, with comma.jpg": ("train", "2")}


def test_rows_are_matched_by_name_and_checked_by_hash():
    rows = {
        "here.jpg": SplitRow("train", ""),
        "folder/bare.jpg": SplitRow("test", "h1"),
        "changed.jpg": SplitRow("test", "another"),
        "gone.jpg": SplitRow("test", ""),
        "12_SomeBody_40_f.jpg": SplitRow("train", ""),  # listed here without the person's name
        "a/twice.jpg": SplitRow("train", ""),
        "b/twice.jpg": SplitRow("test", ""),
    }
    files = ["here.jpg", "bare.jpg", "changed.jpg", "12_40_f.jpg", "twice.jpg", "b/twice.jpg", "x"]
    splits, counts = match_splits(files, ["h0", "h1", "h2", "h3", "h4", "h5", "h6"], rows)
    assert splits == ["train", "test", "", "train", "", "test", ""]
    assert counts == {"rows": 7, "missing": 1, "changed": 1, "ambiguous": 1}


def test_rows_are_matched_however_accents_are_written():
    apart, together = "e\u0301.jpg", "\u00e9.jpg"
    for row, image in ((apart, together), (together, apart)):
        for name in (f"a/{image}", image):  # by the whole path, and without its folder
            found = match_splits([name], ["h"], {f"a/{row}": SplitRow("test", "h")})
            assert found == (["test"], {"rows": 1, "missing": 0, "changed": 0, "ambiguous": 0})
    both = {apart: SplitRow("train", ""), together: SplitRow("test", "")}
    assert match_splits([apart, together], ["h", "i"], both)[0] == ["train", "test"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("file,part\na.jpg,train\n", "has the columns file, part, but split must be among them"),
        ("", "has the columns \\(none\\)"),
        ("file,split\n", "has no rows"),
        ("file,split\na.jpg,\n", "line 2: file or split is empty"),
        ("file,split\na.jpg,train\na.jpg,test\n", "a.jpg is in train and in test"),
        ("file,split\ncaf\xe9.jpg,train\n", "not text in UTF-8"),
        (
            f'file,split\na.jpg,train\n"{"b" * 200_000}',
            "after line 2 \\(field larger .* is a quote left",
        ),
        (
            'file,split,note\na.jpg,train,"sic\nb.jpg,test,\n',
            "after line 1 \\(unexpected end of data\\): is a quote",
        ),
        (f'"file,split\n{"b" * 200_000}', "after line 0 \\(field larger"),
    ],
)
def test_bad_split_file_raises_with_the_reason(tmp_path, content, reason):
    (tmp_path / "s.csv").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=reason):
        read_splits(tmp_path / "s.csv")


def test_split_file_is_read_through_gzip_and_a_cut_one_is_refused(tmp_path):
    path = tmp_path / "s.csv.gz"
    packed = gzip.compress(b"file,split\na.jpg,train\n" * 2)
    path.write_bytes(gzip.compress(b"file,split\na.jpg,train\nb.jpg,test\n"))
    assert {file: row.split for file, row in read_splits(path).items()} == {
        "a.jpg": "train",
        "b.jpg": "test",
    }
    for damaged in (packed[:-9], b"file,split\na.jpg,train\n", packed[:12] + b"\xff" * 20):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="s.csv.gz cannot be unpacked .*: fetch it again"):
            read_splits(path)


def test_split_of_the_packaged_models_has_their_training_faces():
    rows = read_splits(ROOT / "input_pipeline/utkface/split_82_3_15.csv.gz")
    sizes = Counter(row.split for row in rows.values())
    assert sizes == {"train": 17_455, "validation": 639, "test": 3_193}
    for name in ("released", "released_small"):
        labels, hashes = read_record(ROOT / "coatnet_jax" / name)
        assert len(labels["age"]) == sizes["train"] >= len(hashes)  # one of several copies
        ages = Counter(
            int(file.split("_")[0]) for file, row in rows.items() if row.split == "train"
        )
        assert ages == Counter(labels["age"].tolist())


def test_missing_split_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.csv does not exist"):
        read_splits(tmp_path / "none.csv")
