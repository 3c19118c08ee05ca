"""What is in a prepared set: one page with its labels, groups, splits and doubtful pictures."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from coatnet_jax import explore_plots as draw
from coatnet_jax.ages import CLASS_NAMES, age_class
from coatnet_jax.losses import balanced_weights
from coatnet_jax.pages import percent, write_csv, write_report
from coatnet_jax.palette import GENDER_NAMES, RACE_NAMES
from coatnet_jax.report import LOCAL
from coatnet_jax.terms import data_terms
from input_pipeline.groups import copy_groups, members
from input_pipeline.images import decode_rgb
from input_pipeline.pipeline import Faces
from input_pipeline.prepare import read_labels
from input_pipeline.prepared import build_id, read_account
from input_pipeline.progress import Count, duration
from input_pipeline.splits import match_splits, read_splits

BANDS = ((0, 2), (3, 9), (10, 17), (18, 29), (30, 40), (41, 50), (51, 60), (61, 75), (76, 116))
SAMPLES = 8  # pictures of each age band
ON_SHEET = 24  # pictures of each kind of outlier
SHARPNESS_SIDE = 256  # px; larger pictures are shrunk to it before their sharpness is measured
SHARE_BLURRED = 0.01
LABELS = ("age", "gender", "race")

Table = dict[str, np.ndarray]  # a column of labels.csv each, and 'sharpness'


def run(folder: str | Path, *, out: str | Path | None = None) -> Path:
    """Write explore.html and .md, labels.csv and figures/ under `out`; gives back the page's path.

    `folder` is a prepared set, `out` is explore/<name> unless told. labels.csv has a row for each
    picture: labels, class, size, sharpness, number of copies, and its split in each split file.
    Prints a line every two seconds while the pictures are read. Raises FileNotFoundError where
    nothing was prepared, ValueError for an `out` inside the folder.
    """
    folder = Path(folder)
    out = Path(out) if out else Path("explore") / folder.name
    if out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{out} lies within the prepared data {folder}: choose another --out")
    started = time.monotonic()
    build = build_id(folder)
    table = {name: np.array(column) for name, column in read_labels(folder).items()}
    rows = np.arange(len(table["file"]))
    faces = Faces(folder, "all", table, rows, fingerprint="", build=build)
    table["sharpness"] = measure_sharpness(faces)
    splits = split_columns(folder, table)
    copies = members(copy_groups(table["pixel_hash"], table["perceptual_hash"]))
    write_csv(out / "labels.csv", label_rows(table, splits, copies))
    account = read_account(folder)
    figures = out / "figures"
    sections = [
        {"title": "In short", "blocks": short_blocks(folder.name, table)},
        {"title": "Samples", "blocks": sample_blocks(faces, figures)},
        {"title": "Age", "blocks": age_blocks(table, figures)},
        {"title": "Gender and race", "blocks": group_blocks(table, figures)},
        {"title": "Splits", "blocks": split_blocks(table, splits, figures)},
        {"title": "Size", "blocks": size_blocks(faces, figures)},
        {"title": "Sharpness", "blocks": sharpness_blocks(faces, figures)},
        {"title": "Copies", "blocks": copy_blocks(faces, copies, splits, figures)},
        {"title": "Left out", "blocks": skipped_blocks(account)},
    ]
    page, _ = write_report(out, title=f"Data set {folder.name}", sections=sections, name="explore")
    print(f"{len(faces):,} pictures in {duration(time.monotonic() - started)}; open {page}")
    return page


# --- measuring -----------------------------------------------------------------------------------


def measure_sharpness(faces: Faces) -> np.ndarray:
    """The sharpness float64 [n] of every picture; NaN where one cannot be decoded."""
    values: list[float] = []
    count = Count("read", len(faces), "pictures")
    with ThreadPoolExecutor(2) as pool:
        for data in _batches(faces):
            values += pool.map(_sharpness_of_file, data)
            count(len(data))
    return np.array(values)


def _batches(faces: Faces, size: int = 256) -> Iterator[list[bytes]]:
    for start in range(0, len(faces), size):
        yield faces.read_images(range(start, min(start + size, len(faces))))


def _sharpness_of_file(data: bytes) -> float:
    image = decode_rgb(data)
    return float("nan") if image is None else sharpness(image)


def sharpness(image: UInt8[np.ndarray, "h w 3"]) -> float:
    """Variance of the Laplacian of the grey picture: small where it is blurred, or was enlarged.

    Pictures of more than 256 px are shrunk to that first, to be compared with the others.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    scale = SHARPNESS_SIDE / min(grey.shape)
    if scale < 1:
        grey = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return float(cv2.Laplacian(grey, cv2.CV_32F).var())


