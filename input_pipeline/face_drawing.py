"""A face as OpenCV polygons: one function for each part, from the background to the photograph."""

import math

import cv2
import numpy as np
from jaxtyping import UInt8

from input_pipeline.face_traits import Traits, pick_traits
from input_pipeline.images import decode_rgb, encode_jpeg

CANVAS = 160  # faces are drawn at least this large and then shrunk, which smooths every edge
GREY = np.array([205, 203, 200], np.float32)
INK = (28, 18, 20)
SIDES = (1, -1)


class _Canvas:
    """A float RGB picture and the pose: head coordinates (x right, y down, chin at 1) -> pixels."""

    def __init__(self, rng: np.random.Generator, side: int):
        self.side = side
        self.image = np.zeros((side, side, 3), np.float32)
        self.unit = side / 2 / rng.uniform(1.1, 1.3)
        self.yaw, self.pitch, roll = rng.normal(size=3) * (0.22, 0.06, 0.09)
        self.turn = np.array([[math.cos(roll), math.sin(roll)], [-math.sin(roll), math.cos(roll)]])
        self.centre = side * (0.5 + rng.normal(size=2) * 0.02 - (0, 0.02))

    def pixels(self, points, flat: bool) -> np.ndarray:
        """Pixels [k,2]; unless flat, points lie on a rounded head and shift as it turns."""
        x, y = np.asarray(points, float).T
        if not flat:
            depth = 0.75 * np.sqrt(np.maximum(1 - (x / 0.95) ** 2 - (y / 1.4) ** 2, 0))
            x = x * math.cos(self.yaw) + depth * math.sin(self.yaw)
            y = y + depth * self.pitch
        return np.stack([x, y], -1) @ self.turn * self.unit + self.centre

    def draw(self, shapes, colour, *, width=0.0, alpha=1.0, soft=0.0, flat=False, clip=None):
        """Blend shapes (a list of [k,2]), filled or as lines; `colour` is RGB or a picture."""
        pixels = self.pixels(np.concatenate(shapes), flat)
        margin = int(2 + (width + 3 * soft) * self.unit)
        x0, y0 = (min(self.side - 1, max(0, int(v) - margin)) for v in pixels.min(0))
        x1, y1 = (max(1, min(self.side, int(v) + margin + 1)) for v in pixels.max(0))
        mask = np.zeros((max(1, y1 - y0), max(1, x1 - x0)), np.uint8)
        fixed = np.rint((pixels - (x0, y0)) * 16).astype(np.int32)  # OpenCV's shift of 4 bits
        parts = np.split(fixed, np.cumsum([len(s) for s in shapes])[:-1])
        if width:
            thickness = max(1, round(width * self.unit))
            cv2.polylines(mask, parts, False, 255, thickness, cv2.LINE_AA, 4)
        else:
            for part in parts:
                cv2.fillPoly(mask, [part], 255, cv2.LINE_AA, 4)
        if soft:
            reach = 2 * round(2.2 * soft * self.unit) + 1  # a triangle of this spread: fast
            mask = cv2.stackBlur(mask, (reach, reach))
        box = slice(y0, y0 + mask.shape[0]), slice(x0, x0 + mask.shape[1])
        weight = mask.astype(np.float32) * np.float32(alpha / 255)
        if clip is not None:
            weight *= clip[box]
        colour = np.asarray(colour, np.float32)
        target = self.image[box]
        target += ((colour[box] if colour.ndim == 3 else colour) - target) * weight[..., None]

    def mask(self, shape, *, flat: bool = False) -> np.ndarray:
        """The filled shape as float [side,side], 0-1."""
        mask = np.zeros((self.side, self.side), np.uint8)
        points = np.rint(self.pixels(shape, flat) * 16).astype(np.int32)
        cv2.fillPoly(mask, [points], 255, cv2.LINE_AA, 4)
        return mask.astype(np.float32) / 255


