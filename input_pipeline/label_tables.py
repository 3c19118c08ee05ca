"""Labels in CSV tables: a row per picture, with its path and age and whatever else is known.

APPA-REAL (Agustsson et al., FG 2017) comes with such tables (`gt_avg_train.csv`, `_valid`,
`_test`), and with two pictures a row: the photo `train/000000.jpg` and its crop
`train/000000.jpg_face.jpg`.
"""

import csv
import io
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from input_pipeline.names import FaceLabel, bare_name, checked_age, composed, person_id

COLUMNS = {
    "path": ("path", "file", "file_name", "filename", "file_path", "filepath", "image",
             "image_path", "img_path", "img", "img_name", "image_name"),
    "age": ("age", "real_age", "age_years", "apparent_age_avg"),
    "gender": ("gender", "sex"),
    "race": ("race", "ethnicity"),
    "identity": ("identity", "person", "person_id", "subject", "subject_id", "identity_id"),
    "split": ("split", "subset", "partition"),
}  # fmt: skip
_GENDERS = {"0": 0, "m": 0, "male": 0, "man": 0, "1": 1, "f": 1, "female": 1, "woman": 1}
_RACES = {"white": 0, "black": 1, "asian": 2, "indian": 3, "other": 4, "others": 4}
_RACES |= {str(race): race for race in range(5)}
_UNKNOWN = ("", "-1", "-", "?", "na", "n/a", "nan", "none", "null", "unknown")
_SPLITS = {"valid": "validation", "val": "validation", "dev": "validation"}
_SPLITS |= {"training": "train", "testing": "test"}
APPA_REAL_TABLES = ("gt_avg_train.csv", "gt_avg_valid.csv", "gt_avg_test.csv")
_CROP = "_face.jpg"


class _Row(NamedTuple):
    path: str
    label: FaceLabel | str  # or why there is none
    split: str


class LabelTable:
    """The rows of one or several tables; called with a picture's path it gives the labels.

    A row belongs to a picture when one of the two paths is the end of the other, folder by folder:
    the row of the very path before any other, else the one that agrees in the most folders.
    Letters with accents are equal in both of Unicode's forms.
    unknown: how often each value of gender or race was not understood and taken as unknown.
    """

    def __init__(self, rows: Iterable[_Row], *, unknown: Mapping[str, int], crops: bool = False):
        """`crops`: the tables name photos, but their crops (`_face.jpg`) are what is wanted."""
        self._rows: dict[str, list[_Row]] = defaultdict(list)
        for row in rows:
            self._rows["/".join(_parts(row.path))].append(row)
        self._longer: dict[str, list[str]] = defaultdict(list)  # end of a path -> paths of rows
        for path in self._rows:
            for end in _ends(path):
                self._longer[end].append(path)
        self.unknown, self._crops = dict(unknown), crops
        self._shared: set[str] = set()

    def __call__(self, path: str) -> FaceLabel:
        """Returns the labels of the picture; raises ValueError with the reason."""
        if self._crops and not path.endswith(_CROP):
            raise ValueError("whole photo: its face crop is taken instead")
        rows = self._find(path)
        if not rows:
            raise ValueError("not in the label table")
        if self._key(path) in self._shared:
            raise ValueError(f"label row fits several pictures ({rows[0].path})")
        labels = list(dict.fromkeys(row.label for row in rows))
        if len(labels) > 1:
            raise ValueError("the label table says two things of it")
        if isinstance(labels[0], str):
            raise ValueError(labels[0])
        return labels[0]

    def tell_apart(self, paths: Iterable[str]) -> None:
        """Takes the paths of all pictures, and from now on refuses those of several folders that
        one row fits, unless it is the row of the very path."""
        takers: dict[str, set[str]] = defaultdict(set)
        for path in paths:
            if not self._crops or path.endswith(_CROP):
                for row in self._keys(path):
                    takers[row].add(self._key(path))
        self._shared = {
            path for row, found in takers.items() if len(found) > 1 for path in found - {row}
        }

    def short_name(self, path: str) -> str:
        """Returns the name under which a picture is listed: the whole path where the table has its
        name in several folders, whose rows could not be told apart without them."""
        name = bare_name(self._key(path))
        several = len(self._longer.get(name, ())) + (name in self._rows) > 1
        return path if several else bare_name(path)

    def split_of(self, path: str) -> str:
        """Returns the split that the table names for a picture, or '' for none or several."""
        found = self.splits_of(path)
        return found.pop() if len(found) == 1 else ""

    def splits_of(self, path: str) -> set[str]:
        """Returns the splits that rows of a picture name, of rows that disagree all."""
        return {row.split for row in self._find(path)} - {""}

    def without_picture(self, paths: Iterable[str]) -> list[str]:
        """Returns the paths of rows to which none of these pictures belongs."""
        found = {key for path in paths for key in self._keys(path)}
        return [row.path for key, rows in self._rows.items() if key not in found for row in rows]

    def _find(self, path: str) -> list[_Row]:
        return [row for key in self._keys(path) for row in self._rows[key]]

    def _keys(self, path: str) -> list[str]:
        """The paths of the rows that belong to a picture."""
        whole = self._key(path)
        if whole in self._rows:
            return [whole]
        if whole in self._longer:
            return self._longer[whole]
        return [end for end in _ends(whole) if end in self._rows][:1]

    def _key(self, path: str) -> str:
        """The path as the keys are, of a crop that of its photo."""
        return "/".join(_parts(path.removesuffix(_CROP) if self._crops else path))


