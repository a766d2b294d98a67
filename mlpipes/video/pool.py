"""The pool: actors on Ray that upscale chunks and encode segments; what one had in hand when it was lost is done again."""

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlpipes.errors import CorruptionError, UpscalingFailedError, UserError
from mlpipes.store.layout import Store
from mlpipes.video.chunks import UPSCALED, open_chunk
from mlpipes.video.encoding import encode_segment, open_segment
from mlpipes.video.job import Plan, VideoJob
from mlpipes.video.models import load
from mlpipes.video.upscaling import upscale_chunk

UPSCALE, ENCODE = "chunk", "segment"
_TRIES, _LOSSES, _STARTS = 3, 5, 4
"""Errors of one part, workers lost over one part, and workers that could not start: so many end the attempt."""
_POLL_SECONDS = 0.5
_PATIENCE, _SHORTEST_SECONDS, _FIRST_SECONDS = 20, 300, 3600
"""A worker hangs that has its part in hand for so many times the slowest so far, but at least for so long; while none was
done, for so long."""
Part = tuple[str, int]
"""`UPSCALE` or `ENCODE`, and which."""


class Worker:
    """What an actor is: it keeps the model in memory from part to part."""

    def __init__(self, specification: str, plan: dict[str, Any]) -> None:
        self.job, self.plan = VideoJob.read(Path(specification)), Plan.model_validate(plan)
        self.model: Any = None

    def placed(self) -> None:
        """Answer as soon as there is a place for it, which may take long where nodes come and go."""

    def ready(self) -> str:
        """Load the model; returns what a user should know of it there. Not before: the reason why an actor could not be made
        reaches nobody whole.
        """
        self.model = load(self.job.model, Store(Path(self.job.store)))
        return getattr(self.model, "caveat", "")

    def work(self, part: Part) -> int:
        """Do a part; returns the number of frames."""
        kind, index = part
        began = time.monotonic()
        if kind == UPSCALE:
            frames = upscale_chunk(self.job, self.plan, index, self.model)
        else:
            frames = encode_segment(self.job, self.plan, index)
        print(f"{kind} {index}: {frames} frames in {time.monotonic() - began:.2f} s", flush=True)
        return frames


@dataclass
class Todo:
    """What is left to do of a video; segments first, as soon as their chunks are there."""

    plan: Plan
    chunks: deque[int]
    segments: deque[int]
    missing: set[int]
    """Chunks that are not upscaled yet."""

    @classmethod
    def of(cls, job: VideoJob, plan: Plan) -> "Todo":
        """By what the store holds."""
        segments: list[int] = []
        if job.until == "final":
            segments = [i for i in range(plan.segments) if open_segment(job, i, verify=False) is None]
            wanted = {chunk for index in segments for chunk in plan.chunks_of_segment(index)} | {preview_chunk(plan)}
        else:
            wanted = set(range(plan.chunks))
        missing = {i for i in wanted if open_chunk(job.folder.upscaled_chunk(i), UPSCALED, verify=False) is None}
        return cls(plan, deque(sorted(missing)), deque(segments), missing)

    def take(self) -> Part | None:
        """The next part that can be done now."""
        for index in self.segments:
            if self.missing.isdisjoint(self.plan.chunks_of_segment(index)):
                self.segments.remove(index)
                return ENCODE, index
        return (UPSCALE, self.chunks.popleft()) if self.chunks else None

    def done(self, part: Part) -> None:
        """Note that a part is there."""
        if part[0] == UPSCALE:
            self.missing.discard(part[1])

    def give_back(self, part: Part) -> None:
        """Have a part done again."""
        (self.chunks if part[0] == UPSCALE else self.segments).appendleft(part[1])

    @property
    def empty(self) -> bool:
        """Whether nothing is left to begin."""
        return not (self.chunks or self.segments)


def preview_chunk(plan: Plan) -> int:
    """The chunk that is shown beside the source: the middle one."""
    return plan.chunks // 2 if plan.chunks > 1 else 0


