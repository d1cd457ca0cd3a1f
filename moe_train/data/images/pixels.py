"""Decodes image files to 8-bit pixels with Pillow; names the file where that is not possible.

content of the file                     result
16-bit grey                             scaled to 8 bits (Pillow would clip at 255: all white)
32-bit integers, floating point         refused: the value of white is not defined
transparency, of any kind               blended with white
an orientation in EXIF                  rotated upright
palette, CMYK, 16-bit colour, bilevel   converted by Pillow
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from moe_train.data.images.base import Pixels
from moe_train.errors import DataError, MissingDependency

MAX_PIXELS = 89_478_485  # of one image: Pillow warns of decompression bombs above
MAX_RATIO = 100  # longer side over shorter, of an image that is cropped to a square
_FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "TIFF", "WEBP", "PPM")  # other formats may start programs (EPS)
_MODES = {1: "L", 3: "RGB"}
_ORIENTATION, _BITS, _PHOTOMETRIC = 274, 258, 262  # tags of EXIF and TIFF
_REMEDY = "remove the file or download it again"


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The Pillow image of a file; only its header has been read.

    Raises:
        DataError: not an image, or larger than :data:`MAX_PIXELS`; also for any error of Pillow raised inside.
        MissingDependency: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError:
        raise MissingDependency("images in files need Pillow", remedy="install it: pip install pillow") from None
    if not path.is_file():
        raise DataError("this is not a file, or it was removed", str(path), _REMEDY)
    try:
        with Image.open(path, formats=_FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                what = f"an image of {width} x {height} pixels is too large: at most {MAX_PIXELS:,} are read"
                raise DataError(what, str(path), "reduce its size, or remove it")
            yield image
    except DataError:
        raise
    except Exception as error:  # Pillow's readers of damaged files raise anything
        reason = str(error) or type(error).__name__
        raise DataError(f"the image cannot be read ({reason})", str(path), _REMEDY) from error


def upright_size(image: Any) -> tuple[int, int]:
    """Width and height of the image that :func:`decode_image` returns, from the header."""
    width, height = image.size
    # Pillow itself rotates TIFF, and its size is that of the rotated image. It would decode a whole PNG to find EXIF.
    rotated = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info) and _orientation(image) >= 5
    return (height, width) if rotated else (width, height)


def has_colours(image: Any) -> bool:
    """Whether the image has colours; reads the file where it has a palette."""
    if image.mode != "P":
        return len(image.getbands()) > 1
    colours = np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
    return bool((colours != colours[:, :1]).any())


def decode_image(image: Any, channels: int, size: int | None) -> Pixels:
    """Decodes an image to [H, W, C].

    Args:
        size: side in pixels to which the image is scaled and cropped; None: unchanged.

    Raises:
        ValueError: it cannot be converted to 8 bits, or its sides are too unequal.
    """
    image = _without_transparency(_to_eight_bits(_upright(image)))
    if size is not None:
        image = _crop_square(image, size)
    pixels = np.asarray(image.convert(_MODES[channels]), dtype=np.uint8)
    return pixels.reshape(*pixels.shape[:2], channels)


def check_depth(image: Any) -> None:
    """Checks that the value of white is defined.

    Raises:
        ValueError: it is not.
    """
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        kind = "floating-point numbers" if image.mode == "F" else "32-bit integers"
        raise ValueError(f"it contains {kind}, for which the value of white is not defined: convert it to 8 or 16 bits")


def _orientation(image: Any) -> int:
    """1 (upright) to 8; those from 5 on exchange width and height."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # invalid EXIF: the image may be valid
        return 1
    return found if found in range(1, 9) else 1


def _upright(image: Any) -> Any:
    from PIL import ImageOps

    image.load()
    return image if _orientation(image) == 1 else ImageOps.exif_transpose(image)


def _to_eight_bits(image: Any) -> Any:
    from PIL import Image

    check_depth(image)
    if not image.mode.startswith("I"):
        return image
    tags = image.tag_v2 if image.format == "TIFF" else {}
    bits = tags[_BITS][0] if _BITS in tags else 16
    values = np.asarray(image).astype(np.int64)
    pixels = (values * 255 + (1 << (bits - 1))) // ((1 << bits) - 1)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero
        pixels = 255 - pixels
    pixels[values == image.info.get("transparency", -1)] = 255
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _without_transparency(image: Any) -> Any:
    from PIL import Image

    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _crop_square(image: Any, size: int) -> Any:
    """Scales the shorter side to ``size`` and crops the longer one around its middle."""
    from PIL import Image

    width, height = image.size
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(f"a strip of {width} x {height} pixels cannot be cropped to a square")
    scale = size / min(width, height)
    scaled = image.resize(
        (max(size, round(width * scale)), max(size, round(height * scale))), Image.Resampling.BILINEAR
    )
    left, top = (scaled.size[0] - size) // 2, (scaled.size[1] - size) // 2
    return scaled.crop((left, top, left + size, top + size))