def read_label_tables(
    tables: Mapping[str, bytes],
    *,
    age_column: str = "",
    crops: bool = False,
    splits_by_name: bool = False,
) -> LabelTable:
    """Returns the table that joins these CSV files, {name: content}.

    Separators are commas, semicolons or tabs. Columns are known by usual names (`COLUMNS`); path
    and age must be there. Ages are rounded to whole years; genders are 0, m, male or 1, f, female;
    races 0-4 or UTKFace's words; whatever else is unknown, -1. `age_column` chooses another age,
    `crops` is as in LabelTable, and with `splits_by_name` a table called `…_train.csv` says the
    split of its rows. Raises ValueError where a table has no rows or lacks a column.
    """
    rows, unknown = [], Counter()
    for name, content in tables.items():
        reader = _reader(content)
        split = bare_name(name).removesuffix(".csv").split("_")[-1] if splits_by_name else ""
        before = len(rows)
        try:
            columns = _columns(name, reader.fieldnames or (), age_column)
            rows += [_row(row, columns, unknown, split) for row in reader if any(row.values())]
        except csv.Error as error:
            raise ValueError(
                f"label table {name} cannot be read after line {reader.line_num} ({error}): is a "
                "quote left open?"
            ) from error
        if len(rows) == before:
            raise ValueError(f"label table {name} has no rows")
    return LabelTable(rows, unknown=unknown, crops=crops)


def is_label_table(content: bytes) -> bool:
    """Whether a CSV file has the columns that a label table needs."""
    try:
        _columns("", _reader(content).fieldnames or (), "")
    except (ValueError, csv.Error):
        return False
    return True


def _reader(content: bytes) -> csv.DictReader:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    head = text.partition("\n")[0]
    separator = max(",;\t", key=head.count)
    return csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)


def _columns(name: str, found: Sequence[str], age_column: str) -> dict[str, str]:
    """Returns {what: column}; raises ValueError where path or age is missing."""
    plain = {(column or "").strip().lower().replace(" ", "_"): column for column in found}
    columns = {}
    for what, usual in COLUMNS.items():
        if column := next((plain[u] for u in usual if u in plain), None):
            columns[what] = column
    if age_column:
        columns.pop("age", None)
        if age_column in found:
            columns["age"] = age_column
    if missing := [what for what in ("path", "age") if what not in columns]:
        wanted = {"path": "file or path", "age": age_column or "age"}
        raise ValueError(
            f"label table {name} has the columns {', '.join(plain) or '(none)'}, but needs "
            f"{' and '.join(wanted[what] for what in missing)}"
        )
    return columns


def _row(row: Mapping, columns: Mapping[str, str], unknown: Counter, split: str) -> _Row:
    value = {what: (row[column] or "").strip() for what, column in columns.items()}
    split = value.get("split", "").lower() or split
    codes = {}
    for what, known in (("gender", _GENDERS), ("race", _RACES)):
        word = value.get(what, "").lower().removesuffix(".0")
        codes[what] = known.get(word, -1)
        if word not in known and word not in _UNKNOWN:
            unknown[f"{what} {word[:20]!r}"] += 1
    person = value.get("identity", "")
    try:
        label = FaceLabel(
            _whole_years(value["age"]),
            **codes,
            identity="" if person.lower() in _UNKNOWN else person_id(person),
        )
    except ValueError as error:
        label = str(error)
    return _Row(value["path"].replace("\\", "/"), label, _SPLITS.get(split, split))


def _whole_years(text: str) -> int:
    try:
        age = float(text)
    except ValueError:
        age = math.nan
    if not math.isfinite(age):
        raise ValueError(f"age in the label table is no number ({text[:20]})")
    return checked_age(math.floor(age + 0.5))


def _parts(path: str) -> tuple[str, ...]:
    """The folders and the name, wherever the path begins (`./a/1.jpg` is `/a/1.jpg`) and however
    its accents are written."""
    return PurePosixPath(composed(path).lstrip("/")).parts or ("",)


def _ends(path: str) -> list[str]:
    """The path without its first folder, without its first two, and so on."""
    parts = path.split("/")
    return ["/".join(parts[start:]) for start in range(1, len(parts))]
