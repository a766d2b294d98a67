"""Figures: curves, confusion matrices, calibration and mistakes, each returned as the bytes of a PNG."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_DPI = 80
COLOURS = ("#0b6e99", "#d9730d", "#0f7b6c", "#ad1a72", "#6940a5", "#64473a")


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure of a size in inches, and its axes: one, or an array (rows, columns)."""
    # The object interface of matplotlib: pyplot would keep global state in a long-lived code server.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def png_of(figure: Any) -> bytes:
    """A figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _plain(text: str) -> str:
    """A text that is shown as it is: between two dollars matplotlib reads a formula, and raises for what is none."""
    return text.replace("$", r"\$")


def training_curves(history: Sequence[Sequence[Any]], steps_per_epoch: int, best_step: int, metric: str) -> bytes:
    """Loss of training and validation, and the primary validation metric, over epochs; the chosen checkpoint marked.

    `history` holds rows of (key, value, step, time in ms).
    """
    figure, (losses, scores) = new_figure(9, 3.4, columns=2)
    for colour, key, label in ((COLOURS[0], "train/loss", "train"), (COLOURS[1], "validation/loss", "validation")):
        points = [(step / steps_per_epoch, value) for name, value, step, _ in history if name == key]
        if points:
            losses.plot(*zip(*points, strict=True), color=colour, label=label, linewidth=1.3)
    losses.set(xlabel="epoch", ylabel="loss", title="Loss", yscale="log")
    losses.legend(frameon=False)
    points = [(step / steps_per_epoch, value) for name, value, step, _ in history if name == f"validation/{metric}"]
    if points:
        scores.plot(*zip(*points, strict=True), color=COLOURS[1], marker="o", markersize=3, linewidth=1.3)
    scores.axvline(best_step / steps_per_epoch, color=COLOURS[2], linestyle="--", label="chosen by validation")
    scores.set(xlabel="epoch", title=f"Validation {metric}")
    scores.legend(frameon=False)
    for axes in (losses, scores):
        axes.spines[["top", "right"]].set_visible(False)
    return png_of(figure)


def confusion_matrix(matrix: np.ndarray, names: Sequence[str]) -> bytes:
    """Counts by true (rows) and predicted (columns) class; `matrix` int (C, C)."""
    side = max(3.6, min(12.0, 0.42 * len(names) + 1.4))
    figure, axes = new_figure(side, side)
    rates = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(rates, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= 30:
        shown = [_plain(name) for name in names]
        axes.set_xticks(range(len(names)), shown, rotation=60 if max(map(len, names)) > 2 else 0)
        axes.set_yticks(range(len(names)), shown)
        for row, column in zip(*np.nonzero(matrix), strict=True):
            colour = "white" if rates[row, column] > 0.5 else "black"
            axes.text(column, row, str(matrix[row, column]), ha="center", va="center", color=colour, fontsize=8)
    axes.set(xlabel="predicted", ylabel="true", title=f"Confusion, n={int(matrix.sum()):,}")
    return png_of(figure)


def reliability(confidences: Mapping[str, np.ndarray], correct: np.ndarray, bins: int) -> bytes:
    """Accuracy against confidence in equal-width bins, side by side; by title a float (N,), and `correct` bool (N,)."""
    figure, grid = new_figure(3.8 * len(confidences), 3.6, columns=len(confidences))
    edges = np.linspace(0, 1, bins + 1)
    for axes, (title, confidence) in zip(np.atleast_1d(grid), confidences.items(), strict=True):
        which = np.clip(np.digitize(confidence, edges[1:-1]), 0, bins - 1)
        for number in range(bins):
            inside = which == number
            if inside.any():
                middle = (edges[number] + edges[number + 1]) / 2
                axes.bar(middle, correct[inside].mean(), width=0.9 / bins, color=COLOURS[0])
        axes.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
        axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), title=title)
    return png_of(figure)


def scatter(labels: np.ndarray, values: np.ndarray) -> bytes:
    """Predicted values (N,) against labels (N,), with the line of no error."""
    figure, axes = new_figure(4.6, 4.2)
    low, high = float(min(labels.min(), values.min())), float(max(labels.max(), values.max()))
    axes.plot([low, high], [low, high], color="grey", linestyle="--", linewidth=1)
    axes.scatter(labels, values, s=8, alpha=0.4, color=COLOURS[0])
    axes.set(xlabel="label", ylabel="prediction", title="Predictions")
    axes.spines[["top", "right"]].set_visible(False)
    return png_of(figure)


def gallery(images: np.ndarray, captions: Sequence[str], maximum: int, title: str) -> bytes:
    """Pictures with captions; `images` uint8 (N, C, H, W) with values up to `maximum`, C = 1 or 3."""
    columns = min(8, max(3, len(images)))  # room for the title
    shown = [image.transpose(1, 2, 0).astype(float) / maximum for image in images]
    shown = [picture[..., 0] if picture.shape[2] == 1 else picture for picture in shown]
    return _pictures(shown, captions, columns, (1.3, 1.55), title, cmap="gray_r", vmin=0, vmax=1)


def side_by_side(images: np.ndarray, captions: Sequence[str], columns: int, title: str) -> bytes:
    """Pictures uint8 (N, 3, H, W) in rows of so many, large enough to see single pixels; captions above each."""
    shown = [picture.transpose(1, 2, 0) for picture in images]
    return _pictures(shown, captions, columns, (2.4, 2.65), title, interpolation="nearest")


def _pictures(
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    columns: int,
    size: tuple[float, float],
    title: str,
    **options: Any,
) -> bytes:
    """Pictures (H, W) or (H, W, 3) in rows of so many, each with its caption in a field of a size in inches."""
    from matplotlib.figure import Figure

    rows, (width, height), heading = max(1, -(-len(images) // columns)), size, 0.35
    total = rows * height + heading
    # Placed by us: a layout engine measures each of many axes and draws all of them twice, for half a second.
    figure = Figure(figsize=(columns * width, total), dpi=_DPI)
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(number, columns)
        bottom = 1 - (heading + (row + 1) * height - 0.05) / total
        place = ((column + 0.05) / columns, bottom, 0.9 / columns, (height - 0.35) / total)
        axes = figure.add_axes(place, xticks=[], yticks=[], frame_on=False)
        axes.imshow(image, **options)
        lines = textwrap.wrap(caption, int(15 * width), max_lines=2, placeholder=" …")
        axes.set_title(_plain("\n".join(lines)), fontsize=8, pad=3)
    figure.text(0.5, 1 - 0.2 / total, _plain(title), fontsize=10, ha="center", va="center")
    return png_of(figure)


def history(points: Sequence[tuple[str, Any, bool | None]], metric: str) -> bytes:
    """A figure over time with its intervals; `points` are (date, `Estimate`, passed), and crosses did not pass."""
    figure, axes = new_figure(9, 3.2)
    places = np.arange(len(points))
    for passed, colour, marker, label in (
        (True, COLOURS[2], "o", "passed the gates"),
        (False, "#b91c1c", "X", "did not pass"),
        (None, "grey", "o", "gates not run yet"),
    ):
        chosen = [(x, e) for x, (_, e, verdict) in zip(places, points, strict=True) if verdict is passed]
        if chosen:
            values = np.array([e.value for _, e in chosen])
            errors = np.abs(np.array([[e.low, e.high] for _, e in chosen]).T - values)
            at = [x for x, _ in chosen]
            axes.errorbar(at, values, yerr=errors, fmt=marker, color=colour, capsize=2, label=label)
    every = max(1, -(-len(points) // 12))
    axes.set_xticks(places[::every], [date for date, _, _ in points][::every], rotation=30)
    axes.set(title=f"test {metric} of each evaluation, 95 % interval")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return png_of(figure)
