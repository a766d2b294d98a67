"""How texts are served: in batches of a few lengths, by code and files that need nothing of mlpipes."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlpipes.workloads.base import Batch, DataInfo
from mlpipes.workloads.deployables import PythonCode
from mlpipes.workloads.encoders import TOKENIZER

SERVED_CODE = Path(__file__).with_name("served_text_model.py")
_SHORTEST = 16
_AT_ONCE = 32
"""Texts that a served model is given together; it sorts them into its own batches."""


def lengths(longest: int) -> list[int]:
    """To how many tokens texts are padded: 16, 24, 32, 48, 64, …, and the longest that there are."""
    found, step = [], _SHORTEST
    while step < longest:
        found += [each for each in (step, step * 3 // 2) if each < longest]
        step *= 2
    return [*found, longest]


def batch(columns: Mapping[str, Any], rows: Tensor, length: int) -> Batch:
    """`input_ids`, `attention_mask` (B + 1, L) and `token_type_ids` of pairs, for B rows.

    The last row is nobody's: it has padding, for where nothing is masked, transformers computes in another way. It is the
    first row, less its second token if that fills the length: some encoders count tokens such as the one at the end.
    """
    ids, real = columns["tokens"].padded(rows, length)
    found = {"input_ids": _and_one_more(ids, real), "attention_mask": _and_one_more(real, real)}
    if "types" in columns:
        found["token_type_ids"] = _and_one_more(columns["types"].padded(rows, length)[0], real)
    return found


def _and_one_more(values: Tensor, real: Tensor) -> Tensor:
    last = values[:1]
    if bool(real[0].all()) and values.shape[1] > 1:
        last = torch.cat([last[:, :1], last[:, 2:], torch.zeros_like(last[:, :1])], dim=1)
    return torch.cat([values, last])


def deployed(
    model: Any,
    info: DataInfo,
    how: Mapping[str, Any],
    example: Mapping[str, Sequence[str]],
    answers: Mapping[str, Sequence[Any]],
) -> PythonCode:
    """A finished encoder with its tokenizer, and `how` it computes, which its configuration carries to the served code."""
    statistics = {name: info.statistics[name] for name in ("label_mean", "label_std") if name in info.statistics}
    calibration = info.calibration.parameters if info.calibration is not None else {}
    model.config.mlpipes = {**how, "precision": info.precision, **statistics, **calibration}

    def write(folder: Path) -> None:
        assert info.files is not None  # noqa: S101 - `prepare` has put the tokenizer there
        model.save_pretrained(folder)
        shutil.copytree(info.files / TOKENIZER, folder, dirs_exist_ok=True)

    requirements = ("torch", "transformers", "pandas", "mlflow")
    return PythonCode(SERVED_CODE, write, example, answers, requirements, _AT_ONCE, info.precision)
