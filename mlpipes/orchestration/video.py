"""The assets of videos, partitioned by file: source_video, chunks, upscaled_chunks, final_video; a sensor that finds files.

What is done of a video lies in the store; an asset's step starts it, or finds it running or done.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import dagster as dg
from pydantic import Field

from mlpipes.errors import ConfigError
from mlpipes.orchestration.database import outlives_database
from mlpipes.orchestration.folders import settled
from mlpipes.orchestration.following import is_cancelled
from mlpipes.orchestration.metadata import mapping_table, picture, user_errors
from mlpipes.orchestration.resources import RayResource, StoreResource
from mlpipes.store.environment import path_in
from mlpipes.store.files import digest_of
from mlpipes.store.layout import Store

if TYPE_CHECKING:
    from mlpipes.video.following import Progress
    from mlpipes.video.job import VideoJob

FOLDER_VARIABLE = "MLPIPES_VIDEOS"
GROUP = "video"
OWNERS = ["team:ml-platform"]
UPSCALING_POOL, CUTTING_POOL = "upscaling", "cutting"
VIDEOS = dg.DynamicPartitionsDefinition(name="videos")
"""One partition a file of the folder that `MLPIPES_VIDEOS` names."""
SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".mpg", ".mpeg", ".wmv", ".flv"})
RESULTS = "upscaled"
"""The folder, in that of the videos, that the results go to."""
_STEPS = ("source_video", "chunks", "upscaled_chunks", "final_video")
_SMALL_BYTES, _LARGE_BYTES = 50_000_000, 2_000_000_000
_OBSERVED_SECONDS = 5.0


class VideoConfig(dg.Config):
    """What can be set when a video is launched; it belongs to `chunks`, where the model is pinned for the whole video."""

    model: str = Field(
        default="bicubic", description="bicubic, models:/mlpipes-video_sr@champion, or package.module:attribute"
    )
    scale: int | None = Field(default=None, description="2, 3 or 4; default: the model's, and 2 for bicubic")
    workers: int = Field(default=2, ge=1, description="processes that upscale and encode")
    gpus_per_worker: float = Field(default=0.0, ge=0, description="0.5: two workers share a GPU; 0: CPUs")
    chunk: int | None = Field(default=None, ge=1, description="frames of a chunk; changes speed, not the result")
    precision: str = Field(default="fp32", description="of a network: fp32, or bf16 where the CPUs or GPUs have it")
    crf: int = Field(default=16, ge=0, le=51, description="quality of the encoding: less is better and larger")
    preset: str = Field(default="veryfast", description="of x264")
    suffix: str | None = Field(default=None, description=".mp4, .m4v, .mov or .mkv; default: the source's, else .mkv")


def videos_folder() -> Path:
    """The folder of videos. Raises ConfigError if `$MLPIPES_VIDEOS` names none."""
    folder = path_in(FOLDER_VARIABLE)
    if folder is None:
        raise ConfigError(f"{FOLDER_VARIABLE} is not set: name the folder that videos are put into")
    return folder


def _record(store: Store, video: str) -> Path:
    """Where it is noted what is to be done of a video."""
    return store.root / "assets" / GROUP / "chunks" / f"{digest_of(video)[:32]}.json"


def _job(store: Store, video: str) -> "VideoJob":
    from mlpipes.video.job import VideoJob

    try:
        return VideoJob.read(_record(store, video))
    except FileNotFoundError:
        raise ConfigError(f"{GROUP}/chunks was never materialized for {video}; materialize it first") from None


def _result(job: "VideoJob", video: str) -> Path:
    """Where the finished video goes."""
    return videos_folder() / RESULTS / f"{Path(video).stem}-x{job.model.scale}{job.suffix}"


def video_assets() -> Sequence[dg.AssetsDefinition]:
    """The chain of a video."""

    def about(name: str, description: str, kinds: set[str]) -> dict[str, Any]:
        before = _STEPS[: _STEPS.index(name)][-1:]
        return {
            "key": [GROUP, name],
            "group_name": GROUP,
            "partitions_def": VIDEOS,
            "owners": OWNERS,
            "kinds": kinds,
            "deps": [dg.AssetKey([GROUP, step]) for step in before],
            "description": description,
        }

    @dg.asset(**about("source_video", "The file, looked at: what it is, and whether it can be upscaled.", {"video"}))
    def source_video(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        from mlpipes.store.files import sha256_file
        from mlpipes.video.probe import probe

        with user_errors():
            source = probe(videos_folder() / context.partition_key)
            digest = sha256_file(Path(source.path))
            source.check_unchanged()
        for note in source.notes:
            context.log.warning(note)
        facts = source.model_dump(mode="json", exclude={"path", "modified_ns", "tracks", "notes"})
        return dg.MaterializeResult(
            data_version=dg.DataVersion(digest),
            metadata={
                "facts": mapping_table(facts),
                "tracks": mapping_table({str(t.index): f"{t.kind} {t.codec} {t.language}" for t in source.tracks}),
                "file": dg.MetadataValue.path(source.path),
                "bytes": source.bytes,
                "digest": digest,
            },
        )

    @dg.asset(
        **about("chunks", "The source cut into lossless chunks, and the model pinned that upscales them.", {"video"}),
        pool=CUTTING_POOL,
    )
    def chunks(context: dg.AssetExecutionContext, config: VideoConfig, store: StoreResource) -> dg.MaterializeResult:
        with user_errors():
            return _cut(context, config, store.store)

    @dg.asset(
        **about("upscaled_chunks", "Every chunk upscaled by a pool of workers on Ray, retried by itself.", {"ray"}),
        pool=UPSCALING_POOL,
    )
    def upscaled_chunks(
        context: dg.AssetExecutionContext, store: StoreResource, ray: RayResource
    ) -> dg.MaterializeResult:
        with user_errors(), outlives_database(context):
            return _upscale(context, store.store, ray)

    @dg.asset(
        **about(
            "final_video", "The chunks encoded, with the source's sound, subtitles, chapters and times.", {"video"}
        ),
        pool=UPSCALING_POOL,
    )
    def final_video(context: dg.AssetExecutionContext, store: StoreResource, ray: RayResource) -> dg.MaterializeResult:
        with user_errors(), outlives_database(context):
            return _finish(context, store.store, ray)

    return cast("list[dg.AssetsDefinition]", [source_video, chunks, upscaled_chunks, final_video])


def _cut(context: dg.AssetExecutionContext, config: VideoConfig, store: Store) -> dg.MaterializeResult:
    from mlpipes.video.chunks import cut
    from mlpipes.video.following import prepare
    from mlpipes.video.job import CONTAINERS, Encoding, describe

    path, began = videos_folder() / context.partition_key, time.monotonic()
    suffix = config.suffix or (path.suffix.lower() if path.suffix.lower() in CONTAINERS else ".mkv")
    job = prepare(
        path,
        path.with_suffix(suffix),
        store,
        model=config.model,
        scale=config.scale,
        workers=config.workers,
        gpus_per_worker=config.gpus_per_worker,
        chunk=config.chunk,
        precision=config.precision,
        encoding=Encoding(crf=config.crf, preset=config.preset),
    )
    job.write_to(_record(store, context.partition_key))
    plan = cut(job)
    if plan.mended:
        context.log.warning(f"{plan.mended} frames had no time, or none later than the frame before; it was mended")
    return dg.MaterializeResult(
        data_version=dg.DataVersion(job.fingerprint),
        metadata={
            "plan": mapping_table(describe(job)),
            "frames": plan.frames,
            "chunks": plan.chunks,
            "frames_per_second": plan.frames / (time.monotonic() - began),
            "model": job.model.name,
            "folder": dg.MetadataValue.path(str(job.folder.path)),
        },
    )


def _upscale(context: dg.AssetExecutionContext, store: Store, ray: RayResource) -> dg.MaterializeResult:
    from mlpipes.video.following import progress_of
    from mlpipes.video.job import Plan

    job = _job(store, context.partition_key).model_copy(update={"until": "upscaled"})
    before, began = progress_of(job).upscaled, time.monotonic()
    if not _is_delivered(job, context.partition_key):
        _follow(context, job, ray)
    frames = Plan.read(job.folder.plan).frames
    return dg.MaterializeResult(
        data_version=dg.DataVersion(job.fingerprint),
        metadata={
            "frames": frames,
            "frames_per_second": (frames - before) / max(1e-9, time.monotonic() - began),
            "workers": job.workers,
            "model": job.model.name,
            **_picture(job),
        },
    )


def _finish(context: dg.AssetExecutionContext, store: Store, ray: RayResource) -> dg.MaterializeResult:
    from mlpipes.video.following import deliver
    from mlpipes.video.job import Plan

    job, began = _job(store, context.partition_key), time.monotonic()
    result = _result(job, context.partition_key)
    shown: dict[str, Any] = {}
    if not _is_delivered(job, context.partition_key):
        _follow(context, job, ray)
        shown = _picture(job)
        result.parent.mkdir(exist_ok=True)
        deliver(job, result)
    frames, seconds = Plan.read(job.folder.plan).frames, time.monotonic() - began
    return dg.MaterializeResult(
        data_version=dg.DataVersion(job.fingerprint),
        metadata={
            "file": dg.MetadataValue.path(str(result)),
            "bytes": result.stat().st_size,
            "size": f"{job.width}×{job.height}",
            "frames": frames,
            "frames_per_second": frames / max(1e-9, seconds),
            **shown,
        },
    )


def _is_delivered(job: "VideoJob", video: str) -> bool:
    from mlpipes.video.following import delivered

    return delivered(job, _result(job, video))


def _picture(job: "VideoJob") -> dict[str, Any]:
    from mlpipes.video.preview import PICTURE, preview_of

    made = preview_of(job)
    text = "left: the source, enlarged by bicubic; right: the result"
    return {"side_by_side": picture((made.path / PICTURE).read_bytes(), text)} if made is not None else {}


def _follow(context: dg.AssetExecutionContext, job: "VideoJob", ray: RayResource) -> None:
    """Have it made; shows how far it is as observations of the asset. A cancelled run ends the job."""
    from mlpipes.video.following import follow, stop
    from mlpipes.video.places import place_for

    job = job.model_copy(update={"requested_by": context.run.run_id})
    try:
        follow(job, lambda: place_for(job, ray.address), _observer(context), context.log.warning)
    except BaseException:
        # Any other interruption (the code server goes away, say) leaves it running: the next attempt attaches to it.
        if is_cancelled(context):
            stop(job, place_for(job, ray.address))
        raise


def _observer(context: dg.AssetExecutionContext) -> Callable[["Progress"], None]:
    last: list[Any] = [None, float("-inf")]

    def show(progress: "Progress") -> None:
        if progress == last[0] or time.monotonic() - last[1] < _OBSERVED_SECONDS:
            return
        last[:] = progress, time.monotonic()
        metadata = {"frames": progress.total, "upscaled": progress.upscaled, "encoded": progress.encoded}
        context.log_event(dg.AssetObservation(context.asset_key, partition=context.partition_key, metadata=metadata))

    return show


def video_job() -> Any:
    """The whole chain of a video."""
    selection = dg.AssetSelection.groups(GROUP)
    return dg.define_asset_job("video_chain", selection, description="Upscale a video")


# -- the sensor --------------------------------------------------------------------------------------------------------
def priority_of(size: int) -> int:
    """The priority of a file's run in Dagster's queue: a small one overtakes large ones that wait."""
    return 1 if size < _SMALL_BYTES else -1 if size > _LARGE_BYTES else 0


def video_sensor() -> dg.SensorDefinition:
    """Upscales each file that is put into the folder, as soon as it has stopped growing."""

    @dg.sensor(
        name="videos_folder",
        job_name="video_chain",
        minimum_interval_seconds=15,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=f"Upscales each file in ${FOLDER_VARIABLE} that has stopped growing; small ones first.",
    )
    def sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        folder = path_in(FOLDER_VARIABLE)
        if folder is None:
            return dg.SkipReason(f"{FOLDER_VARIABLE} is not set")
        found, ready = settled(folder, SUFFIXES, json.loads(context.cursor) if context.cursor else {})
        known = set(context.instance.get_dynamic_partitions("videos"))
        new = [name for name in ready if name not in known]
        return dg.SensorResult(
            run_requests=[
                dg.RunRequest(
                    # A run's key holds for ever: a file is upscaled once, and again when it has changed.
                    run_key=f"{name}:{found[name][0]}:{found[name][1]}",
                    partition_key=name,
                    tags={"dagster/priority": str(priority_of(found[name][0]))},
                )
                for name in ready
            ],
            dynamic_partitions_requests=[VIDEOS.build_add_request(new)] if new else [],
            cursor=json.dumps(found),
        )

    return sensor