def split_columns(folder: Path, table: Table) -> dict[str, list[str]]:
    """{split file: split of every picture}, '' for those that it does not name."""
    return {
        path.stem: match_splits(table["file"], table["pixel_hash"], read_splits(path))[0]
        for path in sorted(
            (folder / "splits").glob("*.csv"), key=lambda path: (path.stem != "default", path.stem)
        )
    }


def label_rows(
    table: Table, splits: Mapping[str, Sequence[str]], copies: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    """The rows of labels.csv; gender and race in words, empty where unknown."""
    of_row = {row: len(group) for group in copies for row in group}
    classes = age_class(table["age"])
    return [
        {
            "index": row,
            "file": table["file"][row],
            "age": table["age"][row],
            "class": CLASS_NAMES[classes[row]],
            "gender": _name(GENDER_NAMES, table["gender"][row], ""),
            "race": _name(RACE_NAMES, table["race"][row], ""),
            "width": table["width"][row],
            "height": table["height"][row],
            "sharpness": round(float(table["sharpness"][row]), 1),
            "copies": of_row.get(row, 1),
            "pixel_hash": table["pixel_hash"][row],
            **{f"split_{name}": column[row] for name, column in splits.items()},
        }
        for row in range(len(table["file"]))
    ]


# --- sections ------------------------------------------------------------------------------------


def short_blocks(name: str, table: Table) -> list[dict[str, Any]]:
    """What the set is in two sentences, whose faces they are, and that the page stays here."""
    age, n = table["age"], len(table["age"])
    gender, race = (int(np.sum(table[key] >= 0)) for key in ("gender", "race"))
    text = (
        f"**{n:,} pictures**, ages {age.min()}–{age.max()}, median {np.median(age):g}. The "
        f"gender is known of {gender:,}, the race of {race:,}. `labels.csv` beside this page has "
        "a row for each picture; #12 stands for the one of index 12."
    )
    blocks = [{"text": text}, {"text": data_terms(name)}]
    return blocks if name.startswith("drawn") else [*blocks, {"text": f"**{LOCAL}**"}]


def sample_blocks(faces: Faces, figures: Path) -> list[dict[str, Any]]:
    """A line of pictures for each age band, picked at random with a fixed seed."""
    age, rng, rows = faces.labels["age"], np.random.default_rng(0), []
    for low, high in BANDS:
        found = np.flatnonzero((age >= low) & (age <= high))
        if len(found):
            picked = rng.permutation(found)[:SAMPLES]
            rows.append((f"{low}–{high}\n{len(found):,}", _pictures(faces, picked, draw.SAMPLE)))
    caption = "Pictures picked at random from each band of age (years, and pictures in the band)"
    return [_figure(draw.sample_sheet(figures / "samples.png", rows), caption)]


def age_blocks(table: Table, figures: Path) -> list[dict[str, Any]]:
    """The histogram of ages, the four classes, and the weight that balances each."""
    age = table["age"]
    of_class = age_class(age)
    counts = np.bincount(of_class, minlength=len(CLASS_NAMES)).tolist()
    weights = balanced_weights(of_class, len(CLASS_NAMES))
    rows = [
        {
            "class": name,
            "pictures": n,
            "share": percent(n / len(age)),
            "balanced weight": weight if n else None,
        }
        for name, n, weight in zip(CLASS_NAMES, counts, weights, strict=True)
    ]
    note = (
        "Balanced weight: pictures / (classes that occur × pictures of the class). Always saying "
        f"{CLASS_NAMES[int(np.argmax(counts))]} is right for {percent(max(counts) / len(age))}; "
        f"always saying the median age errs by {np.mean(np.abs(age - np.median(age))):.2f} years."
    )
    figure = draw.ages(figures / "ages.png", age)
    return [_figure(figure, "Pictures of each year of age"), {"table": rows, "note": note}]


def group_blocks(table: Table, figures: Path) -> list[dict[str, Any]]:
    """Bars, the cross table of class, gender and race, and the ages of each group."""
    gender, race = table["gender"], table["race"]
    if np.all(gender < 0) and np.all(race < 0):
        return [{"text": "Neither gender nor race is known of any picture of this set."}]
    arguments = (table["age"], gender, race)
    return [
        _figure(draw.groups(figures / "groups.png", gender, race), "Pictures of each group"),
        _figure(
            draw.cross_table(figures / "cross_table.png", *arguments),
            "Pictures of each age class, gender and race",
        ),
        _figure(
            draw.age_by_group(figures / "age_by_group.png", *arguments),
            "Ages of each group: the violin is the density, the box holds the middle half with "
            "the median, its whiskers reach 1.5 times the box's length",
        ),
    ]


def split_blocks(
    table: Table, splits: Mapping[str, Sequence[str]], figures: Path
) -> list[dict[str, Any]]:
    """Sizes and ages of every split of every split file."""
    rows, ages = [], {}
    for name, column in splits.items():
        column = np.array(column)
        order = ("train", "validation", "test")
        found = sorted(set(column) - {""}, key=lambda s: (order.index(s) if s in order else 9, s))
        ages[name] = {split: table["age"][column == split] for split in found}
        for split, age in ages[name].items():
            shares = np.bincount(age_class(age), minlength=len(CLASS_NAMES)) / len(age)
            rows.append(
                {
                    "split file": name,
                    "split": split,
                    "pictures": len(age),
                    "median age": f"{np.median(age):g}",
                    **{c: percent(v) for c, v in zip(CLASS_NAMES, shares.tolist(), strict=True)},
                }
            )
        if unnamed := int(np.sum(column == "")):
            rows.append({"split file": name, "split": "(none)", "pictures": unnamed})
    ages = {name: of_split for name, of_split in ages.items() if of_split}
    if not ages:
        return []
    figure = draw.split_ages(figures / "splits.png", ages)
    return [{"table": rows}, _figure(figure, "Ages in each split, in steps of five years")]


def size_blocks(faces: Faces, figures: Path) -> list[dict[str, Any]]:
    """The sizes that occur and, where they differ, the smallest pictures."""
    width, height = faces.labels["width"], faces.labels["height"]
    common = Counter(zip(width.tolist(), height.tolist(), strict=True)).most_common(8)
    rows = [
        {"size in pixels": f"{w} × {h}", "pictures": n, "share": percent(n / len(faces))}
        for (w, h), n in common
    ]
    short = np.minimum(width, height)
    if short.min() == short.max():
        return [{"text": f"Every picture is {short[0]} pixels at its shorter side."}, _table(rows)]
    smallest = np.argsort(short, kind="stable")[:ON_SHEET]
    texts = [f"{width[row]} × {height[row]} px" for row in smallest]
    sheet = _sheet(faces, smallest, texts, figures / "smallest.png")
    return [
        _table(rows, note="The most frequent sizes, width × height" if len(common) > 7 else ""),
        _figure(draw.sizes(figures / "sizes.png", width, height), "Shorter side of the pictures"),
        _figure(sheet, f"The {len(smallest)} smallest pictures"),
    ]


def sharpness_blocks(faces: Faces, figures: Path) -> list[dict[str, Any]]:
    """How sharp the pictures are, and the most blurred ones."""
    values = faces.labels["sharpness"]
    readable = np.isfinite(values)
    if not readable.any():
        return [{"text": "None of the pictures can be decoded."}]
    limit = float(np.quantile(values[readable], SHARE_BLURRED))
    order = np.argsort(np.where(readable, values, np.inf), kind="stable")
    blurred = order[: min(ON_SHEET, int(readable.sum()))]
    sheet = _sheet(faces, blurred, [f"{values[row]:.1f}" for row in blurred], figures / "blur.png")
    figure = draw.sharpness(figures / "sharpness.png", values[readable], limit)
    lost = f" {np.sum(~readable):,} pictures cannot be decoded." if not readable.all() else ""
    text = (
        "Sharpness is the variance of the Laplacian of the grey picture (shrunk to "
        f"{SHARPNESS_SIDE} px where it is larger). It is low for blurred pictures, for small ones "
        "that were enlarged and for dark or pale ones of little contrast, and high for noise."
        f"{lost}"
    )
    return [
        {"text": text},
        _figure(figure, f"Median {np.median(values[readable]):.0f}, lowest hundredth {limit:.0f}"),
        _figure(sheet, f"The {len(blurred)} most blurred pictures, with their sharpness"),
    ]


def copy_blocks(
    faces: Faces,
    copies: Sequence[Sequence[int]],
    splits: Mapping[str, Sequence[str]],
    figures: Path,
) -> list[dict[str, Any]]:
    """How many pictures are there twice, and the groups that disagree, widest in age first."""
    if not copies:
        return [{"text": "No picture is there twice."}]
    labels = faces.labels
    same = [g for g in copies if len(set(labels["pixel_hash"][g].tolist())) == 1]
    near = [g for g in copies if len(set(labels["pixel_hash"][g].tolist())) > 1]
    blocks = [{"text": _parted(copies, splits)}]
    for groups, what in (
        (same, "pixel-identical"),
        (near, "one photo, not all of the same pixels"),
    ):
        differ = [
            f"the {key} in {sum(np.ptp(labels[key][g]) > 0 for g in groups):,}" for key in LABELS
        ]
        text = (
            f"**{len(groups):,} groups of {sum(map(len, groups)):,} pictures are {what}**; labels "
            f"differ: {', '.join(differ)}."
        )
        blocks.append({"text": text})
        groups = [g for g in groups if any(np.ptp(labels[key][g]) for key in LABELS)]
        groups.sort(key=lambda g: -int(np.ptp(labels["age"][g])))
        if groups and groups[0] in same:
            blocks.append(_same_sheet(faces, groups, figures / "copies.png"))
        elif groups:
            blocks.append(_near_sheet(faces, groups, figures / "near_copies.png"))
    return blocks


def _same_sheet(faces: Faces, groups: Sequence[Sequence[int]], path: Path) -> dict[str, Any]:
    """One picture for each group, with the labels of each copy."""
    shown = groups[:ON_SHEET]
    pictures = _pictures(faces, [group[0] for group in shown])
    texts = [_copy_texts(faces.labels, group) for group in shown]
    sheet = draw.captioned_sheet(path, list(zip(pictures, texts, strict=True)))
    return _figure(
        sheet,
        f"Identical pictures with different labels, a line for each copy: {len(shown)} of "
        f"{len(groups)} groups, those whose ages differ most",
    )


def _near_sheet(faces: Faces, groups: Sequence[Sequence[int]], path: Path) -> dict[str, Any]:
    """The youngest and the oldest of each group side by side, with their labels."""
    labels, age, shown = faces.labels, faces.labels["age"], groups[: ON_SHEET // 2]
    pairs = [(min(g, key=lambda i: age[i]), max(g, key=lambda i: (age[i], i))) for g in shown]
    rows = [row for pair in pairs for row in pair]
    texts = [[_labels_of(labels, row), f"#{row}"] for row in rows]
    sheet = draw.captioned_sheet(path, list(zip(_pictures(faces, rows), texts, strict=True)))
    return _figure(
        sheet,
        f"Pairs of one photo in other pixels with different labels: {len(shown)} of {len(groups)} "
        "groups, those whose ages differ most",
    )


def _parted(copies: Sequence[Sequence[int]], splits: Mapping[str, Sequence[str]]) -> str:
    """How many groups of copies lie in more than one split of each split file."""
    parted = {
        name: sum(len({column[row] for row in group} - {""}) > 1 for group in copies)
        for name, column in splits.items()
    }
    whole = ", ".join(f"`{name}`" for name, n in parted.items() if not n)
    torn = ", ".join(f"{n:,} in `{name}`" for name, n in parted.items() if n)
    parts = [f"none in {whole}"] * bool(whole) + [torn] * bool(torn)
    return f"Groups of copies that lie in two splits: {'; '.join(parts)}."


def _copy_texts(labels: Table, group: Sequence[int]) -> list[str]:
    """A line for each copy, four at most."""
    texts = [_labels_of(labels, row) for row in group]
    return texts if len(texts) <= 4 else [*texts[:3], f"and {len(texts) - 3} more"]


def skipped_blocks(account: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was not taken over when the set was prepared, by reason."""
    skipped = account.get("skipped", {})
    if not skipped:
        return [{"text": "Every file that was found is in the set."}]
    rows = [{"reason": reason, "files": n} for reason, n in skipped.items()]
    return [_table(rows, note="Each file is listed in `skipped.csv` of the prepared set")]


def _sheet(faces: Faces, rows: Sequence[int], texts: Sequence[str], path: Path) -> Path:
    """Pictures with a text each, and their labels and number below it."""
    tiles = [
        (picture, [text, _labels_of(faces.labels, row), f"#{row}"])
        for row, text, picture in zip(rows, texts, _pictures(faces, rows), strict=True)
    ]
    return draw.captioned_sheet(path, tiles)


def _pictures(
    faces: Faces, rows: Sequence[int], side: int = draw.TILE
) -> list[UInt8[np.ndarray, "s s 3"]]:
    """Decoded pictures as squares of `side` px; a grey one for what cannot be decoded.

    Each is shrunk before the next is read: as they are, dozens of photos do not fit the memory.
    """
    found = (decode_rgb(faces.read_images([row])[0]) for row in rows)
    return [
        draw.square(np.full((64, 64, 3), 180, np.uint8) if p is None else p, side) for p in found
    ]


def _labels_of(labels: Table, row: int) -> str:
    """'23 y f White', without what is unknown."""
    gender = _name(("m", "f"), labels["gender"][row], "")
    race = _name(RACE_NAMES, labels["race"][row], "")
    return " ".join(part for part in (f"{labels['age'][row]} y", gender, race) if part)


def _name(names: Sequence[str], label: int, unknown: str) -> str:
    return names[label] if 0 <= label < len(names) else unknown


def _figure(path: Path, caption: str) -> dict[str, Any]:
    return {"figure": path, "caption": caption, "wide": True}


def _table(rows: Sequence[Mapping[str, Any]], note: str = "") -> dict[str, Any]:
    return {"table": rows, "note": note}
