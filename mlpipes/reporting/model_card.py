"""Documents for people: the model card."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlpipes.reporting.report import escaped

if TYPE_CHECKING:
    from mlpipes.data.snapshot import Snapshot
    from mlpipes.store.outcome import Outcome
    from mlpipes.store.recipe import Recipe


def _rows(content: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {k} | {escaped(v)} |" for k, v in content.items())])


def model_card(
    summary: str, recipe: "Recipe", snapshot: "Snapshot", outcome: "Outcome", model: Mapping[str, Any]
) -> str:
    """A model card (Mitchell et al. 2019, arXiv:1810.03993): what, on which data, how good, what not to use it for."""
    provenance = snapshot.meta["provenance"]
    figures = {f"validation {name}": value for name, value in model["metrics"].items()}
    return f"""# {recipe.workload}, scale {recipe.scale.key}

{summary}.

## Model
{
        _rows(
            {
                "weights": model["weights_digest"],
                **{name: model[name] for name in ("exported", "calibration") if name in model},
                "parameters": f"{outcome.parameters:,}",
                "chosen": f"epoch {model['epoch']} of {recipe.scale.epochs}, the best by validation",
                "precision of training": outcome.precision,
                "seed": recipe.seed,
                "fingerprint of training": recipe.fingerprint,
                "code version": recipe.code,
            }
        )
    }

## Data
{_rows(provenance | {"snapshot": snapshot.digest, **{f"{k} samples": f"{v:,}" for k, v in snapshot.counts.items()}})}

## Figures
On the validation split (n={snapshot.counts["validation"]:,}), which also chose the epoch, so they are optimistic; the
unbiased figures, with intervals, are in the evaluation report on the test split.

{_rows(figures)}

## Training
{
        _rows(
            {
                "workers": recipe.scale.workers,
                "global batch size": recipe.scale.batch_size,
                "epochs": recipe.scale.epochs,
                "seconds in steps (no start-up, evaluation or checkpoints)": f"{outcome.train_seconds:.1f}",
                "device": outcome.environment["device"],
                **{f"hyperparameter {k}": v for k, v in recipe.hyperparameters.items()},
            }
        )
    }

## Limits
Measured on data drawn like the training data, and on nothing else: other cameras, writers, languages or resolutions are
not covered. Its probabilities are calibrated as well as the evaluation report says, on that split. It was not tested for
robustness against inputs made to deceive it.
"""