def _curve(points, *, closed: bool = False, steps: int = 8) -> np.ndarray:
    """A Catmull-Rom curve through the points: [k,2] -> about [k*steps,2]."""
    p = np.asarray(points, float)
    p = np.concatenate([p[-1:], p, p[:2]] if closed else [p[:1], p, p[-1:]])
    t = np.arange(steps)[:, None] / steps
    bases = -t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2
    weights = np.concatenate(bases, 1) / 2
    windows = np.stack([p[i : len(p) - 3 + i] for i in range(4)], 1)
    return np.concatenate([(weights @ windows).reshape(-1, 2), p[-2:-1]])


def _outline(half) -> np.ndarray:
    """The right half of an outline, from its top to its bottom point -> the whole, smooth."""
    half = np.asarray(half, float)
    return _curve(np.concatenate([half, half[-2:0:-1] * (-1, 1)]), closed=True)


def _both(points, *, closed: bool = False) -> list[np.ndarray]:
    """A curve on the right side of the face, and its mirror image."""
    curve = _curve(points, closed=closed)
    return [curve * (side, 1) for side in SIDES]


def _disc(x: float, y: float, across: float, down: float) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 24)
    return np.stack([x + across * np.cos(angle), y + down * np.sin(angle)], -1)


def _noise(rng, side: int, rows: int, columns: int) -> np.ndarray:
    """Smooth noise [side,side,1] of about unit spread, with so many lumps down and across."""
    lumps = rng.normal(size=(rows, columns)).astype(np.float32)
    return cv2.resize(lumps, (side, side), interpolation=cv2.INTER_CUBIC)[..., None]


def _background(rng, canvas: _Canvas) -> None:
    base = rng.uniform(25, 235) + rng.normal(size=3) * 28
    lumps = int(rng.choice([2, 3, 6, 14]))
    hue = rng.normal(size=3) * rng.uniform(2, 22)
    texture = _noise(rng, canvas.side, lumps, lumps) * hue.astype(np.float32)
    np.clip(texture + base.astype(np.float32), 0, 255, out=canvas.image)


def _hair_texture(rng, t: Traits, side: int) -> np.ndarray:
    """Locks or curls [side,side,3], some greyer than others."""
    strands = _noise(rng, side, 34, 34) * 0.6 if t.curly else _noise(rng, side, 4, 64)
    patches = _noise(rng, side, 4, 5)
    grey = np.clip(t.grey * (1 + 0.3 * strands + 0.25 * (1 - t.grey) * patches), 0, 1)
    return (t.hair + (GREY - t.hair) * grey) * (1 + 0.12 * strands + 0.06 * patches)


def _back_hair(canvas: _Canvas, t: Traits, hair: np.ndarray) -> None:
    volume = t.hair_volume
    if t.hair_style == "bun":
        canvas.draw([_disc(0, -1.06 - volume, 0.27, 0.2)], hair * 0.85, flat=True)
    if t.hair_style in ("long", "bob"):
        end = 1.6 if t.hair_style == "long" else 0.75
        w = t.cheek + 0.08 + volume
        half = [
            (0, -1.06 - volume),
            (w * 0.56, -0.95 - 0.6 * volume),
            (w * 0.94, -0.58),
            (w * 1.02, -0.1),
            (w * 1.03, 0.4),
            (w * 0.95, end),
            (0, end),
        ]
        canvas.draw([_outline(half)], hair * 0.8, flat=True)


def _body(rng, canvas: _Canvas, t: Traits) -> None:
    neck = 0.3 + 0.1 * t.jaw * (1 - t.child)
    canvas.draw([_disc(0, 1.1, neck, 1)], t.skin * 0.72, flat=True)
    shirt = [(0, 1.28), (neck, 1.1), (0.6, 1.2), (1.6, 1.5), (1.6, 2.2), (0, 2.2)]
    canvas.draw([_outline(shirt)], rng.uniform(20, 235, 3), flat=True)
    if t.hair_style not in ("long", "bob"):
        for x in (-t.cheek - 0.02, t.cheek + 0.02):
            y = t.eye_y + 0.15
            canvas.draw([_disc(x, y, 0.085, t.ear)], t.skin * 0.88, flat=True)
            canvas.draw([_disc(x, y, 0.045, t.ear * 0.55)], t.skin * 0.66, width=0.02, flat=True)


