"""Colour bars through the whole conversion: within one level of a formula worked out here, in every matrix and range."""

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from mlpipes.video.colour import Colour, Converter, colour_of
from mlpipes.video.probe import probe
from mlpipes_tests.video.made import images_of, upscale_here, write_video

BARS = [(r, g, b) for r in (0, 255) for g in (0, 255) for b in (0, 255)]
BARS += [
    (191, 191, 191),
    (128, 64, 200),
    (16, 235, 90),
    (1, 2, 3),
    (200, 30, 30),
    (30, 200, 30),
    (254, 253, 0),
    (77, 77, 78),
]
WEIGHTS = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}
SIDE = 16


def planes_by_hand(image: np.ndarray, matrix: int, full: bool) -> list[np.ndarray]:
    """Y, Cb and Cr by the formulas of BT.601, 709 and 2020, rounded."""
    red, green, blue = (image[..., n].astype(float) for n in range(3))
    of_red, of_blue = WEIGHTS[matrix]
    luma = of_red * red + (1 - of_red - of_blue) * green + of_blue * blue
    chroma = [(blue - luma) / (2 * (1 - of_blue)), (red - luma) / (2 * (1 - of_red))]
    if not full:
        luma, chroma = luma * 219 / 255 + 16, [c * 224 / 255 for c in chroma]
    return [np.clip(np.round(p), 0, 255).astype(np.uint8) for p in (luma, chroma[0] + 128, chroma[1] + 128)]


def rgb_by_hand(planes: list[np.ndarray], matrix: int, full: bool) -> np.ndarray:
    """Back, from rounded planes."""
    luma, of_blue, of_red = planes[0].astype(float), planes[1] - 128.0, planes[2] - 128.0
    if not full:
        luma, of_blue, of_red = (luma - 16) * 255 / 219, of_blue * 255 / 224, of_red * 255 / 224
    red_weight, blue_weight = WEIGHTS[matrix]
    red, blue = luma + 2 * (1 - red_weight) * of_red, luma + 2 * (1 - blue_weight) * of_blue
    green = (luma - red_weight * red - blue_weight * blue) / (1 - red_weight - blue_weight)
    return np.clip(np.round(np.stack([red, green, blue], -1)), 0, 255)


def bars() -> np.ndarray:
    """The colours as blocks."""
    return np.repeat(np.repeat(np.array(BARS, np.uint8).reshape(4, 4, 3), SIDE, 0), SIDE, 1)


def centres(image: np.ndarray) -> np.ndarray:
    """One value of each block, far from its borders, of an image of any scale."""
    step = image.shape[0] // 4
    return image[step // 2 :: step, step // 2 :: step].astype(int)


def frame_of(planes: list[np.ndarray], subsampled: bool) -> av.VideoFrame:
    step = 2 if subsampled else 1
    frame = av.VideoFrame(planes[0].shape[1], planes[0].shape[0], "yuv420p" if subsampled else "yuv444p")
    for plane, values in zip(frame.planes, (planes[0], *(p[::step, ::step] for p in planes[1:])), strict=True):
        rows = np.zeros((values.shape[0], plane.line_size), np.uint8)
        rows[:, : values.shape[1]] = values
        plane.update(rows.tobytes())
    return frame


@pytest.mark.parametrize("matrix", sorted(WEIGHTS))
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("subsampled", [False, True])
def test_bars_both_ways(matrix: int, full: bool, subsampled: bool) -> None:
    convert = Converter(Colour(matrix=matrix, full=full, primaries=2, transfer=2))
    planes = planes_by_hand(bars(), matrix, full)
    found = convert.to_rgb(frame_of(planes, subsampled))
    assert np.abs(centres(found) - centres(rgb_by_hand(planes, matrix, full))).max() <= 1
    made = convert.from_rgb(bars(), "yuv420p" if subsampled else "yuv444p")
    for plane, wanted, step in zip(made.planes, planes, (1, 2, 2) if subsampled else (1, 1, 1), strict=True):
        rows = np.frombuffer(bytes(plane), np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
        assert np.abs(centres(np.repeat(np.repeat(rows, step, 0), step, 1)) - centres(wanted)).max() <= 1


@pytest.mark.parametrize(
    ("matrix", "range_", "width", "taken", "full"),
    [(1, 1, 64, 1, False), (5, 2, 64, 5, True), (9, 1, 64, 9, False), (2, 0, 64, 6, False), (2, 0, 1280, 1, False)],
)
def test_bars_through_a_whole_video(
    tmp_path: Path, matrix: int, range_: int, width: int, taken: int, full: bool
) -> None:
    """Also untagged ones, which are BT.601 if they are small and BT.709 if large; the result says which."""

    def tune(_: Any, stream: Any) -> None:
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, range_

    image = np.tile(bars(), (1, width // 64, 1))
    planes = planes_by_hand(image, taken, full)
    path = tmp_path / "x.mkv"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=25, options={"qp": "0", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, 64, "yuv444p"
        tune(container, stream)
        for number in range(2):
            frame = frame_of(planes, subsampled=False)
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    made = upscale_here(path, tmp_path / "store")
    colour = probe(made).colour
    assert (colour.matrix, colour.full) == (taken, full)
    with av.open(str(made)) as container:
        found = Converter(colour).to_rgb(next(container.decode(video=0)))[:, :128]
    # Rounded twice, and once more by the encoder at its finest.
    assert np.abs(centres(found) - centres(rgb_by_hand(planes, taken, full)[:, :64])).max() <= 4


def test_rgb_sources(tmp_path: Path) -> None:
    path = write_video(tmp_path / "x.mkv", [bars()] * 2, codec="ffv1", pix_fmt="bgr0", size=(64, 64))
    assert probe(path).colour.rgb
    made = upscale_here(path, tmp_path / "store")
    source = probe(made)
    assert (source.pix_fmt, source.colour.matrix, source.colour.full) == ("yuv444p", 6, False)
    with av.open(str(made)) as container:
        found = Converter(source.colour).to_rgb(next(container.decode(video=0)))
    assert np.abs(centres(found) - centres(bars())).max() <= 4
    assert len(images_of(made)) == 2


def test_matrices_that_are_not_known() -> None:
    from mlpipes.errors import DataError

    with pytest.raises(DataError, match=r"number 8 of ITU-T H\.273"):
        colour_of("yuv420p", 8, 1, 2, 2, 64, 48)
