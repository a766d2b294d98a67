"""The address of a Ray cluster, and what a client of it needs."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mlpipes.errors import ConfigError

if TYPE_CHECKING:
    from requests import PreparedRequest


def as_given(request: "PreparedRequest") -> "PreparedRequest":
    """The `auth` of requests that carry our headers: without one, `requests` puts a password of ~/.netrc in their place."""
    return request


@dataclass(frozen=True)
class RayAddress:
    """A cluster that jobs can be submitted to."""

    dashboard: str
    """`http://host:port` of the head's dashboard, which serves the Jobs API."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that every process of this cluster needs, where it is our own."""
    local: bool = False
    """Whether it is this machine's own private cluster."""
    lives: Callable[[], bool] = field(default=lambda: True, compare=False)
    """Whether jobs can still run there, as far as can be told without asking it."""

    def headers(self) -> dict[str, str]:
        """What each request to the dashboard must carry: our own cluster's token, or the user's for one that was given.

        Given explicitly, because Ray's own clients remember the first token, or its absence, for the whole process. Raises
        ConfigError if the user's file of it cannot be read.
        """
        known = self.environment if self.local else os.environ
        token = known.get("RAY_AUTH_TOKEN", "").strip()
        path = known.get("RAY_AUTH_TOKEN_PATH")
        if path and not token:  # Ray has the same order
            try:
                token = Path(path).expanduser().read_text(encoding="utf-8").strip()
            except (OSError, ValueError, RuntimeError) as error:
                raise ConfigError(f"RAY_AUTH_TOKEN_PATH={path} cannot be read as a token: {error}") from error
        return {"Authorization": f"Bearer {token}"} if token else {}