def _head(rng, canvas: _Canvas, t: Traits) -> np.ndarray:
    """Skin with blotches, blush and age spots; returns the head's mask [side,side]."""
    cheek, sag, side = t.cheek, 0.09 * t.jowl, canvas.side
    half = [
        (0, -1),
        (cheek * (0.5 + 0.08 * t.child), -0.9),
        (cheek * (0.86 + 0.06 * t.child), -0.6),
        (cheek * (1 + 0.03 * t.child), -0.22),
        (cheek * 0.98, 0.1),
        ((cheek + t.jaw) / 2 + 0.02 + 0.03 * t.child, 0.42),
        (t.jaw * 0.93 + sag, 0.66),
        (t.chin + 0.1 + 0.6 * sag, 0.88),
        (t.chin * 0.55, 0.985),
        (0, 1),
    ]
    outline = _outline(half)
    blotches = _noise(rng, side, 14, 14) * (1.5 + 8 * t.mottle)
    blotches += _noise(rng, side, 44, 44) * (1 + 4.5 * t.mottle)
    head = canvas.mask(outline, flat=True)
    canvas.draw([outline], t.skin + blotches, flat=True)
    blush = [_disc(s * cheek * 0.58, t.eye_y + 0.36, 0.17, 0.13) for s in SIDES]
    canvas.draw(blush, t.skin * (1.02, 0.72, 0.7), alpha=t.blush, soft=0.08, clip=head)
    where = rng.uniform((-0.75, -0.85, 0.015), (0.75, 0.7, 0.05), (rng.poisson(14 * t.spots), 3))
    if len(where):
        spots = [_disc(x, y, r, 0.8 * r) for x, y, r in where]
        canvas.draw(spots, t.skin * (0.72, 0.62, 0.55), alpha=0.6, soft=0.012, clip=head)
    return head


def _wrinkles(rng, canvas: _Canvas, t: Traits, head: np.ndarray) -> None:
    """Forehead lines, crow's feet, under-eye bags, nasolabial and mouth folds, hollow cheeks."""
    x, dark, lines = np.linspace(-1, 1, 9), t.skin * (0.5, 0.42, 0.4), []
    for i in range(1 + round(3.4 * t.forehead)):
        y = t.eye_y - 0.28 - 0.085 * i - 0.02 * rng.random() + 0.008 * rng.normal(size=9)
        long = t.cheek * rng.uniform(0.45, 0.68)
        lines.append(np.stack([x * long + 0.04 * rng.normal(), y - 0.02 * np.cos(3 * x)], -1))
    canvas.draw(lines, dark, width=0.025, alpha=0.85 * t.forehead, soft=0.008, clip=head)
    feet, corner = [], t.eye_gap + t.eye_size + 0.03
    for slope in np.linspace(-0.55, 0.75, 2 + round(2 * t.crows_feet)):
        reach = 0.1 + 0.1 * t.crows_feet * rng.uniform(0.7, 1.2)
        start = np.array([corner, t.eye_y + 0.01 + 0.05 * slope])
        feet += _both([start, start + (reach, reach * slope + 0.03)])
    canvas.draw(feet, dark, width=0.022, alpha=0.85 * t.crows_feet, soft=0.006, clip=head)
    bags = []
    for depth in (0.6, 0.92):
        below = t.eye_y + t.eye_size * (0.45 + depth * (1 - x**2))
        bags += _both(np.stack([t.eye_gap + x * t.eye_size, below], -1))
    canvas.draw(bags, dark, width=0.035, alpha=0.6 * t.bags, soft=0.015, clip=head)
    nose_y, mx, my = t.eye_y + t.nose, t.mouth_width + 0.07, t.mouth_y
    folds = [(t.nose_width * 1.1, nose_y - 0.06), (mx * 0.85, (nose_y + my) / 2), (mx, my + 0.05)]
    canvas.draw(_both(folds), dark, width=0.03, alpha=0.8 * t.folds, soft=0.012, clip=head)
    corners = _both([(mx - 0.04, my + 0.05), (mx, my + 0.15), (mx + 0.01, my + 0.26)])
    canvas.draw(corners, dark, width=0.03, alpha=0.7 * t.jowl, soft=0.015, clip=head)
    hollow = [(t.cheek * 0.8, t.eye_y + 0.25), (t.cheek * 0.6, t.eye_y + 0.45), (t.jaw * 0.85, 0.6)]
    canvas.draw(_both(hollow), dark, width=0.06, alpha=0.4 * t.jowl, soft=0.04, clip=head)


