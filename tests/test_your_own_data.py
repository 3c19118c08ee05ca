"""The page on one's own data: its commands run on small drawn faces, its Python too."""

import csv
import inspect
import json
import re
import shlex
import zipfile
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest

from coatnet_jax.config import parse_training_flags
from coatnet_jax.main import TRAINING, _parser, main
from input_pipeline.archive import list_files
from input_pipeline.face_drawing import draw_face
from input_pipeline.images import encode_jpeg
from input_pipeline.layouts import find_layout
from input_pipeline.prepared import read_labels
from input_pipeline.splits import read_splits

PAGE = Path(__file__).parents[1] / "docs" / "your_own_data.md"


def blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", PAGE.read_text(), re.DOTALL)


def commands(name):
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    found = [shlex.split(line) for line in lines]
    return [words[1:] for words in found if words[0] == "coatnet-jax" and words[1] == name]


def face(i, age):
    return encode_jpeg(draw_face(np.random.default_rng([3, i]), age, i % 2, i % 5, 48), 92)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with everything that the page's commands name, which are run in it."""
    folder = tmp_path_factory.mktemp("own")
    for i in range(40):
        path = folder / "my_faces" / f"{i % 20 * 4:03d}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(face(i, i % 20 * 4))
    rows = [(f"{i}.jpg", "test" if i < 10 else "train") for i in range(40)]
    (folder / "protocol.csv").write_text("file,split\n" + "".join(f"{f},{s}\n" for f, s in rows))
    with zipfile.ZipFile(folder / "photos.zip", "w") as photos:
        for i in range(30):
            photos.writestr(f"{'ab'[i % 2]}/{i}.jpg", face(i, 20 + i))
        smaller = cv2.resize(draw_face(np.random.default_rng([3, 0]), 20, 0, 0, 48), (44, 44))
        photos.writestr("a/copy.jpg", encode_jpeg(smaller, 80))
        photos.writestr("a/nobody.jpg", face(99, 50))
    table = [f"{'ab'[i % 2]}/{i}.jpg,{20 + i},{('female', '')[i % 2]},p{i // 3}" for i in range(30)]
    table += ["a/copy.jpg,60,,", "a/gone.jpg,33,,"]
    (folder / "labels.csv").write_text("\n".join(["file,age,gender,person", *table]))
    with zipfile.ZipFile(folder / "AgeDB.zip", "w") as agedb:
        for i in range(40):
            who = ("SomeBody", "ÉlsaO'Else", "Jr._The.3rd", "X_Y")[i % 4] + "ab"[i % 8 // 4]
            agedb.writestr(f"AgeDB/{i}_{who}_{20 + i}_{'mf'[i % 2]}.jpg", face(i, 20 + i))
    return folder


@pytest.fixture(scope="module")
def prepared(place):
    """{name of the set: what prepare.json holds} after the page's commands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("COATNET_JAX_HOME", str(place / "home"))
        for words in commands("prepare"):
            with pytest.raises(SystemExit) as ended:
                main(words)
            without_beam = "--name=large" in words and not find_spec("apache_beam")
            assert ended.value.code == int(without_beam), words
    found = place.glob("home/*/prepare.json")
    return {path.parent.name: json.loads(path.read_text()) for path in found}


def test_every_command_of_the_page_is_understood():
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(lines) >= 7
    for line in lines:
        name, *argv = shlex.split(line)[1:]
        if name in TRAINING:
            assert parse_training_flags(argv, default=name)[0].data.name == "mine"
        else:
            _parser().parse_args([name, *argv])


def test_layout_is_told_from_as_many_names_as_the_page_says(tmp_path):
    limit = inspect.signature(list_files).parameters["limit"].default
    assert f"the names of the first {limit:,} pictures decide" in PAGE.read_text(encoding="utf-8")
    for first in (limit // 2 - 1, limit // 2):
        with zipfile.ZipFile(tmp_path / "mixed.zip", "w") as mixed:
            for i in range(3 * limit):
                mixed.writestr(f"{i}_SomeBody_{i % 90}_f.jpg" if i < first else f"20/{i}.jpg", b"x")
        wanted = "folder" if first < limit // 2 else "agedb"
        assert find_layout(tmp_path / "mixed.zip").name == wanted
    assert find_layout(tmp_path / "mixed.zip", layout="folder").name == "folder"


def test_folders_by_age_become_a_set(prepared, place):
    info = prepared["mine"]
    assert (info["layout"], info["kept"], info["gender_known"]) == ("folder", 40, 0)
    labels = read_labels(place / "home" / "mine")
    assert set(labels["gender"]) == set(labels["race"]) == {-1}
    for file, age in zip(labels["file"], labels["age"], strict=True):
        assert age == int(file.split(".")[0]) % 20 * 4


def test_published_split_is_added_as_it_is(prepared, place):
    protocols = prepared["mine"]["protocols"]
    assert protocols["theirs"]["splits"] == {"train": 30, "test": 10}
    assert protocols["theirs_val"]["splits"]["validation"] == 3
    where = read_splits(place / "home" / "mine" / "splits" / "theirs.csv")
    assert {file for file, row in where.items() if row.split == "test"} == {
        f"{i}.jpg" for i in range(10)
    }


def test_table_of_paths_becomes_a_set_with_its_accounts(prepared, place):
    info, folder = prepared["photos"], place / "home" / "photos"
    assert (info["layout"], info["kept"], info["gender_known"]) == ("csv", 31, 15)
    assert info["skipped"] == {"not in the label table": 1} and info["rows_without_image"] == 1
    assert info["identities"] == 10 and info["dropped"] == 2 and info["near_groups"] == 1
    assert (folder / "rows_without_image.csv").read_text() == "file\na/gone.jpg\n"
    with (folder / "conflicts.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert {(row["file"], row["age"], row["copy"], row["kept"]) for row in rows} == {
        ("0.jpg", "20", "near", "dropped"),
        ("copy.jpg", "60", "near", "dropped"),
    }
    for path in (folder / "splits").glob("*.csv"):
        assert not {"0.jpg", "copy.jpg"} & read_splits(path).keys()


def test_no_person_is_in_two_splits_and_no_name_in_a_table(prepared, place):
    folder = place / "home" / "agedb"
    labels = read_labels(folder)
    assert prepared["agedb"]["identities"] == len(set(labels["identity"])) == 8
    person = dict(zip(labels["file"], labels["identity"], strict=True))
    for path in (folder / "splits").glob("*.csv"):
        splits = {}
        for file, row in read_splits(path).items():
            splits.setdefault(person[file], set()).add(row.split)
        assert all(len(names) == 1 for names in splits.values()), path
    written = "".join(path.read_text() for path in folder.rglob("*.csv"))
    written += (folder / "prepare.json").read_text()
    assert not re.search("body|else|3rd|x_y", written, re.IGNORECASE)
    assert {"0_20_m.jpg", "39_59_f.jpg"} <= person.keys()


def test_python_of_the_page_runs(prepared, place, monkeypatch, capsys):
    monkeypatch.setenv("COATNET_JAX_HOME", str(place / "home"))
    (code,) = blocks("python")
    exec(compile(code, str(PAGE), "exec"), {})
    assert "(8, 64, 64, 3)" in capsys.readouterr().out
