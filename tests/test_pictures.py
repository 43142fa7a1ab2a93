"""Pictures are read as every viewer shows them, and what is not read is counted and named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.facts import DataError
from data.pictures import LeftOut, look, picture_files, read_picture, shape_of_all, stamped

GREY = np.random.default_rng(0).integers(0, 256, (6, 9), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (6, 9, 3), dtype=np.uint8)
# where rows and columns of what is stored go, and the tag by which a viewer brings them back
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_every_orientation_is_turned_as_a_viewer_turns_it(orientation: int, suffix: str, tmp_path: Path) -> None:
    picture, exif, file = Image.fromarray(COLOUR), Image.Exif(), tmp_path / f"turned.{suffix}"
    how = STORED[orientation]
    exif[0x0112] = orientation
    (picture if how is None else picture.transpose(how)).save(file, exif=exif, lossless=True)
    assert look(file).size == (6, 9)
    assert np.array_equal(read_picture(file, (3, 6, 9)), COLOUR.transpose(2, 0, 1))


ALPHA = np.random.default_rng(2).integers(0, 256, (6, 9), dtype=np.uint8)
ALPHA[0], ALPHA[1] = 0, 255


def shown(ink: np.ndarray) -> np.ndarray:
    """Ink over white: alpha ink + (1 - alpha) 255."""
    alpha = (ALPHA / 255)[..., None] if ink.ndim == 3 else ALPHA / 255
    return alpha * ink + (1 - alpha) * 255


def test_what_is_transparent_lies_on_white(tmp_path: Path) -> None:
    for name, ink in (("grey", GREY), ("colour", COLOUR)):
        file = tmp_path / f"{name}.png"
        Image.fromarray(np.dstack([ink, ALPHA])).save(file)
        shape = (1, 6, 9) if name == "grey" else (3, 6, 9)
        pixels = read_picture(file, shape).astype(float)
        expected = shown(ink)
        assert np.abs(pixels - (expected[None] if name == "grey" else expected.transpose(2, 0, 1))).max() <= 1


def test_a_colour_that_is_marked_as_transparent_is_white(tmp_path: Path) -> None:
    """PNG's tRNS of grey, RGB and palette pictures, and GIF's."""
    for mode, colour in (("L", 7), ("RGB", (7, 7, 7)), ("P", 7)):
        for suffix in ("png", "gif") if mode == "P" else ("png",):
            file = tmp_path / f"{mode}.{suffix}"
            picture = Image.new(mode, (9, 6), 3 if mode != "RGB" else (3, 3, 3))
            picture.putpixel((2, 1), colour)
            if mode == "P":
                picture.putpalette([v for index in range(256) for v in (index, index, index)])
            picture.save(file, transparency=colour)
            pixels = read_picture(file, (1, 6, 9))[0]
            assert pixels[1, 2] == 255
            assert pixels[0, 0] == 3


def test_a_grey_level_of_16_bits_that_is_marked_as_transparent_is_white(tmp_path: Path) -> None:
    levels = GREY.astype(np.uint16) * 256 + 99
    Image.fromarray(levels).save(tmp_path / "a.png", transparency=int(levels[1, 2]))
    pixels = read_picture(tmp_path / "a.png", (1, 6, 9))[0]
    assert np.array_equal(pixels, np.where(levels == levels[1, 2], 255, GREY))


@pytest.mark.parametrize(("palette", "in_colour"), [((7, 7, 7), False), ((7, 7, 8), True)])
def test_a_palette_of_greys_is_grey(palette: tuple[int, int, int], in_colour: bool, tmp_path: Path) -> None:
    picture = Image.new("P", (9, 6), 1)
    picture.putpalette([0, 0, 0, *palette])
    picture.save(tmp_path / "a.png")
    assert look(tmp_path / "a.png").in_colour == in_colour
    picture.save(tmp_path / "a.gif")
    assert look(tmp_path / "a.gif").in_colour == in_colour


def test_pages_after_the_first_are_noticed(tmp_path: Path) -> None:
    pages = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "b.tif")
    assert [look(tmp_path / name).has_frames for name in ("a.tif", "b.tif")] == [True, False]
    shape = shape_of_all(stamped([tmp_path / "a.tif", tmp_path / "b.tif"]), None)
    assert shape == ((1, 6, 9), 0, 1)


MODES: dict[str, tuple[Callable[[], Image.Image], str, np.ndarray]] = {
    "1 bit": (lambda: Image.fromarray(GREY > 99), "png", np.where(GREY > 99, 255, 0)),
    "16 bits": (lambda: Image.fromarray(GREY.astype(np.uint16) * 256 + 99), "png", GREY),
    "16 bits, TIFF": (lambda: Image.fromarray(GREY.astype(np.uint16) * 256 + 99), "tif", GREY),
    "32 bits of 16": (lambda: Image.fromarray(GREY.astype(np.int32) * 256 + 99), "tif", GREY),
    "palette": (lambda: Image.fromarray(GREY).convert("P"), "png", GREY),
    "palette, GIF": (lambda: Image.fromarray(GREY), "gif", GREY),
    "8 bits": (lambda: Image.fromarray(GREY), "bmp", GREY),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_depth_becomes_8_bits_in_grey_and_in_rgb(mode: str, channels: int, tmp_path: Path) -> None:
    make, suffix, expected = MODES[mode]
    file = tmp_path / f"picture.{suffix}"
    make().save(file)
    pixels = read_picture(file, (channels, 6, 9))
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, np.broadcast_to(expected, (channels, 6, 9)))
    assert look(file).deep == ("16" in mode)


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(GREY / np.float32(255)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match=r"float\.tif cannot be read as an image \(its pixels are floating-point"):
        read_picture(tmp_path / "float.tif", (1, 6, 9))


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_resizing_keeps_what_is_where(suffix: str, tmp_path: Path) -> None:
    """A picture 40 times as large, bright below on the left, and lying on its side."""
    large = np.zeros((320, 480), dtype=np.uint8)
    large[160:, :240] = 255
    exif, file = Image.Exif(), tmp_path / f"large.{suffix}"
    exif[0x0112] = 6
    Image.fromarray(large).transpose(Image.Transpose.ROTATE_90).save(file, exif=exif)
    small = read_picture(file, (1, 8, 12), resize=True)[0].astype(int)
    assert small.shape == (8, 12)
    assert small[5:, :5].min() > 240
    assert max(small[:3].max(), small[:, 7:].max()) < 15
    with pytest.raises(DataError, match=rf"large\.{suffix} is 320x480 pixels \(height x width\), not 8x12"):
        read_picture(file, (1, 8, 12))


def test_a_picture_cannot_have_other_channels_than_1_or_3(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 or 3 channels, and 2 are wanted"):
        read_picture(tmp_path / "any.png", (2, 6, 9))


def test_a_damaged_picture_is_named_whatever_its_format(tmp_path: Path) -> None:
    for suffix in ("png", "jpg", "gif", "bmp", "tif", "webp"):
        file = tmp_path / f"cut.{suffix}"
        Image.fromarray(COLOUR).save(file)
        content = file.read_bytes()
        for kept in (0, 1, 20, len(content) // 2):
            file.write_bytes(content[:kept])
            with pytest.raises(DataError, match=rf"cut\.{suffix} cannot be read as an image \(.+\); mend or remove it"):
                read_picture(file, (3, 6, 9))


def test_files_of_a_folder_at_any_depth_in_order_and_what_is_left_out(tmp_path: Path) -> None:
    pictures = [
        "a.png",
        "b.JPG",
        "c.jpeg",
        "d.bmp",
        "e.webp",
        "f.tif",
        "g.jfif",
        "h.gif",
        "more/deep/i.png",
        "so/j.pgm",
    ]
    others = [".DS_Store", "so/.hidden.png", "notes.txt", "so/table.txt", "paper.pdf", "so/no_suffix", "so/data.h5"]
    for name in [*pictures, *others, ".cache/k.png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "gone.png").symlink_to("/nowhere/gone.png")
    (tmp_path / "so" / "back").symlink_to(tmp_path)
    left_out = LeftOut()
    found = [os.path.relpath(path, tmp_path) for path in picture_files(tmp_path, left_out)]
    assert found == pictures
    said = left_out.sentence(tmp_path)
    assert said.startswith(f"8 files of {tmp_path} are left out: 2 ")
    for words in ("2 hidden (such as .DS_Store)", "2 .txt (such as notes.txt)", "1 .pdf (paper.pdf)", "1 .h5"):
        assert words in said
    assert "1 links that lead nowhere (gone.png)" in said
    assert "1 without a suffix (so/no_suffix)" in said
    assert LeftOut().sentence(tmp_path) == ""