def _eyes(rng, canvas: _Canvas, t: Traits) -> None:
    gaze, x = rng.normal(size=2) * (0.25, 0.1), np.linspace(-1, 1, 13)
    bow, high = np.sqrt(1 - 0.98 * x**2), t.eye_size * t.eye_open
    middle = t.eye_y - t.eye_tilt * x + 0.05 * t.droop * np.clip(x, 0, 1) ** 2  # x: outward
    lid, under = middle - high * bow * (1 - 0.3 * t.droop), middle + 0.75 * high * bow
    crease = lid - 0.035 + (0.05 * t.droop - 0.3 * high) * bow
    for side in SIDES:
        ex, at = side * t.eye_gap, side * (t.eye_gap + x * t.eye_size)
        upper, lower, fold = (np.stack([at, y], -1) for y in (lid, under, crease))
        socket = _disc(ex, t.eye_y, t.eye_size * 1.4, t.eye_size * 1.1)
        canvas.draw([socket], t.skin * 0.7, alpha=0.3, soft=0.05)
        almond = np.concatenate([upper, lower[::-1]])
        canvas.draw([almond], (238, 234, 228))
        inside = canvas.mask(almond)
        ix, iy, r = ex + gaze[0] * t.eye_size, t.eye_y + gaze[1] * high, 0.085 + 0.012 * t.child
        canvas.draw([_disc(ix, iy, r, r)], t.iris, clip=inside)
        canvas.draw([_disc(ix, iy, r / 2, r / 2)], (12, 10, 12), clip=inside)
        canvas.draw([_disc(ix - 0.025, iy - 0.03, 0.018, 0.018)], (250, 250, 250), clip=inside)
        canvas.draw([upper], INK, width=0.022 + 0.022 * t.lashes, alpha=0.85)
        canvas.draw([lower], t.skin * 0.45, width=0.015, alpha=0.5)
        thick, strength = 0.018 + 0.02 * t.droop, 0.35 + 0.45 * t.droop
        canvas.draw([fold], t.skin * 0.5, width=thick, alpha=strength, soft=0.006)


def _brows(rng, canvas: _Canvas, t: Traits) -> None:
    colour = (t.hair + (GREY - t.hair) * t.grey) * 0.75
    x = t.eye_gap + np.array([-1.05, -0.3, 0.5, 1.2]) * t.eye_size
    height = t.eye_y - t.eye_size * 0.9 - 0.07 + 0.02 * rng.normal()
    y = height + np.array([0, -0.022, -0.022, 0.03])
    y += 0.014 * rng.normal() * np.array([1, 0.3, -0.3, -1])
    brows = _both(np.stack([x, y], -1))
    canvas.draw(brows, colour, width=t.brow, alpha=0.9 - 0.55 * t.child, soft=0.008)


def _nose(canvas: _Canvas, t: Traits) -> None:
    tip, w, dark = t.eye_y + t.nose, t.nose_width, t.skin * (0.55, 0.48, 0.46)
    bridge = _both([(0.07, t.eye_y + 0.02), (w * 0.45, tip - 0.16), (w, tip - 0.03)])
    canvas.draw(bridge, dark, width=0.04, alpha=0.32 * (1 - 0.6 * t.child), soft=0.02)
    base = _both([(0, tip + 0.035), (w * 0.5, tip + 0.01), (w * 0.98, tip), (w, tip - 0.06)])
    canvas.draw(base, dark, width=0.022, alpha=0.6, soft=0.006)
    nostrils = [_disc(s * w * 0.45, tip + 0.004, w * 0.22, 0.017) for s in SIDES]
    canvas.draw(nostrils, t.skin * 0.25, alpha=0.8)
    canvas.draw([_disc(0, tip - 0.06, w * 0.35, 0.05)], (255, 250, 245), alpha=0.22, soft=0.03)


