"""What is deployed of trained models: a torch program, or Python code with its files; each logs itself to MLflow."""

import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from mlpipes.workloads.golden import BF16_PROGRAM, GOLDEN, GoldenRequest
from mlpipes.workloads.served import AtPrecision, answers_in_batches

_LOG = logging.getLogger(__name__)
TOLERANCE = 1e-3
"""How far, absolutely and relatively, a stored model's outputs may lie from the trained one's: kernels differ."""


@dataclass(frozen=True)
class TorchProgram:
    """A module in torch's export format (pt2): raw samples (an array) in, outputs (an array) out."""

    module: nn.Module
    example: np.ndarray
    """A small batch of raw samples; the stored program takes any number of them."""
    free: Sequence[int] = (0,)
    """The axes of a batch whose length may be another one than the example's."""
    about: Mapping[str, Any] | None = None
    """What whoever loads it must know, as JSON: MLflow's `metadata` of the model."""
    memory_format: torch.memory_format = torch.contiguous_format
    """Of its weights; the module itself brings what it is given, plain arrays, into the order that suits them."""
    rows: int = 8
    """How many samples at a time it is given where it is served; the engine says how many it was evaluated with."""
    precision: str = "fp32"
    """What it is served at; the engine says at what it was evaluated."""
    unrounded: nn.Module | None = None
    """The module up to where it rounds to levels of pictures: that hides bits that differ, until a level differs."""

    def log(self, extra_files: Sequence[Path]) -> Any:
        """See `Deployable.log`."""
        with warnings.catch_warnings():
            # Torch's of its own archive, of weights that share memory; they are compared right after.
            warnings.filterwarnings("ignore", message="No complete tensor found in the group")
            return self._logged(extra_files)

    def _logged(self, extra_files: Sequence[Path]) -> Any:
        import mlflow
        from mlflow.models import Model

        module = self.module.cpu().eval()
        evaluated = AtPrecision(module, self.precision)
        judged = AtPrecision(self.unrounded.cpu().eval(), self.precision) if self.unrounded else evaluated
        trained = answers_in_batches(judged, self.example, self.rows)
        module = module.to(memory_format=self.memory_format)  # pyright: ignore[reportCallIssue]
        with torch.no_grad():
            answer = module(torch.from_numpy(self.example))
        outputs = (answer.float() if answer.is_floating_point() else answer).numpy()
        logged = Model.log(
            None,  # MLflow 2 called the name so
            name="model",
            flavor=_ForCpus,
            flavor_name="pytorch",
            pytorch_model=module,
            input_example=self.example,
            signature=self._signature(outputs),
            metadata=dict(self.about) if self.about is not None else None,
            serialization_format="pt2",
            pip_requirements=_requirements("torch", "numpy", "mlflow"),
            extra_files=[str(path) for path in extra_files],
        )
        again = np.asarray(mlflow.pyfunc.load_model(logged.model_uri).predict(self.example))
        _compare("its output", again, outputs)
        with tempfile.TemporaryDirectory(prefix="mlpipes-model-") as scratch:
            program, stored = Path(scratch) / BF16_PROGRAM, None
            if self.precision == "bf16":
                stored = self._stored(evaluated, program)
            precision, files = (self.precision, [program]) if stored else ("fp32", [])
            served = answers_in_batches(
                stored or cast(Any, mlflow.pytorch.load_model(logged.model_uri)), self.example, self.rows
            )
            found = served
            if self.unrounded is not None:
                beside = self._stored(judged, Path(scratch) / "unrounded.pt2")
                found = answers_in_batches(beside, self.example, self.rows) if beside else None
            exact = precision == self.precision and found is not None and _same_bits(found, trained)
            _attach(GoldenRequest.of(self.rows, precision, self.example, served, exact=exact), logged, files)
        return logged

    def _stored(self, module: nn.Module, path: Path) -> Any:
        """A program as it comes back from a file, where MLflow's is another; None where it cannot be exported."""
        lengths = dict.fromkeys(self.free, torch.export.Dim.AUTO)
        try:
            torch.export.save(
                torch.export.export(module, (torch.from_numpy(self.example),), dynamic_shapes=[lengths]), path
            )
            return torch.export.load(path).module()
        except (
            Exception
        ) as error:  # of whatever the author's module does; fp32 is served then, and said not to be exact
            _LOG.warning("the model's answers are not exact, for what it computes cannot be exported: %s", error)
            return None

    def _signature(self, outputs: np.ndarray) -> Any:
        from mlflow.models import ModelSignature
        from mlflow.types import Schema, TensorSpec

        shape = tuple(-1 if axis in self.free else length for axis, length in enumerate(self.example.shape))
        # Where more than the number of samples is free, what comes out has other lengths as well.
        answer = (-1, *(outputs.shape[1:] if tuple(self.free) == (0,) else (-1,) * (outputs.ndim - 1)))
        return ModelSignature(
            Schema([TensorSpec(self.example.dtype, shape)]), Schema([TensorSpec(outputs.dtype, answer)])
        )


