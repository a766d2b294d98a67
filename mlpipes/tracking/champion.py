"""The champion of a workload: an alias in MLflow's registry, with why it was given and who had it before."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from mlpipes.errors import ConfigError
from mlpipes.tracking.models import FINGERPRINT, SCALE, SNAPSHOT
from mlpipes.tracking.runs import Tracker

ALIAS = "champion"
REASON = "mlpipes.promotion"
_HISTORY = "mlpipes.champions"
_REMEMBERED = 20  # a tag holds 5,000 characters


@dataclass(frozen=True)
class Version:
    """A registered model version that this program made."""

    version: str
    fingerprint: str
    scale: str
    snapshot: str
    reason: str | None
    """Why it became champion, where it did."""


class Champions:
    """Who is and who was champion of one registered model."""

    def __init__(self, tracker: Tracker, name: str) -> None:
        self.client, self.name = tracker.client, name

    def current(self) -> Version | None:
        """The champion, if there is one."""
        from mlflow.exceptions import MlflowException

        try:
            return _version(self.client.get_model_version_by_alias(self.name, ALIAS))
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def of_scale(self, scale: str) -> Version:
        """The latest version of a scale. Raises ConfigError if there is none."""
        found = self.client.search_model_versions(f"name='{self.name}'")
        mine = [version for version in map(_version, found) if version.scale == scale]
        if not mine:
            raise ConfigError(f"no model of scale {scale} is registered as {self.name}; materialize `model` first")
        return max(mine, key=lambda version: int(version.version))

    def promote(self, version: str, reason: str) -> None:
        """Give a version the alias, and record when and why."""
        self._give(version, reason, self.history())

    def history(self) -> list[list[str]]:
        """Rows of (when, version, reason), the oldest first."""
        tags = self.client.get_registered_model(self.name).tags
        return json.loads(tags.get(_HISTORY, "[]"))

    def roll_back(self, reason: str) -> tuple[str, str]:
        """Give the alias back to the champion before; returns (version that lost it, version that has it now).

        Raises ConfigError if there was none before.
        """
        current = self.current()
        if current is None:
            raise ConfigError(f"{self.name} has no champion")
        before = self.history()
        while before and before[-1][1] == current.version:
            before.pop()
        if not before:
            raise ConfigError(f"version {current.version} is the first champion of {self.name}: nothing to go back to")
        # Who lost it leaves the history, so that a later roll-back does not bring it back.
        self._give(before.pop()[1], f"rolled back from version {current.version}: {reason}", before)
        chosen = self.current()
        assert chosen is not None  # noqa: S101 - just given
        return current.version, chosen.version

    def _give(self, version: str, reason: str, before: list[list[str]]) -> None:
        now = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        # The history first: after a crash in between, it names a champion that was not; the alias is the truth.
        history = [*before, [now, version, reason[:200]]][-_REMEMBERED:]
        self.client.set_registered_model_tag(self.name, _HISTORY, json.dumps(history))
        self.client.set_model_version_tag(self.name, version, REASON, f"{now}: {reason}")
        self.client.set_registered_model_alias(self.name, ALIAS, version)


def _version(found: Any) -> Version:
    tags = found.tags
    return Version(
        str(found.version), tags.get(FINGERPRINT, ""), tags.get(SCALE, "?"), tags.get(SNAPSHOT, ""), tags.get(REASON)
    )
