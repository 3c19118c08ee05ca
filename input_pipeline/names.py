"""Labels written in file names and folders, as the usual face sets write them.

UTKFace (Zhang, Song and Qi, CVPR 2017) names a face
`[age]_[gender]_[race]_[date&time].jpg.chip.jpg`, its uncropped photos the same without `.chip.jpg`.
A few names of the set are irregular (no race, no gender, a space, a missing dot) and still say the
age. AgeDB (Moschoglou et al., CVPR Workshops 2017), CACD (Chen, Chen and Hsu, ECCV 2014), AFAD (Niu
et al., CVPR 2016) and All-Age-Faces (Cheng et al., 2019) have forms of their own.
"""

import hashlib
import re
import unicodedata
from pathlib import PurePosixPath
from typing import NamedTuple

MAX_AGE = 116
UTKFACE_PATTERN = "[age]_[gender 0|1]_[race 0-4]_[date&time].jpg"
AGEDB_PATTERN = "[number]_[Name]_[age]_[m|f].jpg"
CACD_PATTERN = "[age]_[Name_Parts]_[4 digits].jpg"
ALL_AGE_FACES_PATTERN = "[5 digits]A[age].jpg"
AFAD_PATTERN = "[age]/[111 male|112 female]/[id].jpg"
FOLDER_PATTERN = "[age]/any name.jpg"

# A date and time has 17 digits; a name without race is believed only when the third field is one.
_FULL = re.compile(r"\s*([0-9]+)_([0-9]*)_([0-9]?)_\s*[0-9]")
_NO_RACE = re.compile(r"\s*([0-9]+)_([0-9]+)_[0-9]{14,}")
_AGEDB = re.compile(r"\s*([0-9]+)_(.+)_([0-9]+)_([mfMF])(?: \([0-9]+\))?(\.\w+)")
_CACD = re.compile(r"\s*([0-9]{1,3})_(.*[^\W\d_].*)_([0-9]{4})(\.\w+)")
_ALL_AGE_FACES = re.compile(r"([0-9]{5})A([0-9]{2,3})\.\w+")
_AGE_FOLDER = re.compile(r"[0-9]{1,3}")
_LAST_FEMALE = 7380  # of All-Age-Faces, by its authors' page


class FaceLabel(NamedTuple):
    """age in years (0-116); gender 0 male, 1 female; race 0-4 as UTKFace; -1 where unknown.

    identity: equal for pictures of one person, never the name itself; '' where unknown.
    """

    age: int
    gender: int = -1
    race: int = -1
    identity: str = ""


def parse_utkface_name(path: str) -> FaceLabel:
    """Returns the labels in a UTKFace file name; folders before it do not matter.

    A field that is missing becomes -1, except the age. Raises ValueError with the reason when the
    name has another form, or a field is out of its range.
    """
    base = _parts(path)[-1]
    if match := _FULL.match(base):
        age, gender, race = match.groups()
    elif match := _NO_RACE.match(base):
        age, gender, race = *match.groups(), ""
    else:
        raise ValueError(f"not a UTKFace name ({UTKFACE_PATTERN})")
    label = FaceLabel(checked_age(int(age)), int(gender or -1), int(race or -1))
    if label.gender > 1:
        raise ValueError(f"gender neither 0 nor 1 ({label.gender})")
    if label.race > 4:
        raise ValueError(f"race outside 0-4 ({label.race})")
    return label


def parse_agedb_name(path: str) -> FaceLabel:
    """Returns the labels in an AgeDB file name; the number counts pictures, the name is the person.

    Raises ValueError with the reason for another form or an age out of range.
    """
    if not (match := _AGEDB.fullmatch(_parts(path)[-1])):
        raise ValueError(f"not an AgeDB name ({AGEDB_PATTERN})")
    _, person, age, gender, _ = match.groups()
    return FaceLabel(checked_age(int(age)), "mf".index(gender.lower()), identity=person_id(person))


