"""Drawn faces for trying the software: a folder of cartoon heads, named and aged as UTKFace's.

No photograph and no learnt model is in them, only OpenCV polygons, and results on them say nothing
about people. Files are named as in UTKFace (Zhang, Song and Qi, CVPR 2017), so that every later
step runs unchanged.
"""

import datetime
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from input_pipeline.face_drawing import check_range, draw_face
from input_pipeline.files import write_whole
from input_pipeline.images import encode_jpeg

VERSION = 1  # raise it when the drawing changes, so that old folders are drawn anew
OWN_NAME = re.compile(r"\d{1,3}_[01]_[0-4]_1900\d{13}\.jpg\.chip\.jpg")  # UTKFace: 2016, 2017

AGE_KNOTS = (1, 3, 8, 18, 24, 30, 41, 50, 61, 75, 101)  # ages, and the share of faces below each
AGE_SHARES = (0, 0.06, 0.11, 0.18, 0.32, 0.52, 0.72, 0.82, 0.90, 0.97, 1)
RACE_SHARES = (0.42, 0.19, 0.15, 0.17, 0.07)  # UTKFace's order: White, Black, Asian, Indian, Other


def draw_labels(count: int, seed: int) -> list[tuple[int, int, int, str]]:
    """Returns (age, gender, race, file name) of every face; ages 1-100, shares near UTKFace's."""
    rng = np.random.default_rng([seed, count])
    level = (rng.permutation(count) + rng.random(count)) / count  # shares hold at any count
    ages = np.interp(level, AGE_SHARES, AGE_KNOTS).astype(int).tolist()
    genders = (rng.permutation(count) % 2).tolist()
    races = rng.choice(5, size=count, p=RACE_SHARES).tolist()
    start, labels = datetime.datetime(1900, 1, 1), []
    for i, (age, gender, race) in enumerate(zip(ages, genders, races, strict=True)):
        stamp = (start + datetime.timedelta(seconds=37 * i)).strftime("%Y%m%d%H%M%S")
        name = f"{age}_{gender}_{race}_{stamp}{i % 1000:03d}.jpg.chip.jpg"
        labels.append((age, gender, race, name))
    return labels


def write_drawn_faces(
    folder: str | Path,
    *,
    count: int = 2400,
    size: int = 96,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Writes `count` drawn faces as JPEG files with UTKFace's names and returns the folder.

    The same (count, size, seed) gives the same bytes; face i depends on the seed, i and its labels.
    A complete folder is left as it is, an interrupted one is completed, and one that was drawn with
    other parameters is drawn anew. `progress` gets a line of text now and then. Raises ValueError
    for a count, size or seed out of range and for a folder that holds anything else.
    """
    check_range("count", count, 1, 1_000_000)
    check_range("size", size, 16, 1024)
    check_range("seed", seed, 0, 2**63)
    folder, labels = Path(folder), draw_labels(count, seed)
    made = {"drawn": "no photographs", "count": count, "size": size, "seed": seed}
    made["version"] = VERSION
    present = _present(folder, made)
    todo = [(i, *label) for i, label in enumerate(labels) if label[-1] not in present]
    for done, (i, age, gender, race, name) in enumerate(todo, 1):
        face = draw_face(np.random.default_rng([seed, i]), age, gender, race, size)
        write_whole(folder / name, encode_jpeg(face, 92))
        if progress and (done % 400 == 0 or done == len(todo)):
            progress(f"drew {done} of {len(todo)} faces")
    return folder


def marker(folder: Path) -> Path:
    """The file beside the folder that says what was drawn; inside, it would count as a picture."""
    return folder.with_name(f"{folder.name}.json")


def _present(folder: Path, made: dict) -> set[str]:
    """The faces already drawn with these parameters; those drawn with others are deleted."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a folder to draw the faces into")
    folder.mkdir(parents=True, exist_ok=True)
    names = {p.name for p in folder.iterdir() if not p.name.startswith(".")}
    if foreign := sorted(name for name in names if not OWN_NAME.fullmatch(name)):
        raise ValueError(f"{folder} holds {foreign[0]}, no drawn face: name a new or empty folder")
    try:
        if json.loads(marker(folder).read_text()) == made:
            return names
    except (OSError, ValueError):
        pass  # no marker, or one cut short: drawn anew
    for name in names:
        (folder / name).unlink()
    write_whole(marker(folder), json.dumps(made, indent=1).encode())
    return set()