def _mouth(canvas: _Canvas, t: Traits, gender: int) -> None:
    x = np.linspace(-1, 1, 15)
    bow = np.sqrt(1 - x**2)
    across = x * t.mouth_width * (1 + 0.15 * max(0, t.smile))
    line = t.mouth_y + 0.06 * t.smile * (0.4 - x**2)
    gap = 0.045 * t.teeth * (1 - x**2)
    cupid = bow * (1 - 0.25 * np.exp(-((x / 0.18) ** 2)))
    over, under = line - gap, line + gap
    heights = over - t.lips * cupid, over, under, under + 1.25 * t.lips * bow
    top, upper, lower, bottom = (np.stack([across, y], -1) for y in heights)
    red = t.skin * (0.86, 0.6, 0.6) + np.array([18, -8, -4]) * gender * (1 - t.child)
    canvas.draw([np.concatenate([top, upper[::-1]])], red * 0.86)
    canvas.draw([np.concatenate([lower, bottom[::-1]])], red)
    if t.teeth:
        canvas.draw([np.concatenate([upper, lower[::-1]])], (236, 230, 218))
    canvas.draw([upper, lower], t.skin * (0.36, 0.22, 0.22), width=0.018, alpha=0.85)
    canvas.draw([bottom[3:-3] + (0, 0.03)], t.skin * 0.55, width=0.03, alpha=0.3, soft=0.015)


def _beard(canvas: _Canvas, t: Traits, hair: np.ndarray, head: np.ndarray) -> None:
    y, w, side = t.mouth_y, t.mouth_width, t.cheek * 1.05
    dense = 0.3 if t.beard == "stubble" else 0.88
    if t.beard in ("stubble", "moustache"):
        lip = [
            (0, y - 0.14),
            (w * 0.7, y - 0.12),
            (w * 1.15, y + 0.02),
            (w * 0.8, y - 0.035),
            (0, y - 0.06),
        ]
        canvas.draw([_outline(lip)], hair, alpha=dense, soft=0.012)
    if t.beard in ("stubble", "full"):
        half = [
            (side, t.eye_y + 0.2),
            (side, 0.6),
            (t.chin + 0.3, 1.06),
            (0, 1.12),
            (0, y + 0.13),
            (w * 0.9, y + 0.1),
            (w * 1.15, y - 0.05),
            (w * 0.9, y - 0.12),
            (0, y - 0.1),
            (0, y - 0.17),
            (w * 1.1, y - 0.16),
            (side * 0.82, y - 0.16),
            (side * 0.93, t.eye_y + 0.2),
        ]
        halves = [np.array(half) * (s, 1) for s in SIDES]
        canvas.draw(halves, hair, alpha=dense, soft=0.018, clip=head)


def _front_hair(rng, canvas: _Canvas, t: Traits, hair: np.ndarray) -> None:
    r, volume = t.recede, t.hair_volume * (1 - 0.8 * t.recede) + 0.02
    cheek, wide = t.cheek, t.cheek + volume * 0.8
    end = t.eye_y + (0.12 if t.hair_style in ("long", "bob") else 0)
    if r > 0.62:  # bald on top, with hair left at the sides
        patch = [
            (cheek * 0.84, -0.62 + 0.3 * r),
            (wide, -0.5 + 0.2 * r),
            (wide + 0.03, -0.2),
            (wide, end),
            (cheek * 0.95, end),
            (cheek * 0.86, -0.15),
        ]
        canvas.draw(_both(patch, closed=True), hair, alpha=0.9, soft=0.012, flat=True)
        return
    line = t.hairline - 0.42 * r + 0.22 * t.fringe
    half = [
        (0, -1 - volume),
        (wide * (0.54 + 0.06 * t.child), -0.91 - volume * 0.85),
        (wide * 0.93, -0.58),
        (wide + 0.02, -0.25),
        (wide, end),
        (cheek * 0.95, end - 0.02),
        (cheek * 0.87, -0.28),
        (cheek * 0.62, line + 0.05 - 0.32 * r * (1 - r)),
        (cheek * 0.3, line),
        (0, line + 0.03 * (1 - r)),
    ]
    shape = _outline(half)
    inner = (np.abs(shape[:, 0]) < cheek * 0.8) & (shape[:, 1] > -0.85)
    shape[:, 1] += 0.1 * rng.normal() * shape[:, 0] * inner  # combed to one side
    fuzz = t.hair_style == "fuzz"
    alpha = rng.uniform(0.25, 0.65) if fuzz else 1 - 0.25 * r
    canvas.draw([shape], hair, alpha=alpha, soft=0.04 if fuzz else 0.012, flat=True)


