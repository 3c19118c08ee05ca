"""Pictures made of pixels: ages written below and around faces, sheets of tiles; no matplotlib."""

import math
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from coatnet_jax.ages import CLASS_NAMES
from coatnet_jax.palette import BLUE, CLASS_COLOURS, INK, MUTED, RED


def annotated(
    image: UInt8[np.ndarray, "s s 3"],
    *,
    age: float,
    low: float,
    high: float,
    probabilities: Sequence[float],
    chosen: int,
    caption: str = "",
    true_age: int | None = None,
) -> UInt8[np.ndarray, "h s 3"]:
    """The picture with a band below: age and interval in years, and the four class probabilities.

    Sizes follow the picture's width; `chosen` is the class that is set in bold, `caption` (a file
    name) is cut to one line below all. Where the true age is known it stands before the predicted
    one, and the interval takes the caption's place: the picture is as high as with a caption.
    """
    side = image.shape[1]
    unit = side / 256
    rows = len(CLASS_NAMES)
    top, line = round(38 * unit), round(19 * unit)
    told = true_age is not None
    band = top + rows * line + round((26 if caption or told else 8) * unit)
    sheet = Image.new("RGB", (side, image.shape[0] + band), "white")
    sheet.paste(Image.fromarray(image), (0, 0))
    draw = ImageDraw.Draw(sheet)
    left, y = 10 * unit, image.shape[0]
    years = math.floor(age + 0.5)
    draw.text(
        (left, y + 20 * unit),
        f"true {true_age}, predicted {years}" if told else f"{years} years",
        font=label_font((18 if told else 20) * unit, True),
        fill=INK,
        anchor="lm",
    )
    draw.text(
        (left, y + band - 14 * unit) if told else (side - left, y + 21 * unit),
        f"90 %: {low:.0f}–{high:.0f}",
        font=label_font(13 * unit),
        fill=MUTED,
        anchor="lm" if told else "rm",
    )
    for row, (name, p) in enumerate(zip(CLASS_NAMES, probabilities, strict=True)):
        middle = y + top + (row + 0.5) * line
        _bar(
            draw,
            left,
            side - left,
            middle,
            unit,
            name=name,
            p=float(p),
            colour=CLASS_COLOURS[row],
            bold=row == chosen,
        )
    if caption and not told:
        font = label_font(11 * unit)
        draw.text(
            (left, y + band - 13 * unit),
            shortened(caption, font, side - 2 * left),
            font=font,
            fill=MUTED,
            anchor="lm",
        )
    return np.asarray(sheet)


def boxed(
    image: UInt8[np.ndarray, "h w 3"],
    faces: Sequence[tuple[Float[np.ndarray, " 4"], str, int]],
    *,
    longest: int = 1600,
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """The photo with a box and a text at each face: `(x1, y1, x2, y2 in pixels, text, class)`.

    Photos of more than `longest` px are shrunk; small ones are grown until the text can be read.
    """
    h, w, _ = image.shape
    scale = float(np.clip(1, 640 / max(h, w), longest / max(h, w)))
    size = (max(1, round(w * scale)), max(1, round(h * scale)))
    sheet = Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(sheet)
    letters = max(sheet.size) / 40
    for box, text, chosen in faces:
        x1, y1, x2, y2 = (scale * np.asarray(box, float)).tolist()
        # The widest text that fits the face, within reason.
        fits = letters * (x2 - x1) / label_font(letters, True).getlength(text)
        font = label_font(float(np.clip(fits, 0.7 * letters, letters)), True)
        colour, thick = CLASS_COLOURS[chosen], max(2, round(letters / 6))
        draw.rectangle((x1, y1, x2, y2), outline=colour, width=thick)
        wide, high = font.getlength(text) + font.size * 0.6, font.size * 1.4
        left = float(np.clip(x1, 0, max(0, sheet.width - wide)))
        top = y1 - high if y1 >= high else min(max(y2, 0), sheet.height - high)
        draw.rectangle((left, top, left + wide, top + high), fill=colour)
        place = (left + font.size * 0.3, top + high / 2)
        ink = "white" if colour in (BLUE, RED) else INK
        draw.text(place, text, font=font, fill=ink, anchor="lm")
    return np.asarray(sheet)


def captioned(
    image: UInt8[np.ndarray, "s s 3"], lines: Sequence[str]
) -> UInt8[np.ndarray, "h s 3"]:
    """The picture with lines of text below, the first in bold."""
    side = image.shape[1]
    unit = side / 256
    sheet = Image.new("RGB", (side, image.shape[0] + round((10 + 21 * len(lines)) * unit)), "white")
    sheet.paste(Image.fromarray(image), (0, 0))
    draw = ImageDraw.Draw(sheet)
    for row, text in enumerate(lines):
        draw.text(
            (6 * unit, image.shape[0] + (15 + 21 * row) * unit),
            text,
            font=label_font((14 if row else 15) * unit, row == 0),
            fill=MUTED if row else INK,
            anchor="lm",
        )
    return np.asarray(sheet)


def _bar(draw, left, right, middle, unit, *, name, p, colour, bold) -> None:
    start, end = left + 52 * unit, right - 46 * unit
    half = 5 * unit
    font = label_font(12 * unit, bold)
    draw.text((left, middle), name, font=font, fill=INK if bold else MUTED, anchor="lm")
    draw.rectangle((start, middle - half, end, middle + half), fill="#EDEFF2")
    draw.rectangle(
        (start, middle - half, start + max(p * (end - start), unit), middle + half), fill=colour
    )
    draw.text(
        (right, middle), f"{100 * p:.0f} %", font=font, fill=INK if bold else MUTED, anchor="rm"
    )


def shortened(text: str, font, width: float) -> str:
    """The text, its middle replaced by '…' where it is wider than `width` pixels."""
    keep = len(text)
    short = text
    while font.getlength(short) > width and keep > 2:
        keep -= 1
        short = text[: (keep + 1) // 2] + "…" + text[len(text) - keep // 2 :]
    return short


def label_font(size: float, bold: bool = False) -> ImageFont.FreeTypeFont:
    return _font(max(round(size), 6), bold)


@cache
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    # DejaVu comes with matplotlib, so the same letters are found on every machine; importing
    # matplotlib to ask for them would take longer than drawing.
    fonts = Path(find_spec("matplotlib").origin).parent / "mpl-data" / "fonts" / "ttf"
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(fonts / name, size)


def contact_sheet(
    path: str | Path, tiles: Sequence[UInt8[np.ndarray, "h w 3"]], *, columns: int | None = None
) -> Path:
    """Equally large tiles in a grid on white; four to six columns unless told."""
    count = len(tiles)
    columns = columns or min(count, 4 if count <= 12 else 6)
    gap = 14
    height, width, _ = tiles[0].shape
    lines = math.ceil(count / columns)
    sheet = np.full((gap + lines * (height + gap), gap + columns * (width + gap), 3), 255, np.uint8)
    for place, tile in enumerate(tiles):
        y = gap + place // columns * (height + gap)
        x = gap + place % columns * (width + gap)
        sheet[y : y + height, x : x + width] = tile
    return save_image(path, sheet)


def save_image(path: str | Path, image: UInt8[np.ndarray, "h w 3"], *, comment: str = "") -> Path:
    """Write an RGB picture; the ending of the name says the format, `comment` is for a JPEG."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"quality": 92, "comment": comment} if path.suffix in (".jpg", ".jpeg") else {}
    Image.fromarray(image).save(path, **options)
    return path
