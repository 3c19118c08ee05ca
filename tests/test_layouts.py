"""Layouts of the usual sets: what their names say, which one a source has, and label tables."""

import itertools
import pickle
import random
import time
import zipfile

import pytest

from input_pipeline.label_tables import read_label_tables
from input_pipeline.layouts import find_layout
from input_pipeline.names import (
    FaceLabel,
    parse_afad_path,
    parse_age_folder,
    parse_agedb_name,
    parse_all_age_faces_name,
    parse_cacd_name,
    person_id,
    public_name,
)

STAMP = "20170116174525125"


@pytest.mark.parametrize(
    ("parse", "path", "label"),
    [
        (parse_agedb_name, "AgeDB/7_SomeBody_40_f.jpg", (40, 1, -1, person_id("SomeBody"))),
        (parse_agedb_name, "8_Zoë O'Some-Body_Jr._9_M.jpg", (9, 0, -1, "*")),
        (parse_agedb_name, "9_12_40_m (1).jpg", (40, 0, -1, person_id("12"))),
        (parse_cacd_name, "CACD2000/14_Some_Body_0001.jpg", (14, -1, -1, person_id("Some Body"))),
        (parse_afad_path, "AFAD-Full/15/111/292943-1.jpg", (15, 0, -1, person_id("292943"))),
        (parse_afad_path, "72/112/7.jpg", (72, 1, -1, "")),
        (parse_all_age_faces_name, "aligned faces/07380A02.jpg", (2, 1, -1, "")),
        (parse_all_age_faces_name, "07381A80.jpg", (80, 0, -1, "")),
        (parse_age_folder, "25/xyz.jpg", (25, -1, -1, "")),
        (parse_age_folder, "face_age\\020\\1.png", (20, -1, -1, "")),
        (parse_age_folder, "train/31/male/xyz.jpg", (31, -1, -1, "")),
    ],
)
def test_path_gives_the_labels_of_its_set(parse, path, label):
    found = parse(path)
    assert found[:3] == label[:3]
    assert found.identity == label[3] or (label[3] == "*" and len(found.identity) == 16)


@pytest.mark.parametrize(
    ("parse", "path", "reason"),
    [
        (parse_agedb_name, f"40_1_2_{STAMP}.jpg", "not an AgeDB name"),
        (parse_agedb_name, "7_SomeBody_140_f.jpg", "age outside 0-116 \\(140\\)"),
        (parse_cacd_name, f"40_1_2_{STAMP}.jpg.chip.jpg", "not a CACD name"),
        (parse_cacd_name, "40_12_0001.jpg", "not a CACD name"),  # no letter: no name of a person
        (parse_afad_path, "15/113/7.jpg", "not an AFAD path"),
        (parse_all_age_faces_name, "7381A80.jpg", "not an All-Age-Faces name"),
        (parse_age_folder, "photos/7.jpg", "not in a folder named by an age"),
        (parse_age_folder, "117/7.jpg", "age outside 0-116 \\(117\\)"),
    ],
)
def test_path_of_another_form_raises_with_the_reason(parse, path, reason):
    with pytest.raises(ValueError, match=reason):
        parse(path)


def test_one_person_has_one_identity_and_two_have_two():
    same = {person_id(name) for name in ("Some_Body", "some body", " SOME  BODY ")}
    assert len(same) == 1 and same != {person_id("Somebody")}
    assert person_id("???") != person_id("!!!")  # nothing but signs is still told apart


def test_listed_names_hold_no_name_of_a_person():
    assert public_name("AgeDB/7_Some_Body_40_F.jpg") == "7_40_f.jpg"
    assert public_name("14_Some_Body_0001.jpg") == f"14_{person_id('Some Body')}_0001.jpg"
    assert public_name(f"a/40_1_2_{STAMP}.jpg.chip.jpg") == f"40_1_2_{STAMP}.jpg.chip.jpg"


def write_zip(path, names, tables=()):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
        for name, text in dict(tables).items():
            archive.writestr(name, text)
    return path


