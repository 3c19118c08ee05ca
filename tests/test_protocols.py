"""Protocols: folds cover the set, given splits come back as they were, copies are counted."""

from collections import Counter

import numpy as np
import pytest

from input_pipeline.protocols import (
    OWN,
    Images,
    Protocol,
    given_protocols,
    own_protocols,
    write_protocol,
)
from input_pipeline.splits import read_splits


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 300, 400)
    return Images(
        files=[f"{i}.jpg" for i in range(400)],
        hashes=[f"h{i}" for i in range(400)],
        ages=rng.integers(0, 90, 400).tolist(),
        groups=[str(group) for group in groups],
    )


def sizes(splits):
    return {name: splits.count(name) for name in ("train", "validation", "test")}


def test_own_protocols_have_their_shares_and_part_no_group(images, tmp_path):
    made = own_protocols(images)
    assert list(made) == ["default", "82_3_15", "80_10_10", *(f"fold{k}" for k in range(5))]
    for name, (train, validation) in {
        "default": (280, 60), "80_10_10": (320, 40), "fold0": (240, 80), "fold4": (240, 80),
    }.items():  # fmt: skip
        found = sizes(made[name].splits)
        assert abs(found["train"] - train) <= 4 and abs(found["validation"] - validation) <= 4
    for name, protocol in made.items():
        account = write_protocol(tmp_path / f"{name}.csv", images, protocol, transform_id="")
        assert account["straddling_groups"] == 0


def test_the_last_training_keeps_the_test_split_and_part_of_the_validation_split(images):
    made = own_protocols(images)
    moves = Counter(zip(made["default"].splits, made["82_3_15"].splits, strict=True))
    before = sizes(made["default"].splits)
    kept = moves.pop(("validation", "validation"))
    assert abs(kept - before["validation"] / 5) <= 3
    assert moves == {
        ("train", "train"): before["train"],
        ("validation", "train"): before["validation"] - kept,
        ("test", "test"): before["test"],
    }


def test_every_image_is_once_in_test_and_once_in_validation_of_the_folds(images):
    folds = [own_protocols(images)[f"fold{k}"].splits for k in range(5)]
    for splits in zip(*folds, strict=True):
        assert splits.count("test") == splits.count("validation") == 1


def test_written_split_given_back_is_the_same(images, tmp_path):
    first = own_protocols(images)["fold2"]
    path = tmp_path / "fold2.csv"
    account = write_protocol(path, images, first, transform_id="crop")
    again = given_protocols(images, {"again": path})
    assert list(again) == ["again"] and again["again"].splits == first.splits
    assert again["again"].counts == {"rows": 400, "missing": 0, "changed": 0, "ambiguous": 0}
    other = write_protocol(tmp_path / "b.csv", images, again["again"], transform_id="crop")
    assert other["fingerprint"] == account["fingerprint"]
    assert (tmp_path / "b.csv").read_bytes() == path.read_bytes()


def test_published_protocol_is_kept_and_what_is_wrong_with_it_counted(images, tmp_path):
    path = tmp_path / "published.csv"
    rows = [f"UTKFace/{i}.jpg,{'test' if i % 3 == 0 else 'train'}" for i in range(200)]
    path.write_text("\n".join(["file,split", *rows, "gone.jpg,test"]))
    found = given_protocols(images, {"p": path})
    assert list(found) == ["p", "p_val"]
    assert found["p"].splits == ["test" if i % 3 == 0 else "train" for i in range(200)] + [""] * 200
    account = write_protocol(tmp_path / "p.csv", images, found["p"], transform_id="")
    assert account["splits"] == {"train": 133, "test": 67} and account["missing"] == 1
    where = read_splits(tmp_path / "p.csv")
    groups = {}
    for i in range(200):
        groups.setdefault(images.groups[i], set()).add(where[f"{i}.jpg"].split)
    straddling = sum(len(names) > 1 for names in groups.values())
    assert account["straddling_groups"] == straddling > 0

    val = found["p_val"].splits
    assert [i for i, s in enumerate(val) if s == "test"] == list(range(0, 200, 3))
    assert abs(val.count("validation") - 13) <= 3
    trained = {images.groups[i] for i, s in enumerate(val) if s == "train"}
    assert not trained & {images.groups[i] for i, s in enumerate(val) if s == "validation"}


def test_a_given_table_stands_before_one_that_is_made(images, tmp_path):
    paths = {name: tmp_path / f"{name}.csv" for name in ("p", "p_val")}
    for name, splits in (("p", ("train", "test")), ("p_val", ("train", "validation"))):
        rows = [f"{i}.jpg,{splits[i % 2]}" for i in range(100)]
        paths[name].write_text("\n".join(["file,split", *rows]))
    for order in (paths, dict(reversed(paths.items()))):
        found = given_protocols(images, order)
        assert found.keys() == paths.keys()
        assert found["p_val"].splits == ["train", "validation"] * 50 + [""] * 300


def test_own_names_are_those_that_are_made(images):
    assert list(OWN) == list(own_protocols(images))


def test_protocol_of_other_files_is_refused(images, tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("file,split\nelsewhere.jpg,test\n")
    with pytest.raises(ValueError, match="none of its 1 files is among the images"):
        given_protocols(images, {"p": path})


def test_image_without_a_split_is_not_written(images, tmp_path):
    splits = ["train"] * 399 + [""]
    account = write_protocol(tmp_path / "p.csv", images, Protocol(splits, {}), transform_id="")
    assert account["splits"] == {"train": 399} and "399.jpg" not in read_splits(tmp_path / "p.csv")
