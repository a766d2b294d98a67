"""The champion of a workload: an alias in MLflow's registry, with why it was given and who had it before."""

import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from mlpipes.errors import ConfigError
from mlpipes.tracking.models import FINGERPRINT, SCALE, SNAPSHOT
from mlpipes.tracking.runs import Tracker

ALIAS = "champion"
REASON = "mlpipes.promotion"
_HISTORY, _AUTOMATIC = "mlpipes.champions", "mlpipes.automatic"
_HAND = ("by hand: ", "rolled back from version ")
"""How reasons begin that a person gave."""
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
    by_hand: str = ""
    """Of the champion: how a person made it that; empty where automation did, which may then choose another."""


class Champions:
    """Who is and who was champion of one registered model."""

    def __init__(self, tracker: Tracker, name: str) -> None:
        self.client, self.name = tracker.client, name

    def current(self) -> Version | None:
        """The champion, if there is one."""
        from mlflow.exceptions import MlflowException

        try:
            version = _version(self.client.get_model_version_by_alias(self.name, ALIAS))
            return replace(version, by_hand=self._by_hand(version))
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

    def promote(self, version: str, reason: str, *, by_hand: bool = False) -> None:
        """Give a version the alias, and record when and why; one that is given `by_hand` is not automation's to take."""
        self._give(version, f"{_HAND[0]}{reason}" if by_hand else reason, self._what_was(), automatic=not by_hand)

    def release(self) -> Version:
        """Let automation choose again, whoever made the present champion that. Raises ConfigError if there is none."""
        current = self.current()
        if current is None:
            raise ConfigError(f"{self.name} has no champion; the next model that passes the gates becomes it")
        self.client.set_registered_model_tag(self.name, _AUTOMATIC, current.version)
        return current

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
        before, there = self._what_was(), self._versions()
        while before and (before[-1][1] == current.version or before[-1][1] not in there):
            before.pop()
        if not before:
            raise ConfigError(f"version {current.version} is the first champion of {self.name}: nothing to go back to")
        # Who lost it leaves the history, so that a later roll-back does not bring it back.
        self._give(before.pop()[1], f"{_HAND[1]}{current.version}: {reason}", before, automatic=False)
        chosen = self.current()
        assert chosen is not None  # noqa: S101 - just given
        return current.version, chosen.version

    def _by_hand(self, champion: Version) -> str:
        """How a person made a version champion; empty where automation did."""
        tags = self.client.get_registered_model(self.name).tags
        history = json.loads(tags.get(_HISTORY, "[]"))
        last = history[-1] if history else ["", "", ""]
        if _AUTOMATIC in tags:
            automatic = champion.version in tags[_AUTOMATIC].split(",")
        else:  # of before this was noted
            automatic = last[1] == champion.version and not last[2].startswith(_HAND)
        if automatic:
            return ""
        return last[2] if last[1] == champion.version and last[2].startswith(_HAND) else "the alias was set in MLflow"

    def _what_was(self) -> list[list[str]]:
        """The history, and what is champion now where somebody set the alias in MLflow, who left no record."""
        history, current = self.history(), self.current()
        if current is not None and current.by_hand and (not history or history[-1][1] != current.version):
            history.append([_now(), current.version, "by hand: the alias was set in MLflow"])
        return history

    def _versions(self) -> set[str]:
        return {str(found.version) for found in self.client.search_model_versions(f"name='{self.name}'")}

    def _give(self, version: str, reason: str, before: list[list[str]], *, automatic: bool) -> None:
        now = _now()
        own = self.client.get_registered_model(self.name).tags.get(_AUTOMATIC, "").split(",")
        if automatic:
            # With the one before, until the alias has changed: after a crash in between, either of them is ours.
            present = self.current()
            ours = [present.version] if present is not None and not present.by_hand else []
            self.client.set_registered_model_tag(self.name, _AUTOMATIC, ",".join(dict.fromkeys([*ours, version])))
        elif version in own:
            self.client.set_registered_model_tag(self.name, _AUTOMATIC, "")
        # The history first: after a crash in between, it names a champion that was not; the alias is the truth.
        history = [*before, [now, version, reason[:200]]][-_REMEMBERED:]
        self.client.set_registered_model_tag(self.name, _HISTORY, json.dumps(history))
        self.client.set_model_version_tag(self.name, version, REASON, f"{now}: {reason}")
        self.client.set_registered_model_alias(self.name, ALIAS, version)
        self.client.set_registered_model_tag(self.name, _AUTOMATIC, version if automatic else "")


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"


def _version(found: Any) -> Version:
    tags = found.tags
    return Version(
        str(found.version), tags.get(FINGERPRINT, ""), tags.get(SCALE, "?"), tags.get(SNAPSHOT, ""), tags.get(REASON)
    )
