"""How a source says the ages of its pictures: known layouts, and which of them a source has."""

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from input_pipeline.archive import ARCHIVE_WITHIN, Source, list_files, read_tables
from input_pipeline.label_tables import (
    APPA_REAL_TABLES,
    LabelTable,
    is_label_table,
    read_label_tables,
)
from input_pipeline.names import (
    AFAD_PATTERN,
    AGEDB_PATTERN,
    ALL_AGE_FACES_PATTERN,
    CACD_PATTERN,
    FOLDER_PATTERN,
    UTKFACE_PATTERN,
    FaceLabel,
    bare_name,
    parse_afad_path,
    parse_age_folder,
    parse_agedb_name,
    parse_all_age_faces_name,
    parse_cacd_name,
    parse_utkface_name,
    public_name,
)

ReadLabel = Callable[[str], FaceLabel]


@dataclass(frozen=True)
class Layout:
    """A way to name pictures. read_label: labels from a path, or ValueError with the reason;
    short_name: the name under which a picture is listed; table: the label table, if there is one.
    """

    name: str
    about: str
    read_label: ReadLabel
    short_name: Callable[[str], str] = bare_name
    table: LabelTable | None = None


NAMED = {
    layout.name: layout
    for layout in (
        Layout("utkface", f"UTKFace's names, {UTKFACE_PATTERN}", parse_utkface_name),
        Layout("agedb", f"AgeDB's names, {AGEDB_PATTERN}", parse_agedb_name, public_name),
        Layout("cacd", f"CACD's names, {CACD_PATTERN}", parse_cacd_name, public_name),
        Layout(
            "all_age_faces",
            f"All-Age-Faces' names, {ALL_AGE_FACES_PATTERN}",
            parse_all_age_faces_name,
        ),
        Layout("afad", f"AFAD's folders, {AFAD_PATTERN}", parse_afad_path),
        Layout("folder", f"a folder for each age, {FOLDER_PATTERN}", parse_age_folder),
    )
}
CHOICES = ("auto", *NAMED, "csv", "appa_real")


def find_layout(
    source: Source,
    *,
    layout: str = "auto",
    labels: Sequence[str | Path] = (),
    age_column: str = "",
) -> Layout:
    """Returns the layout called `layout`, or the one that `source` has where that is 'auto'.

    `labels` are CSV files beside the source; without them 'csv' and 'appa_real' read those within.
    Raises ValueError, in one line, where no layout or more than one fits, or a table is unusable.
    """
    if layout not in CHOICES:
        raise ValueError(f"unknown layout {layout!r}: choose from {', '.join(CHOICES)}")
    if labels or layout == "csv":
        if layout not in ("auto", "csv"):
            raise ValueError(f"label tables go with the layout csv, not with {layout}")
        tables = {str(path): _read(Path(path)) for path in labels} or _tables_within(source)
        return _table_layout(source, tables, age_column)
    if age_column:
        raise ValueError(f"an age column goes with label tables, not with the layout {layout}")
    if layout == "appa_real":
        return _appa_real(source, read_tables(source))
    return NAMED[layout] if layout in NAMED else _recognise(source)


@dataclass
class _Fit:
    """How the names of a source read in one layout."""

    layout: Layout
    ages: dict[str, int] = field(default_factory=dict)


def _recognise(source: Source) -> Layout:
    names, others = list_files(source)
    if not names:
        raise ValueError(no_images(source, others))
    fits = {fit.layout.name: fit for fit in (_fit(layout, names) for layout in NAMED.values())}
    fits = {name: fit for name, fit in fits.items() if len(fit.ages) * 2 >= len(names)}
    if "afad" in fits:
        fits.pop("folder", None)  # which would read 111 and 112 as ages
    tables = read_tables(source)
    if not fits and any(bare_name(path) in APPA_REAL_TABLES for path in tables):
        return _appa_real(source, tables)
    usable = {path: content for path, content in tables.items() if is_label_table(content)}
    if usable:
        fit = _fit(_table_layout(source, usable, ""), names)
        if len(fit.ages) * 2 >= len(names) or not fits:
            fits["csv"] = fit
    return _only(source, names, list(fits.values()))


def _fit(layout: Layout, names: Sequence[str]) -> _Fit:
    fit = _Fit(layout)
    for name in names:
        try:
            fit.ages[name] = layout.read_label(name).age
        except ValueError:
            pass
    return fit


def _only(source: Source, names: Sequence[str], fits: list[_Fit]) -> Layout:
    """The layout that fits; of several that give every picture the same age, the most telling."""
    if not fits:
        raise ValueError(
            f"{shown(source)}: the ages of its {len(names):,} or more images were not found: not "
            f"in names such as {', '.join(names[:3])}, nor in folders named by ages; give a table "
            "with the columns file and age (--labels=table.csv)"
        )
    first = fits[0]
    for other in fits[1:]:
        both = first.ages.keys() & other.ages.keys()
        differ = sum(first.ages[name] != other.ages[name] for name in both)
        if differ:
            raise ValueError(
                f"{shown(source)} can be read in two ways that give {differ:,} of {len(both):,} "
                f"images different ages: by {first.layout.about}; or by {other.layout.about}; "
                f"choose with --layout={first.layout.name} or --layout={other.layout.name}"
            )
    return first.layout


def _table_layout(source: Source, tables: Mapping[str, bytes], age_column: str) -> Layout:
    table = read_label_tables(tables, age_column=age_column)
    table.tell_apart(list_files(source, limit=math.inf)[0])
    shown = ", ".join(bare_name(path) for path in tables)
    return Layout("csv", f"the label table {shown}", table, table.short_name, table)


def _appa_real(source: Source, tables: Mapping[str, bytes]) -> Layout:
    """APPA-REAL's real ages; the face crops where the source has any, else the photos."""
    found = {path: data for path, data in tables.items() if bare_name(path) in APPA_REAL_TABLES}
    if not found:
        raise ValueError(f"{shown(source)} holds none of {', '.join(APPA_REAL_TABLES)}")
    names, _ = list_files(source, limit=math.inf)
    crops = any(name.endswith("_face.jpg") for name in names)
    table = read_label_tables(found, crops=crops, splits_by_name=True)
    table.tell_apart(names)
    what = "face crops" if crops else "photos"
    about = f"APPA-REAL's tables (real ages) and {what}"
    return Layout("appa_real", about, table, table.short_name, table)


def _tables_within(source: Source) -> dict[str, bytes]:
    tables = read_tables(source)
    usable = {path: content for path, content in tables.items() if is_label_table(content)}
    if not usable:
        raise ValueError(
            f"{shown(source)} holds no CSV table with the columns file and age "
            f"({len(tables)} CSV files): give one with --labels=table.csv"
        )
    return usable


def _read(path: Path) -> bytes:
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise FileNotFoundError(f"label table {path} does not exist")
    return path.read_bytes()


def no_images(source: Source, others: Counter[str]) -> str:
    """Says that a source holds no images, only other files (the number of each reason)."""
    archives = others[ARCHIVE_WITHIN]
    hint = (
        f", {archives} of them archives: unpack it, or name them as the source" if archives else ""
    )
    return f"{shown(source)} holds no images ({others.total()} other files{hint})"


def shown(source: Source) -> str:
    """The paths of a source, for a message."""
    return ", ".join(map(str, source)) if isinstance(source, list | tuple) else str(source)
