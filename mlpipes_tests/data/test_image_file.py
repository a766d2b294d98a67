"""One image file: the right pixels from every mode, depth, transparency and orientation, or what is wrong with it."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from mlpipes.data.image_file import Decoder
from mlpipes.errors import ConfigError

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def decoder(height: int = 8, width: int = 8, colour: Any = "rgb", fit: Any = "cover", background: int = 255) -> Decoder:
    return Decoder(height, width, colour, fit, background)


def colour_of(content: bytes, **options: Any) -> tuple[int, ...]:
    """That of all pixels of an image that has one colour."""
    pixels = decoder(**options)(content)
    assert pixels.dtype == np.uint8
    assert pixels.shape == ((1 if options.get("colour") == "grey" else 3), 8, 8)
    assert (pixels == pixels[:, :1, :1]).all()
    return tuple(pixels[:, 0, 0].tolist())


def noise(side: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def halves(first: tuple[int, ...], second: tuple[int, ...], mode: str = "RGB") -> Image.Image:
    """16×8 pixels: the left half of one colour, the right half of another."""
    image = Image.new(mode, (16, 8), first)
    image.paste(second, (8, 0, 16, 8))
    return image


def test_pixels_of_the_right_size_are_as_they_are() -> None:
    image = noise(8)
    expected = np.asarray(image).transpose(2, 0, 1)
    for kind in ("PNG", "BMP"):
        np.testing.assert_array_equal(decoder()(saved(image, kind)), expected)
    np.testing.assert_array_equal(decoder()(saved(image, "WEBP", lossless=True)), expected)
    np.testing.assert_array_equal(decoder(colour="grey")(saved(image))[0], np.asarray(image.convert("L")))
    assert not np.array_equal(expected[0], expected[1])


def test_the_same_bytes_give_the_same_pixels() -> None:
    content = saved(noise(300), "JPEG", quality=80)
    for fit in ("cover", "contain", "stretch"):
        np.testing.assert_array_equal(decoder(24, 40, fit=fit)(content), decoder(24, 40, fit=fit)(content))


def test_a_large_jpeg_is_close_to_the_whole_one_scaled() -> None:
    """It is decoded at a smaller size, which must not shift or darken it."""
    ramp = np.tile(np.linspace(0, 255, 640), (480, 1))
    image = Image.fromarray(np.stack([ramp, 255 - ramp, np.full_like(ramp, 90)], 2).astype(np.uint8))
    found = decoder(12, 16)(saved(image, "JPEG", quality=95)).astype(int)
    whole = np.asarray(image.resize((16, 12), Image.Resampling.BOX)).transpose(2, 0, 1).astype(int)
    assert np.abs(found - whole).max() <= 3


# -- fit --------------------------------------------------------------------------------------------------------------
def test_cover_cuts_contain_fills_up_and_stretch_distorts() -> None:
    content = saved(halves(RED, BLUE))
    cover = decoder(8, 8)(content)
    assert (cover[:, 0, 0].tolist(), cover[:, 7, 7].tolist()) == ([255, 0, 0], [0, 0, 255])
    # What is cut off is of both sides: the border between the colours stays in the middle.
    assert (cover[0, :, :4] == 255).all()
    assert (cover[2, :, 4:] == 255).all()
    contain = decoder(8, 8, fit="contain", background=7)(content)
    assert (contain[:, :2] == 7).all()
    assert (contain[:, 6:] == 7).all()
    assert (contain[0, 2:6, :3] == 255).all()
    assert (contain[1, 2:6] == 0).all()
    stretch = decoder(8, 8, fit="stretch")(content)
    assert (stretch[0, :, :3] == 255).all()
    assert (stretch[2, :, 5:] == 255).all()
    assert decoder(4, 10, "grey", "contain", 7)(content).shape == (1, 4, 10)
    assert decoder(4, 10, "grey", "contain", 7)(content)[0, 0].tolist()[::9] == [7, 7]


@pytest.mark.parametrize("fit", ["cover", "contain", "stretch"])
def test_one_pixel_and_very_large_images(fit: str) -> None:
    assert colour_of(saved(Image.new("RGB", (1, 1), RED)), fit=fit) == RED
    assert colour_of(saved(Image.new("RGB", (1500, 1500), RED)), fit=fit) == RED


def test_a_line_of_pixels() -> None:
    content = saved(Image.new("RGB", (1, 1000), RED))
    assert colour_of(content) == colour_of(content, fit="stretch") == RED
    with pytest.raises(ValueError, match="1×1000 pixels: within 8×8 none would be left"):
        decoder(fit="contain")(content)


# -- modes ------------------------------------------------------------------------------------------------------------
def test_grey_and_black_and_white() -> None:
    assert colour_of(saved(Image.new("L", (8, 8), 77))) == (77, 77, 77)
    assert colour_of(saved(Image.new("L", (8, 8), 77)), colour="grey") == (77,)
    assert colour_of(saved(Image.new("1", (8, 8), 1))) == WHITE
    assert colour_of(saved(Image.new("1", (8, 8), 0)), colour="grey") == (0,)
    assert colour_of(saved(Image.new("RGB", (8, 8), RED)), colour="grey") == (76,)  # 0.299 × 255


def test_16_bits_are_scaled_and_not_clipped() -> None:
    values = np.array([[0, 255, 256, 1000], [20_000, 32_768, 65_279, 65_535]], dtype=np.uint16)
    content = saved(Image.fromarray(values))
    np.testing.assert_array_equal(decoder(2, 4, "grey")(content)[0], values // 256)
    np.testing.assert_array_equal(decoder(2, 4)(content)[2], values // 256)
    np.testing.assert_array_equal(decoder(2, 4)(png_of_16_bits(values))[1], values // 256)
    # One value of grey may stand for "nothing".
    clear = decoder(2, 4, "grey")(saved(Image.fromarray(values), transparency=20_000))[0]
    np.testing.assert_array_equal(clear, np.where(values == 20_000, 255, values // 256))


def png_of_16_bits(grey: np.ndarray) -> bytes:
    """A colour PNG of 16 bits a channel, which Pillow cannot write."""
    rows = np.repeat(grey[:, :, None], 3, 2).astype(">u2")
    return png(grey.shape[1], grey.shape[0], 16, 2, b"".join(b"\0" + row.tobytes() for row in rows))


def png(width: int, height: int, bits: int, colour_type: int, data: bytes) -> bytes:
    """A PNG of some data, each row after the number of its filter."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def test_what_is_transparent_shows_the_background() -> None:
    hidden = saved(Image.new("RGBA", (8, 8), (255, 0, 0, 0)))
    assert colour_of(hidden) == WHITE
    assert colour_of(hidden, background=0) == (0, 0, 0)
    assert colour_of(hidden, background=7, colour="grey") == (7,)
    assert colour_of(saved(Image.new("RGBA", (8, 8), (255, 0, 0, 255)))) == RED
    assert colour_of(saved(Image.new("RGBA", (8, 8), (0, 0, 0, 51)))) == (204, 204, 204)
    assert colour_of(saved(Image.new("LA", (8, 8), (0, 0)))) == WHITE
    assert colour_of(saved(Image.new("LA", (8, 8), (90, 255))), colour="grey") == (90,)
    assert colour_of(saved(Image.new("RGB", (8, 8), RED), transparency=RED)) == WHITE
    assert colour_of(saved(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "WEBP", lossless=True)) == WHITE


