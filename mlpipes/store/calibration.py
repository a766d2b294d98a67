"""The calibration: how the outputs of a training's chosen model are corrected, as `calibration.json` keeps it."""

from pydantic import Field

from mlpipes.store.record import Record


class Calibration(Record):
    """A correction that was fitted to a model's predictions of the validation split."""

    parameters: dict[str, float] = Field(default_factory=dict)
    """What is applied, such as a `temperature`; part of the digest of what is exported. Empty: outputs stay as they are."""
    n: int
    """Samples that it was fitted to."""
    before: float | None = None
    """Loss of the outputs as they were trained; None if it could not be computed."""
    after: float | None = None
    """Loss of the corrected outputs; None where nothing is applied."""
    note: str = ""
    """Why nothing is applied, or what was special about the fit."""

    def __str__(self) -> str:
        if not self.parameters:
            return f"{self.note or 'not calibrated'} (validation, n={self.n:,})"
        applied = ", ".join(f"{name} {value:g}" for name, value in self.parameters.items())
        loss = "" if self.before is None or self.after is None else f"; loss there {self.before:.4f} → {self.after:.4f}"
        return f"{applied} (fitted to validation, n={self.n:,}{loss})" + (f": {self.note}" if self.note else "")
