"""What becomes of image files of every kind, and which are refused by name."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from moe_train.config import ImageConfig
from moe_train.data.images import open_images
from moe_train.errors import DataError

RAMP = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)
GREY = np.round(RAMP / 257).astype(np.uint8)
COLOURS = np.random.default_rng(3).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def read(folder: Path, name: str, image: Image.Image | bytes, keys: dict[str, Any] | None = None, **save: Any) -> Any:
    """The pixels of one image among others of its class."""
    path = folder / "train" / "cat" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    for beside in range(3):
        other = folder / "train" / "dog" / f"{beside}{path.suffix}"
        other.parent.mkdir(exist_ok=True)
        path.write_bytes(image) if isinstance(image, bytes) else image.save(path, **save)
        other.write_bytes(path.read_bytes())
    images = open_images(str(folder), ImageConfig(valid_share=0.3, **(keys or {})))
    everything = images.splits["train"]
    assert everything.store is images.splits["valid"].store
    return everything.store.read(np.array([0]))[0]


def grey_png16(values: NDArray[np.uint16], extra: bytes = b"") -> bytes:
    """A 16-bit grey PNG; ``extra``: chunks before its data."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0))
    transparent = chunk(b"tRNS", extra) if extra else b""
    return b"\x89PNG\r\n\x1a\n" + header + transparent + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["png", "tif", "pgm", "white is zero", "12 bits"])
def test_sixteen_bits_of_grey_are_scaled(tmp_path: Path, kind: str) -> None:
    if kind == "png":
        pixels = read(tmp_path, "a.png", grey_png16(RAMP))
    elif kind == "pgm":
        pixels = read(tmp_path, "a.pgm", b"P5\n8 6\n65535\n" + RAMP.astype(">u2").tobytes())
    elif kind == "tif":
        pixels = read(tmp_path, "a.tif", Image.fromarray(RAMP))
    elif kind == "white is zero":
        pixels = 255 - read(tmp_path, "a.tif", Image.fromarray(RAMP), tiffinfo={262: 0})
    else:
        pixels = read(tmp_path, "a.tif", tiff_of_12_bits(RAMP >> 4))
    assert pixels.shape == (6, 8, 1) and np.abs(pixels[..., 0].astype(int) - GREY).max() <= 1
    assert pixels.min() == 0 and pixels.max() == 255 and len(np.unique(pixels)) == 48


def tiff_of_12_bits(values: NDArray[np.uint16]) -> bytes:
    """Two values to three bytes, in one strip."""
    height, width = values.shape
    bits = np.unpackbits(values.astype(">u2").view(np.uint8).reshape(height, width, 2), axis=-1)[..., 4:]
    data = np.packbits(bits.reshape(height, -1), axis=-1).tobytes()
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 0, 277: 1, 278: height, 279: len(data)}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + data


def test_sixteen_bits_are_scaled_before_they_are_resized(tmp_path: Path) -> None:
    pixels = read(tmp_path, "a.png", grey_png16(RAMP), {"resize": True, "image_size": 4})
    assert pixels.shape == (4, 4, 1) and 0 < pixels.mean() < 200


def test_a_transparent_level_of_sixteen_bits_is_white(tmp_path: Path) -> None:
    pixels = read(tmp_path, "a.png", grey_png16(RAMP, extra=struct.pack(">H", RAMP[0, 0])))
    assert pixels[0, 0] == 255 and pixels[0, 1] == GREY[0, 1]


