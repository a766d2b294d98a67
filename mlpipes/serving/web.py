"""The endpoint: MLflow's `/invocations`, the Open Inference Protocol's `/v2`, `/metrics` and `/docs`, with FastAPI."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi import Path as Parameter
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.background import BackgroundTask

from mlpipes.serving.batcher import Batcher, FullError
from mlpipes.serving.current import Current, Source
from mlpipes.serving.formats import described, of_csv, of_mlflow, of_protocol, parsed, to_mlflow, to_protocol
from mlpipes.serving.limits import Guard, Limits
from mlpipes.serving.metrics import Metrics
from mlpipes.serving.model import ServedModel
from mlpipes.serving.sampled import Sampler
from mlpipes.serving.shadow import Shadow
from mlpipes.serving.signature import BadRequestError, in_json
from mlpipes.serving.traffic import Answered, Canary, NotFiniteError, Traffic, computed
from mlpipes.workloads.golden import Values

Convert = Callable[[Request, bytes, ServedModel], Values]
CLIENT = "x-client-key"
"""The header by which a client says who it is."""
_LARGE = 64 << 10
_PARSING = ThreadPoolExecutor(1, thread_name_prefix="parsing")


@dataclass
class State:
    """What the routes share."""

    registry: Source
    every: float
    """Seconds between two looks at the registry."""
    tell: Callable[[str], None]
    limits: Limits = field(default_factory=Limits)
    metrics: Metrics = field(default_factory=Metrics)
    canary: Source | None = None
    """Where a second version comes from."""
    share: float = 0.0
    """Of clients that it answers."""
    shadowed: float = 1.0
    """Share of requests that the version that has not answered computes, too."""
    sample: int = 0
    """Samples of an hour that are kept in summary."""
    draining: bool = False
    """Whether it is about to end: probes are told, requests are still answered."""

    def __post_init__(self) -> None:
        self.current = Current(self.registry, self.tell, self.metrics.swapped)
        beside = Canary(self.canary, self.current, self.tell) if self.canary else None
        self.traffic = Traffic(self.current, beside, self.share, self.tell, self.metrics)

    @property
    def name(self) -> str:
        """Of the registered model."""
        return self.registry.wanted.name

    @property
    def ready(self) -> bool:
        """Whether there is a model, and there will be one for a while."""
        return self.current.model is not None and not self.draining


_ANSWERS = {
    400: {"description": "the input is not what the model takes; says field and rule"},
    401: {"description": "a bearer token is wanted"},
    408: {"description": "the body took too long"},
    413: {"description": "the body is too large"},
    415: {"description": "the body is neither JSON nor CSV"},
    422: {"description": "the model's answer has numbers that JSON does not have"},
    429: {"description": "too many requests wait; come again after Retry-After seconds"},
    500: {"description": "the model has failed"},
    503: {"description": "no model is loaded yet"},
}


def make_app(state: State) -> Any:
    """The ASGI application; it loads its model when it starts, and raises UserError then if there is none."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        await state.current.start()
        batcher = app.state.batcher = Batcher(state.metrics.batches.observe)
        after: list[Shadow | Sampler] = [Shadow(state.traffic, batcher, state.metrics, state.shadowed)]
        if state.sample and state.registry.store is not None:
            after.append(Sampler(state.registry.store, state.sample, state.metrics.sample_dropped.inc))
        app.state.after = after
        following = asyncio.create_task(state.traffic.follow(state.every))
        try:
            yield
        finally:
            following.cancel()
            with suppress(asyncio.CancelledError):
                await following
            for each in after:
                await each.close()
            await batcher.close()

    app = FastAPI(
        title=f"mlpipes serve {state.name}",
        description="A registered model behind an endpoint; answers are those of its evaluation, bit for bit.",
        version="1",
        lifespan=life,
        redoc_url=None,
    )
    _add_probes(app, state)
    _add_invocations(app, state)
    _add_protocol(app, state)
    routes = frozenset(route.path for route in app.routes if isinstance(getattr(route, "path", None), str))  # type: ignore[attr-defined]
    routes |= {f"/v2/models/{state.name}/infer"}
    return Guard(app, state.limits, state.metrics, routes, lambda: state.draining)


