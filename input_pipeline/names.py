"""Labels written in file names.

UTKFace (Zhang, Song and Qi, CVPR 2017) names a face
`[age]_[gender]_[race]_[date&time].jpg.chip.jpg`. A few names of the set are irregular (no race, no
gender, a space, a missing dot) and still say the age.
"""

import re
from pathlib import PurePosixPath
from typing import NamedTuple

MAX_AGE = 116
UTKFACE_PATTERN = "[age]_[gender 0|1]_[race 0-4]_[date&time].jpg"

# A date and time has 17 digits; a name without race is believed only when the third field is one.
_FULL = re.compile(r"\s*([0-9]+)_([0-9]*)_([0-9]?)_\s*[0-9]")
_NO_RACE = re.compile(r"\s*([0-9]+)_([0-9]+)_[0-9]{14,}")


class FaceLabel(NamedTuple):
    """age in years (0-116); gender 0 male, 1 female; race 0-4 as UTKFace; -1 where unknown."""

    age: int
    gender: int
    race: int


def parse_utkface_name(name: str) -> FaceLabel:
    """Returns the labels in a UTKFace file name; folders before it do not matter.

    A field that is missing becomes -1, except the age. Raises ValueError with the reason when the
    name has another form, or a field is out of its range.
    """
    base = PurePosixPath(name.replace("\\", "/")).name
    if match := _FULL.match(base):
        age, gender, race = match.groups()
    elif match := _NO_RACE.match(base):
        age, gender, race = *match.groups(), ""
    else:
        raise ValueError(f"not a UTKFace name ({UTKFACE_PATTERN})")
    label = FaceLabel(int(age), int(gender or -1), int(race or -1))
    if label.age > MAX_AGE:
        raise ValueError(f"age outside 0-{MAX_AGE} ({label.age})")
    if label.gender > 1:
        raise ValueError(f"gender neither 0 nor 1 ({label.gender})")
    if label.race > 4:
        raise ValueError(f"race outside 0-4 ({label.race})")
    return label