@pytest.mark.parametrize("values", [np.float32, np.int32])
def test_values_of_unknown_range_are_refused(tmp_path: Path, values: type) -> None:
    with pytest.raises(DataError, match="the value of white is not defined: convert it to 8 or 16 bits") as raised:
        read(tmp_path, "a.tif", Image.fromarray(RAMP.astype(values)))
    assert raised.value.where.endswith(os.path.join("cat", "a.tif"))


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    """A glyph: black all over, with its shape in the transparency alone."""
    shape = np.zeros((6, 8, 4), np.uint8)
    shape[1:4, 2:5, 3] = 255
    image = Image.fromarray(shape)
    want = 255 - np.repeat(shape[..., 3:], 3, axis=-1)
    assert (read(tmp_path / "rgba", "a.png", image) == want).all()
    assert (read(tmp_path / "la", "a.png", image.convert("LA"), {"channels": 1}) == want[..., :1]).all()
    assert (read(tmp_path / "webp", "a.webp", image, lossless=True, exact=True) == want).all()
    keyed = Image.new("P", (8, 6))
    keyed.putpalette([0, 0, 0, 0, 0, 0])
    keyed.putdata((shape[..., 3] // 255).ravel().tolist())
    assert (read(tmp_path / "p", "a.png", keyed, {"channels": 3}, transparency=0) == want).all()
    opaque = np.dstack([COLOURS, np.full((6, 8), 255, np.uint8)])
    assert (read(tmp_path / "opaque", "a.png", Image.fromarray(opaque)) == COLOURS).all()


def test_palettes_keep_their_colours(tmp_path: Path) -> None:
    """The number of channels, too, is that of the colours."""
    pixels = read(tmp_path / "colours", "a.png", Image.fromarray(COLOURS).quantize(48))
    assert pixels.shape == (6, 8, 3) and np.abs(pixels.astype(int) - COLOURS).mean() < 20
    assert read(tmp_path / "gif", "a.gif", Image.fromarray(COLOURS).quantize(48)).shape == (6, 8, 3)
    assert read(tmp_path / "grey", "a.png", Image.fromarray(GREY).quantize(48)).shape == (6, 8, 1)


def test_other_kinds_of_colour(tmp_path: Path) -> None:
    flat = np.full((6, 8, 3), (200, 60, 20), np.uint8)
    cmyk = read(tmp_path / "cmyk", "a.tif", Image.fromarray(flat).convert("CMYK"))
    assert cmyk.shape == (6, 8, 3) and np.abs(cmyk.astype(int) - flat).max() <= 1
    wide = b"P6\n8 6\n65535\n" + (COLOURS.astype(np.uint16) * 257).astype(">u2").tobytes()
    assert (read(tmp_path / "wide", "a.ppm", wide) == COLOURS).all()
    two = read(tmp_path / "two", "a.png", Image.fromarray(GREY > 100))
    assert sorted(np.unique(two)) == [0, 255] and two.shape == (6, 8, 1)


@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
def test_an_orientation_is_followed(tmp_path: Path, kind: str) -> None:
    exif = Image.Exif()
    exif[274] = 6
    big = np.zeros((16, 32, 3), np.uint8)
    big[:, :16] = 250
    pixels = read(tmp_path, f"a.{kind}", Image.fromarray(big), exif=exif)
    assert pixels.shape == (32, 16, 3) and pixels[:14].min() > 200 and pixels[18:].max() < 50


def test_an_orientation_that_is_found_after_the_pixels_is_named(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    stream = io.BytesIO()
    Image.fromarray(COLOURS).save(stream, "png")
    content = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(content)) + b"eXIf" + content + struct.pack(">I", zlib.crc32(b"eXIf" + content))
    with pytest.raises(DataError, match="an image of 6 x 8 pixels among images of 8 x 6") as raised:
        read(tmp_path, "a.png", stream.getvalue()[:-12] + chunk + stream.getvalue()[-12:])
    assert raised.value.where.endswith("a.png")


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "bmp", "tif", "webp", "ppm"])
def test_a_truncated_image_is_named(tmp_path: Path, kind: str) -> None:
    stream = io.BytesIO()
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, {"jpg": "jpeg", "tif": "tiff"}.get(kind, kind))
    with pytest.raises(DataError, match="cannot be read") as raised:
        read(tmp_path, f"a.{kind}", stream.getvalue()[: len(stream.getvalue()) // 2])
    assert raised.value.where.endswith(f"a.{kind}")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 20_000])
def test_a_decompression_bomb_is_named_before_it_is_decoded(tmp_path: Path, side: int) -> None:
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    bomb = b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 9) + b"IDAT" + b"\0" * 13
    for keys in ({}, {"resize": True, "image_size": 8}):
        with pytest.raises(DataError, match=r"too large: at most 89,478,485|decompression bomb") as raised:
            read(tmp_path, "a.png", bomb, keys)
        assert raised.value.where.endswith("a.png")


def test_a_strip_is_not_resized(tmp_path: Path) -> None:
    """Its longer side would have 13 million pixels."""
    with pytest.raises(DataError, match="a strip of 1 x 60000 pixels cannot be cropped to a square") as raised:
        read(tmp_path, "a.png", Image.new("L", (1, 60000)), {"resize": True, "image_size": 224})
    assert raised.value.where.endswith("a.png")
    assert read(tmp_path / "long", "a.png", Image.new("L", (3, 300)), {"resize": True, "image_size": 8}).shape[0] == 8


def test_files_that_call_programs_are_not_opened(tmp_path: Path) -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\n%%EndComments\n(x) (w) file\nshowpage\n"
    with pytest.raises(DataError, match="cannot identify image file"):
        read(tmp_path, "a.png", eps)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    os.mkfifo(tmp_path / "cat" / "a.png")
    with pytest.raises(DataError, match="not a file") as raised:
        open_images(str(tmp_path), ImageConfig())
    assert raised.value.where.endswith("a.png")