def parse_cacd_name(path: str) -> FaceLabel:
    """Returns age and identity in a CACD file name; raises ValueError with the reason."""
    if not (match := _CACD.fullmatch(_parts(path)[-1])):
        raise ValueError(f"not a CACD name ({CACD_PATTERN})")
    return FaceLabel(checked_age(int(match[1])), identity=person_id(match[2]))


def parse_all_age_faces_name(path: str) -> FaceLabel:
    """Returns age and gender in an All-Age-Faces file name; raises ValueError with the reason.

    Every picture shows another person; numbers up to 7380 are women.
    """
    if not (match := _ALL_AGE_FACES.fullmatch(_parts(path)[-1])):
        raise ValueError(f"not an All-Age-Faces name ({ALL_AGE_FACES_PATTERN})")
    return FaceLabel(checked_age(int(match[2])), int(int(match[1]) <= _LAST_FEMALE))


def parse_afad_path(path: str) -> FaceLabel:
    """Returns age and gender in an AFAD path; raises ValueError with the reason.

    Faces with the same number before the hyphen (`292943-1.jpg`) are kept together, as one person.
    """
    folders, name = _parts(path)[:-1], _parts(path)[-1]
    if (
        len(folders) < 2
        or folders[-1] not in ("111", "112")
        or not _AGE_FOLDER.fullmatch(folders[-2])
    ):
        raise ValueError(f"not an AFAD path ({AFAD_PATTERN})")
    number = re.match(r"[0-9]+(?=-)", name)
    identity = person_id(number[0]) if number else ""
    return FaceLabel(checked_age(int(folders[-2])), int(folders[-1]) - 111, identity=identity)


def parse_age_folder(path: str) -> FaceLabel:
    """Returns the age that names the innermost numbered folder; raises ValueError with the reason.

    `25/xyz.jpg`, `020/xyz.jpg` and `train/25/male/xyz.jpg` are read as 25, 20 and 25 years.
    """
    ages = [folder for folder in _parts(path)[:-1] if _AGE_FOLDER.fullmatch(folder)]
    if not ages:
        raise ValueError(f"not in a folder named by an age ({FOLDER_PATTERN})")
    return FaceLabel(checked_age(int(ages[-1])))


def checked_age(age: int) -> int:
    """Returns the age; raises ValueError outside 0-116."""
    if not 0 <= age <= MAX_AGE:
        raise ValueError(f"age outside 0-{MAX_AGE} ({age})")
    return age


def person_id(name: str) -> str:
    """Returns 16 hex digits that stand for a person's name, number or key.

    They keep the name out of tables and reports. They are no secret: whoever guesses a name can
    compute the same digits.
    """
    name = composed(name)
    key = " ".join(re.split(r"[\W_]+", name.casefold())).strip() or name
    return hashlib.sha256(f"person:{key}".encode()).hexdigest()[:16]


def public_name(name: str) -> str:
    """Returns a file name without folders, and without the person's name where AgeDB or CACD has
    one: `9_SomeBody_25_f.jpg` becomes `9_25_f.jpg`, `25_Some_Body_0001.jpg` `25_<id>_0001.jpg`."""
    base = _parts(name)[-1]
    if match := _AGEDB.fullmatch(base):
        return f"{match[1]}_{match[3]}_{match[4].lower()}{match[5]}"
    if match := _CACD.fullmatch(base):
        return f"{match[1]}_{person_id(match[2])}_{match[3]}{match[4]}"
    return base


def bare_name(name: str) -> str:
    """Returns a file name without folders."""
    return _parts(name)[-1]


def composed(name: str) -> str:
    """Returns a name in Unicode's NFC, to compare it with others: a Mac writes letters and their
    accents apart (NFD), most tables together."""
    return unicodedata.normalize("NFC", name)


def _parts(path: str) -> tuple[str, ...]:
    return PurePosixPath(path.replace("\\", "/")).parts or ("",)