def test_palettes_with_and_without_transparency() -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    assert colour_of(saved(image)) == RED
    assert colour_of(saved(image), colour="grey") == (76,)
    assert colour_of(saved(image, "GIF")) == RED
    assert colour_of(saved(image, transparency=1)) == WHITE
    assert colour_of(saved(image, transparency=0)) == RED
    assert colour_of(saved(image, transparency=b"\xff\x33")) == (255, 204, 204)


def test_cmyk_is_converted_with_its_ink_the_right_way_round() -> None:
    """Pillow writes them as Adobe's programs do: inverted, and marked."""
    content = saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    assert b"Adobe" in content
    assert colour_of(content) == RED
    assert colour_of(saved(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "JPEG")) == (0, 0, 0)
    assert colour_of(saved(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"), colour="grey") == (255,)


# What is seen of an image whose stored corners are a, b above and c, d below.
@pytest.mark.parametrize(
    ("orientation", "corners"),
    list(enumerate(["abcd", "badc", "dcba", "cdab", "acbd", "cadb", "dbca", "bdac"], start=1)),
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_images_are_turned_as_their_exif_says(kind: str, orientation: int, corners: str) -> None:
    stored = np.repeat(np.repeat(np.array([[0, 85], [170, 255]], dtype=np.uint8), 8, 0), 16, 1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    height, width = (32, 16) if orientation >= 5 else (16, 32)
    pixels = decoder(height, width, "grey")(saved(Image.fromarray(stored), kind, exif=exif))[0]
    seen = pixels[[1, 1, -2, -2], [1, -2, 1, -2]].astype(int)
    assert "".join("abcd"[value] for value in np.round(seen / 85).astype(int)) == corners


def test_broken_exif_is_no_orientation() -> None:
    assert colour_of(saved(Image.new("L", (8, 8), 128), "JPEG", exif=b"Exif\0\0garbage")) == (128, 128, 128)


def test_progressive_jpegs_and_photographs_with_previews() -> None:
    image = Image.new("L", (8, 8), 128)
    assert colour_of(saved(image, "JPEG", progressive=True)) == (128, 128, 128)
    preview = saved(image, "MPO", save_all=True, append_images=[Image.new("L", (8, 8), 0)])
    assert colour_of(preview) == (128, 128, 128)


# -- what is wrong ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
def test_a_jpeg_that_was_cut_off_is_an_error_wherever(options: dict[str, bool]) -> None:
    content = saved(noise(), "JPEG", **options)
    for length in [*range(2, len(content) - 2, 397), len(content) - 3]:
        with pytest.raises(ValueError):
            decoder()(content[:length])
    assert decoder()(content).any()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "GIF"])
def test_other_files_that_were_cut_off_are_errors(kind: str) -> None:
    content = saved(noise(), kind)
    for share in (0.02, 0.3, 0.6, 0.9):
        with pytest.raises(ValueError):
            decoder()(content[: int(share * len(content))])


def test_a_changed_byte_of_a_png_is_an_error() -> None:
    content = bytearray(saved(noise()))
    content[len(content) // 2] ^= 1
    with pytest.raises(ValueError):
        decoder()(bytes(content))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_animations_are_errors(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE, WHITE)]
    content = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="animated: save the one of its 3 frames that is meant"):
        decoder()(content)


def test_what_is_no_image_says_what_it_is() -> None:
    with pytest.raises(ValueError, match="it is empty"):
        decoder()(b"")
    with pytest.raises(ValueError, match="it is no JPEG, PNG, WEBP, BMP or GIF"):
        decoder()(b"an ordinary text\n")
    with pytest.raises(ValueError, match="HEIC or AVIF, which is not read here: convert it"):
        decoder()(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    with pytest.raises(ValueError, match="no JPEG"):
        decoder()(saved(Image.new("L", (8, 8)), "TIFF"))


def test_a_decompression_bomb_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"400000000 pixels\) exceeds limit.*DecompressionBombError"):
        decoder()(png(20_000, 20_000, 1, 0, b""))


def test_half_images_never_pass_whatever_other_libraries_set(monkeypatch: pytest.MonkeyPatch) -> None:
    content = saved(noise(), "JPEG")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ValueError, match="LOAD_TRUNCATED_IMAGES"):
        decoder()(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"height": 0}, "size 0×8"),
        ({"width": 20_000}, "size 8×20000"),
        ({"colour": "gray"}, "colour 'gray': expected one of 'rgb', 'grey'"),
        ({"fit": "crop"}, "fit 'crop'"),
        ({"background": 256}, "background 256"),
    ],
)
def test_settings_that_cannot_be_are_errors(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        decoder(**options)
