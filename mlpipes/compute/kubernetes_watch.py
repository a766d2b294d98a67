"""Watching: when there is reason to ask the API server again how a job stands.

A watch on the job's pods says that something has happened to them. It is a hint only: whoever gets it asks as usual, and
asks now and then all the same. Two hundred trainings that are followed cost the API server few requests by that.
"""

import threading
import zlib

from mlpipes.compute.jobs import ALIVE, JobState, JobStatus
from mlpipes.compute.kubernetes_api import KubernetesApi, RefusedError
from mlpipes.compute.kubernetes_manifest import PREFIX

SETTLE_SECONDS = 1.0
"""What happens to pods comes in bursts: for so long it is collected."""
QUIET_SECONDS = 120.0
"""How long a job is not asked about while nothing happens to its pods."""
_GROWING_SECONDS = 60.0
"""How long, without a watch, a training that gets further is not asked about: its messages tell enough."""
_GROWTH = 2.0
"""What has not changed for some time is asked about again when it has not for so many times as long."""
_AGAIN_SECONDS = 5.0
_STREAM_SECONDS = (900, 1800)
"""When a watch begins anew, by which all is looked at once: those of different jobs not at the same time."""


class PodWatch:
    """A thread that hears what happens to the pods of a job, until it is ended or those who follow the job are."""

    def __init__(self, api: KubernetesApi, job: str) -> None:
        self._api, self._job = api, job
        self._stirred, self._up, self._ended = threading.Event(), threading.Event(), threading.Event()
        threading.Thread(target=self._listen, name=f"watch {job}", daemon=True).start()

    @property
    def is_up(self) -> bool:
        """Whether it would be heard if something happened now."""
        return self._up.is_set()

    @property
    def stirred(self) -> bool:
        """Whether something has happened since `calm` was called last."""
        return self._stirred.is_set()

    def calm(self) -> None:
        """What has happened so far is about to be looked at."""
        self._stirred.clear()

    def end(self) -> None:
        """Hear no more; the thread ends with the next thing that happens, or with its stream."""
        self._ended.set()

    def _listen(self) -> None:
        path, labels = self._api.core("pods"), f"{PREFIX}/job={self._job}"
        seconds = _STREAM_SECONDS[0] + zlib.crc32(self._job.encode()) % (_STREAM_SECONDS[1] - _STREAM_SECONDS[0])
        heard = False
        while not self._ended.is_set():
            try:
                for _ in self._api.stream(path, labels, seconds):
                    heard = True
                    self._up.set()
                    self._stirred.set()  # at its begin too: who knows what happened before
                    if self._ended.is_set():
                        break
            except RefusedError:  # we may not: it is asked as if there were no watch, but for one that was heard before
                if not heard:
                    self._ended.set()
                self._up.clear()
                self._ended.wait(_AGAIN_SECONDS)
            except ConnectionError:
                self._up.clear()
                self._ended.wait(_AGAIN_SECONDS)
        self._up.clear()


class Watched:
    """What is known of a job, and when to ask again. Times are in seconds of any one clock.

    `poll_seconds` is the pace of asking about what may change at any time.
    """

    def __init__(self, poll_seconds: float, asked: float, status: JobStatus, grown: int) -> None:
        self.poll_seconds, self.status = poll_seconds, status
        self._asked, self._changed, self._grown = asked, asked, grown
        self._watch: PodWatch | None = None

    def is_due(self, now: float, grown: int, api: KubernetesApi, job: str, *, urgent: bool) -> bool:
        """Whether to ask now. `grown` is the size of the training's messages; `urgent` if something is waited for."""
        if self.status.state not in ALIVE:
            return now - self._asked >= self.poll_seconds
        if self._watch is None:  # who is asked about twice is followed
            self._watch = PodWatch(api, job)
        if self._watch.stirred:
            return now - self._asked >= min(SETTLE_SECONDS, self.poll_seconds)
        is_growing, self._grown = grown > self._grown, grown
        return now - self._asked >= (self.poll_seconds if urgent else self._pace(is_growing))

    def _pace(self, is_growing: bool) -> float:
        runs = self.status == JobStatus(JobState.RUNNING)
        if self._watch is None or not self._watch.is_up:
            return _GROWING_SECONDS if runs and is_growing else self.poll_seconds
        if runs:
            return QUIET_SECONDS
        return max(self.poll_seconds, min(QUIET_SECONDS, (self._asked - self._changed) * (_GROWTH - 1)))

    def about_to_ask(self) -> None:
        """What happens from now on is reason to ask once more."""
        if self._watch is not None:
            self._watch.calm()

    def learned(self, now: float, status: JobStatus, grown: int) -> None:
        """What was answered at a time."""
        if status != self.status:
            self._changed = now
        self._asked, self.status, self._grown = now, status, grown
        if status.state not in ALIVE:
            self.end()

    def end(self) -> None:
        """It is followed no more."""
        if self._watch is not None:
            self._watch.end()
            self._watch = None
