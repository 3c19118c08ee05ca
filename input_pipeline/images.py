"""Image bytes to pixels, checked when data is prepared and decoded fast when read, and back."""

import hashlib
import io
import warnings

import cv2
import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image

MAX_PIXELS = 100_000_000


def decode_checked(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the RGB pixels of a whole, sane image file; grey, CMYK and alpha become RGB.

    The size is read from the header before anything is decoded. Raises ValueError with the reason:
    no image, more than 100 megapixels, cut short, damaged, or undecodable.
    """
    _check_size(data)
    if not _is_whole(data):
        raise ValueError("image cut short")
    if damage := _jpeg_damage(data):
        raise ValueError(f"image damaged ({damage})")
    pixels = decode_rgb(data)
    if pixels is None:
        raise ValueError("image cannot be decoded")
    return pixels


def decode_rgb(data: bytes) -> UInt8[np.ndarray, "h w 3"] | None:
    """Returns RGB pixels turned as the EXIF orientation says, or None where OpenCV cannot."""
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error:
        return None


def decode_image(data: bytes, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Returns size x size RGB pixels: the centre square, shrunk by area or grown by cubics.

    Raises ValueError when the bytes cannot be decoded.
    """
    pixels = decode_rgb(data)
    if pixels is None:
        raise ValueError(f"an image of {len(data)} bytes cannot be decoded")
    return centre_square(pixels, size)


def decode_into(row: UInt8[np.ndarray, "size size 3"], data: bytes) -> None:
    """Fills `row`, a contiguous part of a batch, with the pixels of `decode_image`.

    A JPEG of that size is decoded in place: to copy its pixels costs a tenth of their decoding.
    Raises ValueError when the bytes cannot be decoded.
    """
    size = len(row)
    if b"Exif" not in bytes(data):  # OpenCV turns a picture as its EXIF orientation says
        try:
            pixels = simplejpeg.decode_jpeg(data, "RGB", buffer=row)
        except ValueError:  # no JPEG, damaged, CMYK, or larger than the row
            pass
        else:
            if pixels.shape != row.shape:
                row[:] = centre_square(pixels.copy(), size)
            return
    row[:] = decode_image(data, size)


def centre_square(pixels: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "s s 3"]:
    """Returns the centre square of a picture, shrunk by area or grown by cubics to `size`."""
    h, w, _ = pixels.shape
    if h == w == size:
        return pixels
    side = min(h, w)
    top, left = (h - side) // 2, (w - side) // 2
    pixels = pixels[top : top + side, left : left + side]
    if side == size:
        return pixels
    how = cv2.INTER_AREA if side > size else cv2.INTER_CUBIC
    return cv2.resize(pixels, (size, size), interpolation=how)


def encode_jpeg(
    pixels: UInt8[np.ndarray, "h w 3"], quality: int, *, full_colour: bool = False
) -> bytes:
    """Returns JPEG bytes of RGB pixels, with the colour at half the resolution or `full_colour`."""
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    if full_colour:
        options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)[1].tobytes()


def pixel_hash(pixels: UInt8[np.ndarray, "h w 3"]) -> str:
    """Returns the SHA-256 of the shape and the pixels: equal pictures, whatever their metadata."""
    digest = hashlib.sha256(repr(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels))
    return digest.hexdigest()


def _check_size(data: bytes) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                w, h = image.size
    except Image.DecompressionBombError:
        raise ValueError("image larger than 100 megapixels") from None
    except Exception as error:  # Pillow raises many kinds on damaged headers
        raise ValueError("not an image, or its header is damaged") from error
    if w * h > MAX_PIXELS:
        raise ValueError("image larger than 100 megapixels")


def _jpeg_damage(data: bytes) -> str:
    """What libjpeg says of a JPEG that is damaged between its ends, which OpenCV decodes with grey
    or noise from there on; '' of others."""
    try:
        if data.startswith(b"\xff\xd8"):
            # An eighth of the size: every code is read, and few pixels are made of them.
            simplejpeg.decode_jpeg(data, "GRAY", strict=True, min_height=1, min_width=1)
    except ValueError as error:
        # Neither colours that simplejpeg cannot make grey nor bytes between the parts are damage.
        reason = str(error)
        if reason.startswith(("Corrupt", "Premature")) and "extraneous" not in reason:
            return reason
    return ""


def _is_whole(data: bytes) -> bool:
    """Tells whether a file is complete: some versions of OpenCV fill what is missing with grey."""
    if data.startswith(b"\xff\xd8") and data.endswith(b"\xff\xd9"):
        return True
    try:  # bytes after the end marker are harmless: Pillow stops at the marker, and raises without
        with Image.open(io.BytesIO(data)) as image:
            image.load()
        return True
    except Exception:
        return False