SETS = {
    "utkface": [f"part1/{age}_0_2_{STAMP}.jpg" for age in range(9)],
    "agedb": [f"AgeDB/{i}_SomeBody_{i + 20}_m.jpg" for i in range(9)],
    "cacd": [f"CACD2000/{i + 20}_Some_Body_{i:04d}.jpg" for i in range(9)],
    "afad": [f"AFAD-Full/{i + 15}/{111 + i % 2}/29294{i}-0.jpg" for i in range(9)],
    "all_age_faces": [f"original images/0738{i}A{i + 20}.jpg" for i in range(9)],
    "folder": [f"face_age/{i + 1:03d}/{i}.png" for i in range(9)],
}


@pytest.mark.parametrize("name", SETS)
def test_layout_of_a_source_is_recognised(tmp_path, name):
    odd = ["readme.jpg", "notes.txt", "__MACOSX/._x.jpg"]
    assert find_layout(write_zip(tmp_path / "a.zip", SETS[name] + odd)).name == name


def test_label_table_inside_a_source_is_recognised(tmp_path):
    table = "Image;Age;Sex\n" + "".join(f"images/{i}.jpg;{i + 20};f\n" for i in range(9))
    names = [f"images/{i}.jpg" for i in range(9)]
    layout = find_layout(write_zip(tmp_path / "a.zip", names, {"labels.csv": table}))
    assert layout.name == "csv" and layout.read_label("images/3.jpg") == FaceLabel(23, 1)


def appa_real(crops):
    names, tables = [], {}
    for k, part in enumerate(("train", "valid", "test")):
        tables[f"gt_avg_{part}.csv"] = (
            "file_name,num_ratings,apparent_age_avg,apparent_age_std,real_age\n"
            + "".join(f"{i:06d}.jpg,30,{i + 19.6},2.5,{i + 20}\n" for i in range(3 * k, 3 * k + 3))
        )
        names += [f"{part}/{i:06d}.jpg" for i in range(3 * k, 3 * k + 3)]
    return names + [f"{name}_face.jpg" for name in names if crops], tables


@pytest.mark.parametrize("crops", [True, False])
def test_appa_real_is_recognised_and_gives_real_ages_and_its_splits(tmp_path, crops):
    layout = find_layout(write_zip(tmp_path / "a.zip", *appa_real(crops)))
    end = "_face.jpg" if crops else ""
    assert layout.name == "appa_real"
    assert layout.read_label(f"valid/000004.jpg{end}") == FaceLabel(24)
    parts = [layout.table.split_of(f"{i:06d}.jpg{end}") for i in (0, 4, 8)]
    assert parts == ["train", "validation", "test"]
    if crops:
        with pytest.raises(ValueError, match="its face crop is taken instead"):
            layout.read_label("valid/000004.jpg")


def test_numbered_folders_of_utkface_are_ambiguous_until_one_is_chosen(tmp_path):
    names = [f"{i}/{i + 30}_0_2_{STAMP}.jpg" for i in range(9)]
    source = write_zip(tmp_path / "a.zip", names)
    with pytest.raises(ValueError, match="9 of 9 images different ages.*--layout=utkface") as error:
        find_layout(source)
    assert "\n" not in str(error.value)
    assert find_layout(source, layout="folder").read_label(names[3]).age == 3
    agreeing = write_zip(tmp_path / "b.zip", [f"{i}/{i}_0_2_{STAMP}.jpg" for i in range(9)])
    assert find_layout(agreeing).name == "utkface"


