"""The address of a Ray cluster, and what a client of it needs."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class RayAddress:
    """A cluster that jobs can be submitted to."""

    dashboard: str
    """`http://host:port` of the head's dashboard, which serves the Jobs API."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that every client of this cluster needs, such as where its token is."""
    local: bool = False
    """Whether it is this machine's own private cluster."""

    def enter(self) -> None:
        """Make this process a client of the cluster."""
        os.environ.update(self.environment)

    def headers(self) -> dict[str, str]:
        """What each request to the dashboard must carry.

        Given explicitly, because Ray's own clients remember the first token, or its absence, for the whole process.
        """
        known = {**os.environ, **self.environment}
        if path := known.get("RAY_AUTH_TOKEN_PATH"):
            token = Path(path).read_text(encoding="utf-8").strip()
        else:
            token = known.get("RAY_AUTH_TOKEN", "")
        return {"Authorization": f"Bearer {token}"} if token else {}
