"""One image file as pixels: whatever its mode, depth, transparency and orientation, uint8 of one size and colour."""

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError, features

from mlpipes.errors import ConfigError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"})
UNREAD = frozenset({".heic", ".heif", ".avif", ".tif", ".tiff", ".jp2", ".jxl", ".svg", ".dng", ".cr2", ".nef", ".psd"})
"""Extensions of images that are not read here, so that a folder of them is no folder without images."""
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
# Bilinear over all source pixels that a pixel covers: no ringing, and what torchvision does.
_FILTER = Image.Resampling.BILINEAR
_LARGEST = 10_000


@dataclass(frozen=True)
class Decoder:
    """How image files become arrays; the same for training and for whoever serves the model."""

    height: int
    width: int
    colour: Literal["rgb", "grey"]
    fit: Literal["cover", "contain", "stretch"]
    background: int

    def __post_init__(self) -> None:
        if not all(isinstance(side, int) and 1 <= side <= _LARGEST for side in (self.height, self.width)):
            raise ConfigError(
                f"size {self.height}×{self.width}: expected height and width from 1 to {_LARGEST:,} pixels"
            )
        for name, known in (("colour", ("rgb", "grey")), ("fit", ("cover", "contain", "stretch"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} {getattr(self, name)!r}: expected one of {', '.join(map(repr, known))}")
        if not (isinstance(self.background, int) and 0 <= self.background <= 255):
            raise ConfigError(f"background {self.background!r}: expected a brightness from 0 (black) to 255 (white)")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of every image: (channels, height, width)."""
        return (3 if self.colour == "rgb" else 1), self.height, self.width

    def __call__(self, content: bytes) -> np.ndarray:
        """The pixels of a file's bytes, uint8 of `shape`. Raises ValueError saying what is wrong with them."""
        # A large JPEG is decoded at a half, a quarter or an eighth, at least twice as large as it ends.
        return _decoded(content, self.background, self._pixels, 2 * max(self.height, self.width))

    def _pixels(self, image: Image.Image) -> np.ndarray:
        image = self._fitted(image.convert("RGB" if self.colour == "rgb" else "L"))
        return np.asarray(image).reshape(self.height, self.width, -1).transpose(2, 0, 1)

    def _fitted(self, image: Image.Image) -> Image.Image:
        size = (self.width, self.height)
        if self.fit == "stretch":
            return image.resize(size, _FILTER)
        if self.fit == "cover":
            return ImageOps.fit(image, size, _FILTER)
        inside = ImageOps.contain(image, size, _FILTER)
        if 0 in inside.size:
            raise ValueError(
                f"{image.width}×{image.height} pixels: within {self.width}×{self.height} none would be left"
            )
        paper = Image.new(image.mode, size, (self.background,) * len(image.getbands()))
        paper.paste(inside, ((size[0] - inside.width) // 2, (size[1] - inside.height) // 2))
        return paper


def whole_picture(content: bytes) -> np.ndarray:
    """The pixels of a file's bytes at the size that they have, uint8 (H, W, 3), on white where they are transparent.

    Raises ValueError saying what is wrong with them.
    """
    return _decoded(content, 255, lambda image: np.asarray(image.convert("RGB")))


def _decoded(
    content: bytes, background: int, pixels: Callable[[Image.Image], np.ndarray], least_side: int | None = None
) -> np.ndarray:
    """The `pixels` of the image, upright and opaque, that a file's bytes hold. Raises ValueError saying what is wrong."""
    if not content:
        raise ValueError("it is empty")
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ValueError("something in this process set PIL.ImageFile.LOAD_TRUNCATED_IMAGES: half images would pass")
    try:
        return pixels(_opaque(_opened(content, least_side), background))
    except UnidentifiedImageError as error:
        raise ValueError(_unidentified(content)) from error
    except ValueError:
        raise
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, struct.error and others
        raise ValueError(f"{error} ({type(error).__name__})") from error


def _opened(content: bytes, least_side: int | None) -> Image.Image:
    with Image.open(BytesIO(content), formats=_FORMATS) as opened:
        # A camera's MPO holds the photograph and then its previews.
        if (frames := getattr(opened, "n_frames", 1)) > 1 and opened.format != "MPO":
            raise ValueError(f"it is animated: save the one of its {frames} frames that is meant")
        if least_side is not None:
            opened.draft(None, (least_side, least_side))
        return ImageOps.exif_transpose(opened)


def _opaque(image: Image.Image, background: int) -> Image.Image:
    """In mode L or RGB."""
    if image.mode == "I;16":
        image = _of_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*(background,) * 3, 255)), image)
    if image.mode not in ("1", "L", "P", "RGB", "RGBA", "CMYK"):
        raise ValueError(f"its pixels are of Pillow's mode {image.mode}, which has no known range")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def decoder_versions() -> dict[str, str | None]:
    """Versions of what decides which pixels a file has."""
    return {name: features.version(name) for name in ("pil", "jpg", "libjpeg_turbo", "webp")}


def _of_8_bits(image: Image.Image) -> Image.Image:
    """The high bytes, as Pillow takes of 16-bit colour; its own conversion of 16-bit grey would clip at 255."""
    values = np.asarray(image)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    if (clear := image.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _unidentified(content: bytes) -> str:
    if content[4:8] == b"ftyp":
        return "it is HEIC or AVIF, which is not read here: convert it to JPEG or PNG"
    return f"it is no {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]}"
