"""Colour: between the planes of a video and full-range RGB, by the matrix and range that the video is in, within one level.

FFmpeg's scaler does it, with exact rounding and one thread, so that the same planes always give the same bytes.
"""

import numpy as np
from av import VideoFrame
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from pydantic import BaseModel, ConfigDict

from mlpipes.errors import DataError

_EXACT = (
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.BITEXACT
)
UNSPECIFIED = 2
"""Of a matrix, of primaries and of a transfer function (ITU-T H.273)."""
BT709, BT601 = 1, 6
MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9}
"""Matrix coefficients of H.273 that can be converted (BT.709, FCC, BT.601 twice, SMPTE 240M, BT.2020) to the scaler's."""
HDR_TRANSFERS = {16: "PQ, as in HDR10", 18: "HLG"}
HD_HEIGHT, HD_WIDTH = 720, 1280

RGB_FORMATS = frozenset({"rgb24", "bgr24", "gbrp", "rgb0", "bgr0", "0rgb", "0bgr"})
SUBSAMPLING = {
    "yuv420p": "420",
    "yuvj420p": "420",
    "nv12": "420",
    "yuv422p": "422",
    "yuvj422p": "422",
    "yuyv422": "422",
    "uyvy422": "422",
    "yuv444p": "444",
    "yuvj444p": "444",
    "gray": "420",
    **dict.fromkeys(RGB_FORMATS, "444"),
}
"""Pixel formats that can be read, and how the result's chroma is sampled."""


class Colour(BaseModel):
    """How a video's numbers mean colours; as it says itself, or as players take it where it does not."""

    model_config = ConfigDict(frozen=True)

    matrix: int
    """A key of `MATRICES`."""
    full: bool
    """Whether luma uses 0-255 instead of 16-235."""
    primaries: int
    transfer: int
    rgb: bool = False
    """Whether the planes are RGB already; matrix and range are then those of the result."""

    @property
    def range(self) -> ColorRange:
        """The range of the planes."""
        return ColorRange.JPEG if self.full else ColorRange.MPEG


def colour_of(pix_fmt: str, matrix: int, range_: int, primaries: int, transfer: int, width: int, height: int) -> Colour:
    """The colour of a video by its tags (numbers of H.273); an untagged one of HD size is BT.709, a smaller one BT.601.

    Raises DataError for HDR and for a matrix that is none of `MATRICES`.
    """
    if transfer in HDR_TRANSFERS:
        raise DataError(
            f"it is HDR ({HDR_TRANSFERS[transfer]}), and the models work with 8-bit SDR: tone-map it first, for example "
            "with FFmpeg's filters zscale and tonemap"
        )
    hd = height >= HD_HEIGHT or width >= HD_WIDTH
    if pix_fmt in RGB_FORMATS:
        return Colour(matrix=BT709 if hd else BT601, full=False, primaries=primaries, transfer=transfer, rgb=True)
    if matrix == UNSPECIFIED:
        matrix = BT709 if hd else BT601
    if matrix not in MATRICES:
        raise DataError(f"its colours are in a matrix that is not known here (number {matrix} of ITU-T H.273)")
    full = range_ == ColorRange.JPEG or pix_fmt.startswith("yuvj")
    return Colour(matrix=matrix, full=full, primaries=primaries, transfer=transfer)


class Converter:
    """Converts the frames of one video; keeps the scaler between frames."""

    def __init__(self, colour: Colour) -> None:
        self.colour = colour
        self._planar, self._to, self._from = VideoReformatter(), VideoReformatter(), VideoReformatter()

    def planar(self, frame: VideoFrame) -> VideoFrame:
        """The same samples in a layout that FFV1 stores: nothing is lost."""
        name = frame.format.name
        target = {"nv12": "yuv420p", "yuyv422": "yuv422p", "uyvy422": "yuv422p"}.get(name, name.replace("yuvj", "yuv"))
        if name in RGB_FORMATS:
            target = "bgr0"
        if target == name:
            return frame
        side = ColorRange.JPEG if self.colour.rgb else self.colour.range
        return self._planar.reformat(
            frame, format=target, src_color_range=side, dst_color_range=side, interpolation=_EXACT, threads=1
        )

    def to_rgb(self, frame: VideoFrame) -> np.ndarray:
        """Full-range RGB, uint8 [H, W, 3]."""
        matrix, source = MATRICES[self.colour.matrix], self.colour.range
        if self.colour.rgb:
            source = ColorRange.JPEG
        made = self._to.reformat(
            frame,
            format="rgb24",
            src_colorspace=matrix,
            dst_colorspace=matrix,
            src_color_range=source,
            dst_color_range=ColorRange.JPEG,
            interpolation=_EXACT,
            threads=1,
        )
        return made.to_ndarray()

    def from_rgb(self, image: np.ndarray, pix_fmt: str) -> VideoFrame:
        """Planes of a YUV format, in the video's matrix and range, from uint8 RGB [H, W, 3]."""
        matrix = MATRICES[self.colour.matrix]
        made = self._from.reformat(
            VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24"),
            format=pix_fmt,
            src_colorspace=matrix,
            dst_colorspace=matrix,
            src_color_range=ColorRange.JPEG,
            dst_color_range=self.colour.range,
            interpolation=_EXACT,
            threads=1,
        )
        made.color_range = self.colour.range
        return made


def result_format(pix_fmt: str, width: int, height: int) -> str:
    """The pixel format of a result of a size: chroma sampled as in the source, in full where that does not divide it."""
    sampling = SUBSAMPLING[pix_fmt]
    if (sampling == "420" and (width % 2 or height % 2)) or (sampling == "422" and width % 2):
        sampling = "444"
    return f"yuv{sampling}p"
