"""The heartbeat of a driver: a file that it touches, by which others see that it lives, whatever is said of its job."""

import time
from dataclasses import dataclass, field
from pathlib import Path

HEARTBEAT_SECONDS = 1.0
"""How often a driver touches its file."""
DEAD_SECONDS = 30.0
"""A driver whose heartbeat stood still for so long is dead, whatever the Jobs API says (it may say RUNNING for ever)."""

FIRST_BEAT_SECONDS = 900.0
"""A driver that gives no first sign of life for so long after its job has begun does not come."""


@dataclass
class Pulse:
    """How long a heartbeat stands still already.

    By our own monotonic clock: wall clocks jump, and those of two machines differ.
    """

    path: Path
    _beat: int | None = None
    _seen: float = field(default_factory=lambda: time.monotonic())
    _awaited: float = field(default_factory=lambda: time.monotonic())

    def silence(self, *, waits: bool = False) -> float:
        """Seconds since it was last seen to change; 0.0 before the first beat, and while its job `waits` for its start."""
        now = time.monotonic()
        try:
            beat = self.path.stat().st_mtime_ns
        except FileNotFoundError:
            beat = None
        if waits or beat is None or beat != self._beat:
            self._beat, self._seen = beat, now
        if waits or beat is not None:
            self._awaited = now
        return now - self._seen

    def is_dead(self, *, waits: bool = False) -> bool:
        """Whether its driver has been silent for too long, or has not come."""
        return self.silence(waits=waits) > DEAD_SECONDS or time.monotonic() - self._awaited > FIRST_BEAT_SECONDS