def test_table_that_contradicts_the_names_is_ambiguous(tmp_path):
    table = "file,age\n" + "".join(f"{name},{99}\n" for name in SETS["agedb"])
    with pytest.raises(
        ValueError, match="9 of 9 .* by AgeDB's names.*; or by the label table t.csv"
    ):
        find_layout(write_zip(tmp_path / "a.zip", SETS["agedb"], {"t.csv": table}))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "ages of its 2 or more images were not found.*--labels=table.csv"),
        ({"layout": "csv"}, "holds no CSV table"),
        ({"layout": "appa_real"}, "holds none of gt_avg_train.csv"),
        ({"layout": "imdb"}, "unknown layout 'imdb': choose from auto"),
        ({"layout": "agedb", "labels": ["t.csv"]}, "not with agedb"),
        ({"layout": "agedb", "age_column": "years"}, "goes with label tables"),
    ],
)
def test_source_without_a_layout_raises_one_clear_line(tmp_path, options, reason):
    source = write_zip(tmp_path / "a.zip", ["x/me.jpg", "x/you.jpg"])
    with pytest.raises(ValueError, match=reason) as error:
        find_layout(source, **options)
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="label table none.csv does not exist"):
        find_layout(source, labels=["none.csv"])


def table(text, **options):
    return read_label_tables({"t.csv": text.encode()}, **options)


def test_table_reads_words_numbers_and_unknowns():
    found = table(
        "File Name,age,sex,race,person,subset\n"
        "a.jpg,25,F,White,Some Body,train\n"
        "b.jpg,30.5,male,2,,val\n"
        "c.jpg,0,,Latino,nan,test\n"
        "d.jpg,,1,0,,\n"
        "e.jpg,130,1,0,,\n"
    )
    assert found("a.jpg") == FaceLabel(25, 1, 0, person_id("Some Body"))
    assert found("x/b.jpg") == FaceLabel(31, 0, 2)
    assert found("c.jpg") == FaceLabel(0, -1, -1)
    assert found.unknown == {"race 'latino'": 1}
    assert [found.split_of(f"{x}.jpg") for x in "abcd"] == ["train", "validation", "test", ""]
    for path, reason in (("d.jpg", "no number"), ("e.jpg", "outside 0-116"), ("f.jpg", "not in")):
        with pytest.raises(ValueError, match=reason):
            found(path)


def test_paths_match_from_their_ends_folder_by_folder():
    found = table("path\tage\n/home/me/set/a/x.jpg\t20\n/home/me/set/b/x.jpg\t30\ny.jpg\t40\n")
    assert found("a/x.jpg").age == 20 and found("set/b/x.jpg").age == 30
    assert found("deep/down/y.jpg").age == 40
    for path, reason in (("x.jpg", "two things"), ("c/x.jpg", "not in"), ("ay.jpg", "not in")):
        with pytest.raises(ValueError, match=reason):
            found(path)
    assert found.without_picture(["a/x.jpg"]) == ["/home/me/set/b/x.jpg", "y.jpg"]
    assert found.without_picture(["a/x.jpg", "c/x.jpg", "b/x.jpg", "in/y.jpg"]) == []


def test_accents_of_a_mac_and_of_a_table_are_the_same():
    apart, together = "Zoe\u0308/cafe\u0301.jpg", "Zo\u00eb/caf\u00e9.jpg"
    for row, picture in ((apart, together), (together, apart)):
        found = table(f"file,age,split\n{row},20,test\nb.jpg,30,train\n")
        assert found(f"set/{picture}") == FaceLabel(20) and found.split_of(picture) == "test"
        assert found.short_name(picture) == picture.split("/")[1]
        assert found.without_picture([picture, "b.jpg"]) == []
    assert person_id(apart) == person_id(together) != person_id("Zoe cafe.jpg")


def test_row_of_the_very_path_wins_and_then_the_one_that_agrees_longest():
    paths = ["/".join(p) for n in (1, 2, 3) for p in itertools.product("ab", repeat=n)]
    rng = random.Random(0)
    for _ in range(300):
        rows = rng.sample(paths, 4)
        found = table("file,age\n" + "".join(f"{row},{i}\n" for i, row in enumerate(rows)))
        for picture in paths:
            # How many parts agree from the end, where that is all that one of the two has.
            length = dict.fromkeys(rows, 0)
            for row in rows:
                pairs = list(zip(row.split("/")[::-1], picture.split("/")[::-1], strict=False))
                length[row] = len(pairs) if all(a == b for a, b in pairs) else 0
            best = max(length.values())
            right = [i for i, row in enumerate(rows) if best and length[row] == best]
            if picture in rows:
                right = [rows.index(picture)]
            if len(right) == 1:
                assert found(picture).age == right[0], (rows, picture)
            else:
                with pytest.raises(ValueError, match="two things" if right else "not in the label"):
                    found(picture)