def _add_probes(app: FastAPI, state: State) -> None:
    @app.head("/ping", include_in_schema=False)
    @app.head("/v2/health/ready", include_in_schema=False)
    @app.get("/ping", summary="Whether a model is loaded")
    @app.get("/v2/health/ready", summary="Whether requests are answered")
    async def ready() -> JSONResponse:
        return JSONResponse({"ready": state.ready}, 200 if state.ready else 503)

    @app.head("/v2/health/live", include_in_schema=False)
    @app.get("/v2/health/live", summary="Whether the process lives")
    async def live() -> JSONResponse:
        return JSONResponse({"live": True})

    @app.get("/metrics", summary="For Prometheus", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(state.metrics.page(), media_type=CONTENT_TYPE_LATEST)


class _Problem(Response):
    """Why a request is not answered. In ASCII: what is wrong may be a half of a character."""

    def __init__(self, code: int, text: str, field: str = "", headers: dict[str, str] | None = None) -> None:
        content = {"error": text} | ({"field": field} if field else {})
        super().__init__(json.dumps(content), code, headers, "application/json")


def _problem(code: int, text: str, field: str = "") -> _Problem:
    return _Problem(code, text, field)


async def _answered(
    request: Request, state: State, convert: Convert, version: str | None = None
) -> Answered | _Problem:
    """The answer to a request, by a certain version or by the one that its client gets, or what is wrong with it."""
    client = request.headers.get(CLIENT) or (request.client.host if request.client else "")
    model = state.traffic.version(version) if version else state.traffic.model_for(client)
    if model is None:
        return _problem(503, "no model is loaded yet")
    if encoding := request.headers.get("content-encoding", ""):
        return _problem(415, f"bodies are taken as they are, not in {encoding[:40]!r}", "content-encoding")
    try:
        body: bytes = request.scope["body"]
        if len(body) > _LARGE:  # which takes so long that others would wait, and probes with them
            values = await asyncio.get_running_loop().run_in_executor(_PARSING, convert, request, body, model)
        else:
            values = convert(request, body, model)
        if version:
            answer = await computed(request.app.state.batcher, model, values)
        else:
            model, answer = await state.traffic.answer(request.app.state.batcher, model, values)
    except BadRequestError as error:
        return _problem(400, str(error), error.field)
    except FullError:
        return _Problem(429, "too many samples wait", headers={"retry-after": "1"})
    except NotFiniteError as error:
        return _problem(422, str(error))
    except Exception as error:  # of somebody's model: whatever it is, the next request is answered
        state.tell(f"{model.name} version {model.version} has failed: {type(error).__name__}: {error}")
        return _problem(500, "the model has failed; the server's log says how")
    state.metrics.answered(model, answer)
    return Answered(model, values, answer, len(body))


def _reply(request: Request, answered: Answered, content: Any) -> Response:
    model = answered.model
    headers = {
        "x-model-version": model.version,
        "x-model-weights": model.weights,
        "x-model-fingerprint": model.fingerprint,
        "x-model-exact": str(model.exact).lower(),
    }

    async def afterwards() -> None:
        for each in request.app.state.after:
            each.offer(answered)

    text, background = json.dumps(content, allow_nan=False), BackgroundTask(afterwards)
    return Response(text, media_type="application/json", headers=headers, background=background)


def _of_invocation(request: Request, body: bytes, model: ServedModel) -> Values:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() == "text/csv":
        return of_csv(body, model.signature)
    return of_mlflow(parsed(body, model.signature), model.signature)


def _add_invocations(app: FastAPI, state: State) -> None:
    split = {"type": "object", "properties": {"columns": {"type": "array"}, "data": {"type": "array"}}}
    ways = {
        "inputs": {},
        "instances": {"type": "array"},
        "dataframe_records": {"type": "array"},
        "dataframe_split": split,
    }
    schema = {"type": "object", "properties": ways, "additionalProperties": False}
    formats = {
        "application/json": {"schema": schema, "example": {"inputs": [[0, 0]]}},
        "text/csv": {"schema": {"type": "string"}},
    }

    @app.post(
        "/invocations",
        summary="Answers to samples in one of MLflow's formats",
        openapi_extra={"requestBody": {"required": True, "content": formats}},
        responses=_ANSWERS,  # type: ignore[arg-type]
    )
    async def invocations(request: Request) -> Response:
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind not in ("application/json", "text/csv"):
            return _problem(415, f"{kind[:80]!r} is neither application/json nor text/csv", "content-type")
        found = await _answered(request, state, _of_invocation)
        return found if isinstance(found, _Problem) else _reply(request, found, to_mlflow(found.answer))


def _add_protocol(app: FastAPI, state: State) -> None:
    tensor = {"name": "input-0", "shape": [1, 2], "datatype": "FP32", "data": [0, 0]}
    schema = {"type": "object", "required": ["inputs"], "properties": {"inputs": {"type": "array", "minItems": 1}}}
    content = {"application/json": {"schema": schema, "example": {"inputs": [tensor]}}}
    named: Any = Parameter(json_schema_extra={"enum": [state.name]})

    @app.get("/v2", summary="The server")
    async def server() -> JSONResponse:
        return JSONResponse({"name": "mlpipes", "version": "1", "extensions": []})

    def named_by(model: str, version: str | None) -> ServedModel | _Problem:
        serving = state.current.model
        if model != state.name:
            return _problem(404, f"no such model; {state.name} is served", "model")
        if serving is None:
            return _problem(503, "no model is loaded yet")
        return state.traffic.version(version) or _problem(404, f"version {serving.version} is served", "version")

    @app.get("/v2/models/{model}", summary="What the model takes and gives", responses={404: {}, 503: {}})
    @app.get("/v2/models/{model}/versions/{version}", include_in_schema=False)
    async def metadata(model: str = named, version: str | None = None) -> Response:
        serving = named_by(model, version)
        if isinstance(serving, _Problem):
            return serving
        about = {"scale": serving.scale, "weights": serving.weights, "fingerprint": serving.fingerprint}
        about |= {"exact": str(serving.exact).lower(), "caveat": serving.caveat}
        # The protocol's parameters are texts and numbers: a list goes as JSON.
        known = {name: serving.about[name] for name in ("class_names", "pixel_maximum") if name in serving.about}
        about |= {name: json.dumps(value) if isinstance(value, list) else value for name, value in known.items()}
        versions = [each.version for each in state.traffic.versions]
        content = {"name": serving.name, "versions": versions, "platform": "pytorch", "parameters": about}
        return JSONResponse(content | described(serving.signature))

    @app.get("/v2/models/{model}/ready", summary="Whether the model answers", responses={404: {}, 503: {}})
    @app.get("/v2/models/{model}/versions/{version}/ready", include_in_schema=False)
    async def model_ready(model: str = named, version: str | None = None) -> Response:
        found = named_by(model, version)
        if isinstance(found, _Problem):
            return found
        return JSONResponse({"ready": state.ready}, 200 if state.ready else 503)

    @app.post(
        "/v2/models/{model}/infer",
        summary="Answers by the Open Inference Protocol",
        openapi_extra={"requestBody": {"required": True, "content": content}},
        responses=_ANSWERS | {404: {"description": "another model or version is served"}},  # type: ignore[arg-type]
    )
    @app.post("/v2/models/{model}/versions/{version}/infer", include_in_schema=False)
    async def infer(request: Request, model: str = named, version: str | None = None) -> Response:
        if isinstance(wrong := named_by(model, version), _Problem):
            return wrong
        identity: list[str] = []

        def convert(_: Request, body: bytes, serving: ServedModel) -> Values:
            asked = parsed(body, serving.signature)
            values = of_protocol(asked, serving.signature)
            if not isinstance(given := asked.get("id", ""), str):
                raise BadRequestError("id", f"a text is wanted, not {in_json(given)}")
            identity.append(given[:200])
            return values

        found = await _answered(request, state, convert, version)
        if isinstance(found, _Problem):
            return found
        reply = {"model_name": found.model.name, "model_version": found.model.version}
        reply |= {"id": identity[0]} if identity[0] else {}
        return _reply(request, found, reply | {"outputs": to_protocol(found.answer)})