class _ForCpus:
    """MLflow's flavor `pytorch`, of a program that says it is for CPUs: otherwise MLflow wants every model on the GPU of the
    machine that loads it, and refuses an exported program, whose tensors cannot move.
    """

    @staticmethod
    def save_model(path: str, mlflow_model: Any, **options: Any) -> None:
        """What `Model.log` asks a flavor for."""
        import mlflow

        mlflow.pytorch.save_model(path=path, mlflow_model=mlflow_model, **options)
        mlflow_model.flavors["python_function"]["config"] = {"device": "cpu"}
        mlflow_model.save(str(Path(path) / "MLmodel"))


@dataclass(frozen=True)
class PythonCode:
    """A file of code that MLflow runs where the model is served, with a folder that it reads: a table in, a table out.

    MLflow copies the file beside the folder, so it must import nothing that is not in `requirements`.
    """

    code: Path
    """Ends with `mlflow.models.set_model(…)`; finds the folder as the artifact `model`."""
    write: Callable[[Path], None]
    """Fills the folder, which is there and empty."""
    example: Mapping[str, Sequence[Any]]
    """A few raw samples, by column."""
    answers: Mapping[str, Sequence[Any]]
    """What the trained model says of them, by column."""
    requirements: Sequence[str] = ("torch", "pandas", "mlflow")
    """Packages that it needs, pinned to the versions here."""
    rows: int = 1
    """How many samples at a time it is given where it is served; more than 1 only if each answer depends on its own
    sample alone, in its last bit, whatever the others are."""
    precision: str = "fp32"
    """What the code computes at."""

    def log(self, extra_files: Sequence[Path]) -> Any:
        """See `Deployable.log`."""
        import mlflow
        import pandas as pd
        from mlflow.models import infer_signature

        example = pd.DataFrame(self.example)
        with tempfile.TemporaryDirectory(prefix="mlpipes-model-") as scratch:
            folder = Path(scratch) / "model"
            folder.mkdir()
            self.write(folder)
            logged = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(self.code),
                artifacts={"model": str(folder)} | {path.stem: str(path) for path in extra_files},
                input_example=example,
                signature=infer_signature(example, pd.DataFrame(self.answers)),
                pip_requirements=_requirements(*self.requirements),
            )
        again: Any = mlflow.pyfunc.load_model(logged.model_uri).predict(example)
        exact = True
        for name, column in self.answers.items():
            found, trained = again[name].to_numpy(), np.asarray(column)
            _compare(f"column {name!r}", found, trained)
            exact = exact and _same_bits(found, trained)
        answer = {str(name): again[name].to_numpy() for name in again}
        given = {name: np.array(list(column), dtype=object) for name, column in self.example.items()}
        _attach(GoldenRequest.of(self.rows, self.precision, given, answer, exact=exact), logged)
        return logged


def _attach(golden: GoldenRequest, logged: Any, files: Sequence[Path] = ()) -> None:
    """Put the golden request, and other files, beside a model that was logged."""
    import mlflow

    with tempfile.TemporaryDirectory(prefix="mlpipes-model-") as scratch:
        path = Path(scratch) / GOLDEN
        path.write_bytes(golden.to_json())
        for each in (path, *files):
            mlflow.MlflowClient().log_model_artifact(logged.model_id, str(each))


def _same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return np.array_equal(one, other.astype(one.dtype) if one.dtype != other.dtype else other)


def _requirements(*names: str) -> list[str]:
    # Given rather than inferred: inference imports the model in a new process and may ask the network.
    return [f"{name}=={version(name)}" for name in names]


def _compare(what: str, stored: np.ndarray, trained: np.ndarray) -> None:
    if not np.issubdtype(trained.dtype, np.number):
        if list(stored) != list(trained):
            raise ValueError(f"the stored model says {list(stored)} in {what}, the trained one {list(trained)}")
    # The levels of pictures are rounded: where kernels differ, by one.
    elif not np.allclose(stored, trained, rtol=TOLERANCE, atol=1 if trained.dtype == np.uint8 else TOLERANCE):
        gap = float(np.abs(stored.astype(np.float64) - trained).max())
        raise ValueError(f"the stored model differs from the trained one by up to {gap} in {what}")
