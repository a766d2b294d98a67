"""The report of super-resolution: fidelity of each photograph beside the baselines', before and after, flicker, speed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlpipes.reporting import figures
from mlpipes.reporting.report import Report, Table
from mlpipes.reporting.statistics import mean_of, paired

CROP = 96
"""Side of the squares that are shown, in pixels."""
LOOKED_AT = 12
"""Photographs that are looked at."""
MEASURES = ("psnr_y", "ssim_y", "psnr_rgb")
_METHODS = {"bicubic_": "bicubic", "untrained_": "untrained network", "": "trained network"}
_LISTED = 100


def super_resolution_report(
    predictions: Mapping[str, np.ndarray],
    gain: np.ndarray,
    names: Sequence[str],
    looked_at: np.ndarray,
    seen: Mapping[str, np.ndarray],
) -> Report:
    """The report of figures of each sample, float (N,), whose photographs are `names`.

    `gain` (N,) is PSNR above the better baseline. Of the samples `looked_at` (B,), `seen` has what
    `SuperResolution.outputs` says. Patches of one photograph count as one.
    """
    order, where = np.unique(names, return_inverse=True)

    def by_photograph(values: np.ndarray) -> np.ndarray:
        return np.bincount(where, values.astype(np.float64)) / np.bincount(where)

    found = {name: by_photograph(values) for name, values in predictions.items() if "psnr" in name or "ssim" in name}
    gains, n = by_photograph(gain), len(order)
    scale, frames = int(predictions["scale"][0]), int(predictions["frames"][0])

    def mean(name: str) -> float | None:
        return float(found[name].mean()) if name in found else None

    rows = [
        [title, *(mean(f"{method}{name}") for name in MEASURES), _against(found, method)]
        for method, title in _METHODS.items()
    ]
    listed = ["bicubic_psnr_y", "untrained_psnr_y", "psnr_y", "bicubic_ssim_y", "ssim_y", "psnr_rgb"]
    least = np.argsort(gains, kind="stable")[:_LISTED].tolist()
    each = [[order[row], float(gains[row]), *(float(found[name][row]) for name in listed)] for row in least]
    title = "Photographs, the least gain first" + (f" ({_LISTED} of {n:,})" if n > _LISTED else "")
    flicker, colours, speed = (seen[name].mean(axis=0) for name in ("flicker", "ssim_rgb", "speed"))
    megapixels = float(speed[1] / speed[0] / 1e6)
    return Report(
        estimates={"psnr_y_gain": mean_of(gains)} | {name: mean_of(found[name]) for name in MEASURES},
        tables=[
            Table(f"Beside the baselines, ×{scale}", ["", *MEASURES, "trained network minus it, psnr_y"], rows),
            Table(title, ["photograph", "psnr_y_gain", *listed], each),
            Table(
                f"Of the {len(looked_at)} photographs looked at",
                ["", "trained network", "bicubic", "truth"],
                [
                    ["warping error from one frame to the next, levels of luma", *map(float, flicker)],
                    ["ssim_rgb, mean of three colours", *map(float, colours)],
                ],
            ),
        ],
        figures={"before_and_after": _before_and_after(seen["crops"], [names[row] for row in looked_at.tolist()])},
        quantities={
            "baseline": 0.0,
            "bicubic_psnr_y": float(found["bicubic_psnr_y"].mean()),
            "untrained_psnr_y": float(found["untrained_psnr_y"].mean()),
            "bicubic_ssim_y": float(found["bicubic_ssim_y"].mean()),
            "warping_error": float(flicker[0]),
            "bicubic_warping_error": float(flicker[1]),
            "true_warping_error": float(flicker[2]),
            "megapixels_per_second": megapixels,
        },
        notes=[
            f"×{scale} from {'single frames' if frames == 1 else f'{frames} frames'}, n={n:,} photographs; intervals are "
            "over photographs (Student's t). Y is luma of BT.601 in limited range; the border is shaved by the "
            "scale, levels are whole. `psnr_y_gain` is PSNR on Y above the better of both "
            "baselines, photograph by photograph, so the gate that asks for more than 0 compares in pairs.",
            "Motion between frames is made: the truth's warping error is that of interpolation and rounding alone. "
            f"The network put out {megapixels:.2f} megapixels a second where this report was made: "
            f"{megapixels * 1e6 / (1280 * 720):.2f} frames/s of 1280×720.",
        ],
    )


def _against(found: Mapping[str, np.ndarray], method: str) -> str | None:
    """How much better the trained network is, over the same photographs."""
    return str(paired(found[f"{method}psnr_y"], found["psnr_y"])) if method else None


def _before_and_after(crops: np.ndarray, names: Sequence[Any]) -> bytes:
    """Rows of photographs: bicubic, made and truth beside each other, of `crops` in the order made, bicubic, truth."""
    captions = [f"{name.rsplit('/')[-1][:14]}: {what}" for name in names for what in ("bicubic", "trained", "truth")]
    pictures = np.clip(np.rint(crops[:, [1, 0, 2]]), 0, 255).astype(np.uint8).reshape(-1, 3, CROP, CROP)
    return figures.side_by_side(pictures, captions, 6, "Where bicubic errs most")
