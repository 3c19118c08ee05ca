"""Names of UTKFace: the regular ones, the irregular ones, and those that say nothing."""

import pytest

from input_pipeline.names import FaceLabel, parse_utkface_name


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("25_1_2_20170116174525125.jpg.chip.jpg", (25, 1, 2)),
        ("UTKFace/1_0_4_20161219140525218.jpg.chip.jpg", (1, 0, 4)),
        ("crop_part1\\116_1_0_20170120134921760.jpg.chip.jpg", (116, 1, 0)),
        ("0_0_0_20170116174525125.jpg", (0, 0, 0)),
        ("26_1_0_20170116171048641.PNG", (26, 1, 0)),
        ("24_0_1_20170116220224657 .jpg.chip.jpg", (24, 0, 1)),  # a space
        ("55_0_0_20170116232725357jpg.chip.jpg", (55, 0, 0)),  # a dot is missing
        ("21_1_3_201701161745251257.jpg.chip.jpg", (21, 1, 3)),  # 18 digits
        ("39_1_20170116174525125.jpg.chip.jpg", (39, 1, -1)),  # no race
        ("61_1_20170109142408075.jpg.chip.jpg", (61, 1, -1)),
        ("61_1_20170109150557335.jpg.chip.jpg", (61, 1, -1)),
        ("53__0_20170116184028385.jpg", (53, -1, 0)),  # no gender
        ("30_0_1_20170116174525125 (1).jpg", (30, 0, 1)),  # a copy made by a browser
    ],
)
def test_name_gives_age_gender_and_race(name, label):
    assert parse_utkface_name(name) == FaceLabel(*label)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("readme.jpg", "not a UTKFace name"),
        ("200_0_0_20170116174525125.jpg.chip.jpg", "age outside 0-116 \\(200\\)"),
        ("30_3_0_20170116174525125.jpg.chip.jpg", "gender neither 0 nor 1 \\(3\\)"),
        ("30_1_7_20170116174525125.jpg.chip.jpg", "race outside 0-4 \\(7\\)"),
        ("_1_2_20170116174525125.jpg.chip.jpg", "not a UTKFace name"),
        ("20170116_174525.jpg", "not a UTKFace name"),  # a telephone's photo
        ("12_1_2017.jpg", "not a UTKFace name"),  # three numbers, but no date and time
        ("9_JaneDoe_25_f.jpg", "not a UTKFace name"),  # AgeDB
        ("", "not a UTKFace name"),
        ("٢٥_1_2_20170116174525125.jpg", "not a UTKFace name"),  # digits that are not ASCII
    ],
)
def test_name_that_tells_nothing_raises_with_the_reason(name, reason):
    with pytest.raises(ValueError, match=reason):
        parse_utkface_name(name)