@dataclass
class Pool:
    """The actors of one video on the Ray that this process is connected to."""

    job: VideoJob
    specification: Path
    plan: Plan
    warn: Callable[[str], None]
    _busy: dict[Any, tuple[Any, Part | None]] = field(default_factory=dict)
    """By reference of an answer: who will give it, to what; None while it starts."""
    _failures: Counter[tuple[str, int]] = field(default_factory=Counter)
    _losses: Counter[tuple[str, int]] = field(default_factory=Counter)
    _bad_starts: int = 0
    _cpus: float = 0.0
    _placing: set[Any] = field(default_factory=set)
    """References of the answers of those that wait for a place."""
    _began: dict[Any, float] = field(default_factory=dict)
    """By reference, when its part was handed out, or when it began to load the model."""
    _told: set[str] = field(default_factory=set)
    """Of what workers had to say of the model."""
    _slowest: dict[str, float] = field(default_factory=dict)
    """Seconds that a part of a kind took at most: a segment is encoded in seconds while a chunk may take an hour."""

    def run(self) -> None:
        """Do all that is left.

        Raises CorruptionError for what another round would mend, and another UserError for what it would not.
        """
        todo = Todo.of(self.job, self.plan)
        if todo.empty:
            return
        for _ in range(min(self.job.workers, len(todo.chunks) + len(todo.segments))):
            self._start()
        idle: list[Any] = []
        try:
            while self._busy or not todo.empty:
                while idle and (part := todo.take()) is not None:
                    actor = idle.pop()
                    self._busy[reference := actor.work.remote(part)] = (actor, part)
                    self._began[reference] = time.monotonic()
                if not self._busy:
                    raise CorruptionError(f"{self.job.folder.path}: parts are left that nobody can begin")
                self._hear(todo, idle)
                self._end_what_hangs()
        finally:
            self._end(idle)

    def _start(self) -> None:
        import ray

        # As many as there were at best: a node that is away comes back, and its workers must not crowd on another meanwhile.
        self._cpus = max(self._cpus, ray.cluster_resources().get("CPU", 0.0))
        # More workers than there are CPUs share them, instead of waiting for ever.
        share = min(1.0, int(100 * (self._cpus or 1.0) / self.job.workers) / 100)
        remote: Any = ray.remote(Worker)
        gpus = self.job.gpus_per_worker or None
        actor = remote.options(num_cpus=share, num_gpus=gpus).remote(str(self.specification), self.plan.model_dump())
        self._busy[reference := actor.placed.remote()] = (actor, None)
        self._placing.add(reference)

    def _load(self, actor: Any) -> None:
        self._busy[reference := actor.ready.remote()] = (actor, None)
        self._began[reference] = time.monotonic()

    def _hear(self, todo: Todo, idle: list[Any]) -> None:
        import ray
        from ray import exceptions

        answered, _ = ray.wait(list(self._busy), timeout=_POLL_SECONDS)
        for reference in answered:
            actor, part = self._busy.pop(reference)
            took = time.monotonic() - self._began.pop(reference, time.monotonic())
            has_a_place = reference in self._placing
            self._placing.discard(reference)
            try:
                answer = ray.get(reference)
            except exceptions.RayTaskError as error:
                self._failed(part, error)
                if part is not None:
                    todo.give_back(part)
            except exceptions.RayError as error:
                self._lost(part, error)
                if part is not None:
                    todo.give_back(part)
                self._start()
                continue
            else:
                if has_a_place:
                    self._load(actor)
                    continue
                if part is None and answer and answer not in self._told:
                    self._told.add(answer)
                    self.warn(answer)
                if part is not None:
                    self._slowest[part[0]] = max(self._slowest.get(part[0], 0.0), took)
                    todo.done(part)
            idle.append(actor)

    def _end_what_hangs(self) -> None:
        """End workers that have their part in hand, or load the model, for far too long; they count as lost."""
        import ray

        for reference, began in list(self._began.items()):
            actor, part = self._busy[reference]
            slowest = self._slowest.get(part[0]) if part else None
            limit = _FIRST_SECONDS if slowest is None else max(_SHORTEST_SECONDS, _PATIENCE * slowest)
            if time.monotonic() - began > limit:
                doing = "had its part in hand" if part else "was loading the model"
                self.warn(f"a worker hangs: it {doing} for {time.monotonic() - began:.0f} s")
                self._began[reference] = time.monotonic()
                ray.kill(actor)

    def _lost(self, part: Part | None, error: Exception) -> None:
        """Note that a worker is gone. Raises UpscalingFailedError if it was one too many."""
        if part is None:
            self._bad_starts += 1
            if self._bad_starts >= _STARTS:
                raise UpscalingFailedError(f"a worker could not start {_STARTS} times: {error}")
            return
        self._losses[part] += 1
        self.warn(f"a worker was lost with {part[0]} {part[1]} in hand, which is done again")
        if self._losses[part] >= _LOSSES:
            raise UpscalingFailedError(
                f"{_LOSSES} workers were lost over {part[0]} {part[1]}; is there too little memory for so many? Give fewer "
                "with --workers"
            )

    def _failed(self, part: Part | None, error: Any) -> None:
        """Note that a part failed. Raises the cause if it is for the user, UpscalingFailedError if it was once too often."""
        cause = error.cause
        if isinstance(cause, UserError):
            raise cause
        if part is None:
            raise UpscalingFailedError(f"the model {self.job.model.name} cannot be loaded: {cause or error}") from error
        self._failures[part] += 1
        if self._failures[part] >= _TRIES:
            raise UpscalingFailedError(f"{part[0]} {part[1]} failed {_TRIES} times: {cause or error}") from error
        self.warn(f"{part[0]} {part[1]} failed ({cause or error}), and is tried again")

    def _end(self, idle: list[Any]) -> None:
        import ray

        for actor in (*idle, *(actor for actor, _ in self._busy.values())):
            ray.kill(actor)
