"""Near copies: found whatever was done to the file, and never two drawn faces; groups of them."""

import cv2
import numpy as np
import pytest

from input_pipeline.face_drawing import draw_face
from input_pipeline.groups import copy_groups, group_keys, joined_groups, members
from input_pipeline.near_duplicates import BITS, NEAR, near_pairs, perceptual_hash


def face(i, size=96):
    rng = np.random.default_rng([7, i])
    return draw_face(rng, 5 + 9 * i, i % 2, i % 5, size)


def distance(a, b):
    return bin(int(perceptual_hash(a), 16) ^ int(perceptual_hash(b), 16)).count("1")


def recompressed(image):
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 30])[1], 1)


CHANGES = {
    "recompressed": recompressed,
    "smaller": lambda image: cv2.resize(image, (41, 41), interpolation=cv2.INTER_AREA),
    "larger": lambda image: cv2.resize(image, (200, 200), interpolation=cv2.INTER_CUBIC),
    "brighter": lambda image: cv2.convertScaleAbs(image, alpha=0.8, beta=40),
    "grey": lambda image: cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB),
    "cut": lambda image: image[1:-1, 1:-1],
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copy_is_near_and_another_face_is_not(change):
    faces = [face(i) for i in range(8)]
    assert all(distance(a, CHANGES[change](a)) <= NEAR for a in faces)
    others = [distance(a, CHANGES[change](b)) for a in faces for b in faces if a is not b]
    assert min(others) > NEAR


def test_all_pairs_are_found_as_a_plain_loop_finds_them():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2, (1500, BITS), np.uint8)  # more than one block
    for i in range(300):  # copies with up to 60 flipped bits
        flipped = rng.choice(BITS, rng.integers(0, 60), replace=False)
        bits[i + 1200] = bits[i * 3]
        bits[i + 1200, flipped] ^= 1
    hashes = [np.packbits(row).tobytes().hex() for row in bits]
    hashes[5] = hashes[6] = ""
    numbers = [int(key, 16) if key else None for key in hashes]
    expected = {
        (i, j)
        for i in range(1500)
        for j in range(max(i + 1, 1200), 1500)
        if None not in (numbers[i], numbers[j]) and (numbers[i] ^ numbers[j]).bit_count() <= NEAR
    }
    found = near_pairs(hashes)
    assert {tuple(pair) for pair in found.tolist()} == expected and len(expected) > 100
    assert near_pairs([]).shape == near_pairs(["", ""]).shape == (0, 2)


def test_equal_hashes_are_joined_without_all_their_pairs():
    pairs = near_pairs([f"{i:064x}" for i in (0, 1 << 60)] * 2000)
    assert pairs.tolist()[0] == [0, 2] and len(pairs) == 3998 + 1
    assert set(copy_groups([""] * 4000, [f"{0:064x}"] * 4000)) == {0}


@pytest.mark.parametrize("seed", range(20))
def test_groups_of_repeated_hashes_are_those_of_a_union_of_all_pairs(seed):
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2, (6, BITS), np.uint8)[rng.integers(0, 6, 40)]
    for row in bits:  # chains: the ends of one may be further apart than NEAR
        row[rng.choice(BITS, rng.integers(0, 50), replace=False)] ^= 1
    hashes = [np.packbits(row).tobytes().hex() for row in bits] + [""]
    hashes = [hashes[i] for i in rng.integers(0, len(hashes), 150)]
    numbers = [int(key, 16) if key else None for key in hashes]
    root = list(range(150))

    def find(row):
        return row if root[row] == row else find(root[row])

    for i, a in enumerate(numbers):
        for j, b in enumerate(numbers[:i]):
            if None not in (a, b) and (a ^ b).bit_count() <= NEAR:
                root[find(i)] = find(j)
    roots = [find(row) for row in range(150)]
    number = {row: n for n, row in enumerate(dict.fromkeys(roots))}
    groups = copy_groups([""] * 150, hashes)
    assert groups.tolist() == [number[row] for row in roots]
    assert 6 < len(number) < len(set(hashes))


def test_picture_without_contrast_is_near_to_nothing():
    assert perceptual_hash(np.full((50, 50, 3), 99, np.uint8)) == ""


def test_groups_join_equal_pixels_near_copies_photos_and_people():
    faces = [face(0), face(1), face(2), recompressed(face(2)), face(3), face(4)]
    near = [perceptual_hash(image) for image in faces]
    pixels = ["b", "b", "a", "c", "d", "e"]  # 0 and 1 are told to be equal
    copies = copy_groups(pixels, near)
    assert members(copies) == [[0, 1], [2, 3]]
    assert members(copy_groups(pixels, near, ["", "p", "p", "", "", ""])) == [[0, 1, 2, 3]]
    people = joined_groups(copies, ["", "x", "", "", "x", ""])
    assert members(people) == [[0, 1, 4], [2, 3]]
    assert group_keys(people, pixels) == ["b", "b", "a", "a", "b", "e"]


def test_name_of_a_group_does_not_hang_on_the_order():
    rng = np.random.default_rng(1)
    pixels = [f"{i:02d}" for i in range(20)]
    people = [str(i % 6) for i in range(20)]
    order = rng.permutation(20)

    def keys(rows):
        copies = copy_groups([pixels[i] for i in rows], [""] * 20)
        groups = joined_groups(copies, [people[i] for i in rows])
        return group_keys(groups, [pixels[i] for i in rows])

    whole = keys(range(20))
    assert keys(order) == [whole[i] for i in order]
