"""The golden request of a registered model: an input with the answer to it, asked before a version takes traffic."""

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlpipes.errors import CorruptionError
from mlpipes.store.files import canonical_json

GOLDEN = "golden.json"
"""Its name among the files of a model in MLflow."""
BF16_PROGRAM = "bf16.pt2"
"""There, the program of a model that was evaluated in bf16, for CPUs that have it."""
_VERSION = 1
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}
"""How far, absolutely and relatively, answers may lie apart where machines compute otherwise, by precision."""

Values = np.ndarray | Mapping[str, np.ndarray]
"""Samples, or answers to them: an array (B, …), or a table by column."""


@dataclass(frozen=True)
class GoldenRequest:
    """What a stored model has answered where it was registered, and how it was asked."""

    rows: int
    """Samples of a forward pass."""
    precision: str
    """What forward passes run at: fp32 or bf16."""
    exact: bool
    """Whether the answer had the bits of the model that was evaluated."""
    computed_on: Mapping[str, str]
    """`machine_of_bits` there: only where it is the same, the same bits can be asked for."""
    given: Values
    answer: Values
    evaluated_on: str = "cpu"
    """The kind of device that such models are evaluated on where it was registered."""

    @classmethod
    def of(cls, rows: int, precision: str, given: Values, answer: Values, *, exact: bool) -> "GoldenRequest":
        """The one of this machine."""
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(rows, precision, exact, machine_of_bits(), given, answer, device)

    def to_json(self) -> bytes:
        """As it is stored."""
        fields = {"version": _VERSION, "rows": self.rows, "precision": self.precision, "exact": self.exact}
        fields |= {"computed_on": dict(self.computed_on), "evaluated_on": self.evaluated_on}
        return canonical_json(fields | {"given": _encoded(self.given), "answer": _encoded(self.answer)})

    @classmethod
    def from_json(cls, data: bytes) -> "GoldenRequest":
        """Read it back. Raises CorruptionError if it is none."""
        try:
            found = json.loads(data)
            if found["version"] != _VERSION:
                raise ValueError(f"version {found['version']}")
            fields = (found["rows"], found["precision"], found["exact"], found["computed_on"])
            values = _decoded(found["given"]), _decoded(found["answer"])
            return cls(*fields, *values, found["evaluated_on"])
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptionError(f"{GOLDEN} cannot be read: {error!r}") from error

    def difference(self, answer: Values, precision: str) -> str:
        """What is wrong with an answer that is given here, computed at a precision; empty where nothing is."""
        bits = precision == self.precision and dict(self.computed_on) == machine_of_bits()
        wanted, found = _columns(self.answer), _columns(answer)
        if list(wanted) != list(found):
            return f"it answers with {', '.join(found)} instead of {', '.join(wanted)}"
        allowed = max(TOLERANCE[self.precision], TOLERANCE[precision])
        for name, column in wanted.items():
            other = found[name]
            if other.shape != column.shape:
                return f"{name} has the shape {other.shape} instead of {column.shape}"
            if np.array_equal(column, other):
                continue
            if bits:
                return f"{name} differs in its bits on a machine that computes the same"
            if column.dtype.kind in "fiu":
                gap = float(np.abs(column.astype(np.float64) - other).max())
                # The levels of pictures are whole numbers: where kernels differ, they are off by one.
                least = 1.0 if column.dtype.kind in "iu" else allowed
                if not np.allclose(column.astype(np.float64), other, rtol=allowed, atol=least):
                    return f"{name} differs by up to {gap:.3g}"
        return ""

    def caveat(self, precision: str) -> str:
        """Why answers computed here at a precision need not have the bits of the evaluation; empty where they must."""
        if not self.exact:
            return "the stored model rounds otherwise than the one that was evaluated"
        if self.evaluated_on != "cpu":
            return "it was evaluated on a GPU, and is computed by a CPU"
        if precision != self.precision:
            return f"it was evaluated in {self.precision}, and is computed in {precision} here"
        here = machine_of_bits()
        other = [f"{name} {self.computed_on.get(name)} there, {here[name]} here" for name in here]
        other = [text for text, name in zip(other, here, strict=True) if self.computed_on.get(name) != here[name]]
        return f"it was registered on another kind of machine ({'; '.join(other)})" if other else ""


def machine_of_bits() -> dict[str, str]:
    """What the bits of an answer depend on besides the model: kind of CPU and its kernels, torch's version."""
    import torch

    from mlpipes.workloads.tensors import has_native_bf16

    kernels = torch.backends.cpu.get_cpu_capability() + (" bf16" if has_native_bf16(torch.device("cpu")) else "")
    return {"machine": platform.machine(), "kernels": kernels, "torch": torch.__version__}


def _columns(values: Values) -> Mapping[str, np.ndarray]:
    return {"the answer": values} if isinstance(values, np.ndarray) else values


def _encoded(values: Values) -> Any:
    if isinstance(values, np.ndarray):
        return {"dtype": str(values.dtype), "shape": list(values.shape), "data": values.ravel().tolist()}
    return {"columns": [[name, _encoded(column)] for name, column in values.items()]}


def _decoded(values: Any) -> Values:
    if "columns" in values:
        return {name: np.asarray(_decoded(column)) for name, column in values["columns"]}
    dtype = np.dtype(values["dtype"])
    return np.array(values["data"], dtype=dtype).reshape(values["shape"])
