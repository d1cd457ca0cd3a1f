"""Image files to pixels of eight bits, through Pillow, whatever they hold: and refused by name where that cannot be.

what the file holds                     what becomes of it
16-bit grey                             scaled to 8 bits (Pillow cuts off at 255: all white)
32-bit integers, floating point         refused: nobody knows which value is white
transparency, of any kind               laid over white
an orientation in EXIF                  turned upright
palette, CMYK, 16-bit colour, bilevel   as Pillow converts them
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from moe_train.data.images.base import Pixels
from moe_train.errors import DataError, MissingDependency

MAX_PIXELS = 89_478_485  # of one image: where Pillow begins to warn of decompression bombs
MAX_RATIO = 100  # longer side over shorter, of an image that is to be cut to a square
_FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "TIFF", "WEBP", "PPM")  # others may call programs (EPS)
_MODES = {1: "L", 3: "RGB"}
_ORIENTATION, _BITS, _PHOTOMETRIC = 274, 258, 262  # tags of EXIF and TIFF
_REMEDY = "remove the file or fetch it again"


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The Pillow image of a file of which the header was read.

    Raises:
        DataError: no image, or one of more than :data:`MAX_PIXELS`; also for whatever Pillow raises inside.
        MissingDependency: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError:
        raise MissingDependency("images in files need Pillow", remedy="install it: pip install pillow") from None
    if not path.is_file():
        raise DataError("this is no file, or it is gone", str(path), _REMEDY)
    try:
        with Image.open(path, formats=_FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                what = f"an image of {width} x {height} pixels is too large: at most {MAX_PIXELS:,} are read"
                raise DataError(what, str(path), "make it smaller, or remove it")
            yield image
    except DataError:
        raise
    except Exception as error:  # Pillow's readers of damaged files raise anything
        said = str(error) or type(error).__name__
        raise DataError(f"the image cannot be read ({said})", str(path), _REMEDY) from error


def upright_size(image: Any) -> tuple[int, int]:
    """Width and height as :func:`decode` gives them, by the header alone."""
    width, height = image.size
    # Pillow turns a TIFF by itself, its size first; and it would decode a whole PNG in search of EXIF at the end.
    turned = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info) and _orientation(image) >= 5
    return (height, width) if turned else (width, height)


def has_colours(image: Any) -> bool:
    """Whether it is to be read in colour; reads the file where there is a palette."""
    if image.mode != "P":
        return len(image.getbands()) > 1
    colours = np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
    return bool((colours != colours[:, :1]).any())


def decode(image: Any, channels: int, size: int | None) -> Pixels:
    """[H, W, C].

    Args:
        size: pixels of a side to which the image is scaled and cut; None: as it is.

    Raises:
        ValueError: it cannot be brought to 8 bits, or it is a strip.
    """
    image = _opaque(_of_eight_bits(_upright(image)))
    if size is not None:
        image = _squared(image, size)
    pixels = np.asarray(image.convert(_MODES[channels]), dtype=np.uint8)
    return pixels.reshape(*pixels.shape[:2], channels)


def check_depth(image: Any) -> None:
    """Whether :func:`decode` knows which value is white.

    Raises:
        ValueError: it does not.
    """
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        kind = "floating-point numbers" if image.mode == "F" else "32-bit integers"
        raise ValueError(f"it holds {kind}, of which nobody knows which is white: convert it to 8 or 16 bits")


def _orientation(image: Any) -> int:
    """1 (upright) to 8; those from 5 on exchange width and height."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # EXIF that is no EXIF: the picture may be good
        return 1
    return found if found in range(1, 9) else 1


def _upright(image: Any) -> Any:
    from PIL import ImageOps

    image.load()
    return image if _orientation(image) == 1 else ImageOps.exif_transpose(image)


def _of_eight_bits(image: Any) -> Any:
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


def _opaque(image: Any) -> Any:
    from PIL import Image

    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _squared(image: Any, size: int) -> Any:
    """The shorter side scaled to ``size``, the middle of the longer one."""
    from PIL import Image

    width, height = image.size
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(f"a strip of {width} x {height} pixels cannot be cut to a square")
    scale = size / min(width, height)
    scaled = image.resize(
        (max(size, round(width * scale)), max(size, round(height * scale))), Image.Resampling.BILINEAR
    )
    left, top = (scaled.size[0] - size) // 2, (scaled.size[1] - size) // 2
    return scaled.crop((left, top, left + size, top + size))