def _glasses(rng, canvas: _Canvas, t: Traits) -> None:
    wide, high, power = rng.uniform((0.2, 0.15, 0.5), (0.26, 0.21, 1))
    ring = _disc(0, 0, 1, 1)
    ring = np.sign(ring) * np.abs(ring) ** power * (wide, high)  # from round to nearly square
    rims = [ring + (s * t.eye_gap, t.eye_y + 0.03) for s in SIDES]
    canvas.draw(rims, (255, 255, 255), alpha=rng.uniform(0.02, 0.15))
    rims += _both([(t.eye_gap - wide, t.eye_y), (0, t.eye_y - 0.03)])
    rims += _both([(t.eye_gap + wide, t.eye_y), (t.cheek, t.eye_y - 0.03)])
    colour = rng.uniform(10, 120) + rng.normal(size=3) * 20
    canvas.draw(rims, colour, width=rng.uniform(0.02, 0.045))


def _light(rng, canvas: _Canvas, head: np.ndarray) -> None:
    """Round the head off and light it from one side."""
    side = canvas.side
    small = cv2.resize(head, (side // 4, side // 4), interpolation=cv2.INTER_AREA)
    inner = cv2.resize(cv2.GaussianBlur(small, (0, 0), side / 48), (side, side))
    direction, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.32)
    axis = np.linspace(-strength, strength, side, dtype=np.float32)
    slope = math.cos(direction) * axis[None] + math.sin(direction) * axis[:, None]
    canvas.image *= ((1 - 0.45 * (1 - inner) * head) * (1 + slope))[..., None]


def _photograph(rng, image: np.ndarray, size: int) -> np.ndarray:
    """Exposure, colour cast, blur, noise and poor JPEG: what differs from camera to camera."""
    gain = np.exp(0.12 * rng.normal() + 0.04 * rng.normal(size=3)).astype(np.float32)
    contrast, lift = rng.uniform(0.7, 1.15), 10 * rng.normal()
    image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    image = image * (gain * np.float32(contrast)) + np.float32(110 * (1 - contrast) + lift)
    if rng.random() < 0.35:
        image = cv2.GaussianBlur(image, (0, 0), size / 96 * rng.uniform(0.4, 1))
    image += rng.standard_normal(image.shape, np.float32) * np.float32(rng.gamma(1.5, 1.4))
    image = np.rint(np.clip(image, 0, 255)).astype(np.uint8)
    if rng.random() < 0.3:
        image = decode_rgb(encode_jpeg(image, int(rng.integers(35, 85))))
    return np.ascontiguousarray(image)


def draw_face(
    rng: np.random.Generator, age: int, gender: int, race: int, size: int = 96
) -> UInt8[np.ndarray, "s s 3"]:
    """Returns one drawn face, RGB uint8 [size,size,3].

    `age` in years, 0-116; `gender` 0 male, 1 female; `race` 0-4, all as in UTKFace's names. The
    same generator state gives the same face. Raises ValueError for a label or size out of range.
    """
    check_range("age", age, 0, 116)
    check_range("gender", gender, 0, 1)
    check_range("race", race, 0, 4)
    check_range("size", size, 16, 1024)
    t = pick_traits(rng, age, gender, race)
    canvas = _Canvas(rng, max(CANVAS, 3 * size // 2))
    hair = _hair_texture(rng, t, canvas.side)
    _background(rng, canvas)
    _back_hair(canvas, t, hair)
    _body(rng, canvas, t)
    head = _head(rng, canvas, t)
    _wrinkles(rng, canvas, t, head)
    _nose(canvas, t)
    _beard(canvas, t, hair, head)
    _mouth(canvas, t, gender)
    _eyes(rng, canvas, t)
    _brows(rng, canvas, t)
    _light(rng, canvas, head)
    _front_hair(rng, canvas, t, hair)
    if t.glasses:
        _glasses(rng, canvas, t)
    return _photograph(rng, canvas.image, size)


def check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} {value} is out of range: give {low} to {high}")