def test_row_that_fits_pictures_of_several_folders_is_told_for_none(tmp_path):
    (tmp_path / "t.csv").write_text("file,age\n1.jpg,20\na/1.jpg,40\n2.jpg,60\n3.jpg,30\n")
    names = ["1.jpg", "a/1.jpg", "b/1.jpg", "b/2.jpg", "c/2.jpg", "c/3.jpg"]
    source = write_zip(tmp_path / "a.zip", names)
    layout = find_layout(source, labels=[tmp_path / "t.csv"])
    ages = {name: layout.read_label(name).age for name in ("1.jpg", "a/1.jpg", "c/3.jpg")}
    assert ages == {"1.jpg": 20, "a/1.jpg": 40, "c/3.jpg": 30}
    for name in ("b/1.jpg", "b/2.jpg", "c/2.jpg"):
        with pytest.raises(ValueError, match=rf"fits several pictures \({name[2:]}\)"):
            layout.read_label(name)
    assert layout.table.without_picture(names) == []


def test_pictures_of_one_name_in_many_folders_are_found_in_time():
    names = [f"p{i:06}/face.jpg" for i in range(6000)]
    found = table("file,age\n" + "".join(f"{name},{i % 90}\n" for i, name in enumerate(names)))
    started = time.monotonic()
    assert [found(name).age for name in names] == [i % 90 for i in range(6000)]
    assert found.without_picture(names[1:] + ["q/face.jpg"] * 1000) == names[:1]
    assert time.monotonic() - started < 3  # a quarter of a minute where each row is looked at


def test_pictures_whose_names_repeat_in_a_table_are_listed_with_their_folders():
    text = "file,age,split\ntrain/1.jpg,20,train\ntest/1.jpg,30,test\ntrain/2.jpg,40,train\n"
    found = pickle.loads(pickle.dumps(table(text).short_name))  # it travels to Beam's workers
    assert [found(f"set/{path}") for path in ("train/1.jpg", "test/1.jpg", "train/2.jpg")] == [
        "set/train/1.jpg",
        "set/test/1.jpg",
        "2.jpg",
    ]


def test_picture_with_rows_of_two_splits_is_in_none():
    found = table("file,age,split\na.jpg,20,train\na.jpg,20,test\nb.jpg,3,\nb.jpg,3,test\n")
    assert [found.split_of(path) for path in ("a.jpg", "b.jpg")] == ["", "test"]


def test_age_column_can_be_chosen():
    text = "file_name,apparent_age_avg,real_age\na.jpg,21.6,25\n"
    assert table(text)("a.jpg").age == 25
    assert table(text, age_column="apparent_age_avg")("a.jpg").age == 22


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        ("file,years\na.jpg,3\n", {}, "has the columns file, years, but needs age"),
        ("a,b\n", {}, "needs file or path and age"),
        ("", {}, "has the columns \\(none\\)"),
        ("file,age\n", {}, "has no rows"),
        ("file,age\na.jpg,3\n", {"age_column": "guess"}, "needs guess"),
        (
            'file,age,note\na.jpg,3,"sic\nb.jpg,4,\n',
            {},
            "after line 1 .unexpected end of data.: is",
        ),
        (f'file,age,"{"b" * 200_000}', {}, "t.csv cannot be read after line 0 .* is a quote"),
    ],
)
def test_unusable_table_raises_with_the_reason(text, options, reason):
    with pytest.raises(ValueError, match=reason):
        table(text, **options)
