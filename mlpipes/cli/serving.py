"""The part of the command line about serving: serve, export."""

import os
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlpipes.cli.common import console, friendly
from mlpipes.errors import ConfigError
from mlpipes.store.files import check_writable
from mlpipes.store.layout import default_store
from mlpipes.store.redaction import redact
from mlpipes.workloads.catalog import entry_named

if TYPE_CHECKING:
    from mlpipes.serving.current import Source, Wanted

app = typer.Typer()
TOKEN_VARIABLE = "MLPIPES_SERVE_TOKEN"  # noqa: S105 - its name


@app.command()
@friendly
def serve(
    workload: Annotated[str | None, typer.Argument(help="whose model")] = None,
    model: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="instead of a workload: what `mlpipes export` wrote; needs no MLflow"),
    ] = None,
    version: Annotated[
        int | None, typer.Option(min=1, max=2**31 - 1, help="a certain version; default: whichever is champion")
    ] = None,
    alias: Annotated[str, typer.Option(help="follow another alias of MLflow's registry")] = "champion",
    canary: Annotated[
        str | None,
        typer.Option(help="a second version, or another alias that is followed, beside the one that is served"),
    ] = None,
    share: Annotated[
        float,
        typer.Option(min=0, max=1, help="of clients that the canary answers; 0: it only computes what is compared"),
    ] = 0.0,
    shadow: Annotated[
        float, typer.Option(min=0, max=1, help="share of requests that the other version computes as well, afterwards")
    ] = 1.0,
    sample: Annotated[
        int,
        typer.Option(min=0, max=10_000, help="samples an hour that are kept, in a few figures, to look for drift in"),
    ] = 500,
    host: Annotated[str, typer.Option(help="the address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 8100,
    poll: Annotated[float, typer.Option(min=0.1, help="seconds between two looks whether another is wanted")] = 5.0,
    wait: Annotated[
        bool, typer.Option("--wait", help="where there is no version yet, wait for the first instead of ending")
    ] = False,
    tls_cert: Annotated[Path | None, typer.Option(help="certificate, PEM; with --tls-key")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="its key, PEM")] = None,
    behind_proxy: Annotated[bool, typer.Option("--behind-proxy", help="something in front of it speaks TLS")] = False,
    no_token: Annotated[
        bool, typer.Option("--no-token", help="something in front of it asks who asks; whoever gets here may")
    ] = False,
    max_body: Annotated[int, typer.Option(min=1, help="MiB of a request")] = 8,
    max_requests: Annotated[int, typer.Option(min=1, help="at once; beyond them: 429")] = 128,
    drain: Annotated[float, typer.Option(min=0, help="seconds of not being ready before the end, for balancers")] = 0.0,
) -> None:
    """Serve a workload's champion over HTTP; when another model becomes champion, it takes over without a pause."""
    from mlpipes.serving.current import await_first
    from mlpipes.serving.limits import Limits
    from mlpipes.serving.server import Address, serve
    from mlpipes.serving.web import State

    if canary is None and share:
        raise ConfigError("--share is of a --canary: name a version or an alias")
    if canary is not None and model is not None:
        raise ConfigError("a folder of --model has one version, and no --canary beside it")
    if canary is not None and canary == (alias if version is None else str(version)):
        raise ConfigError(f"--canary {canary} is what is served already; name another version or alias")
    token = os.environ.get(TOKEN_VARIABLE, "")
    address = Address(host, port, tls_cert, tls_key, behind_proxy, drain, no_token)
    address.check(token)
    source, beside = _source(workload, model, version, alias), None
    if canary is not None:
        number = int(canary) if canary.isdecimal() else None
        beside = _source(workload, None, number, canary if number is None else "champion")

    def tell(text: str) -> None:
        with suppress(OSError, SystemExit):  # who has read it has gone, or its disk is full: the server serves on
            console.print(redact(text), markup=False, highlight=False, soft_wrap=True)

    if wait:
        await_first(source, tell, poll)
    limits = Limits(max_body << 20, in_flight=max_requests, token=token)
    serve(State(source, poll, tell, limits, canary=beside, share=share, shadowed=shadow, sample=sample), address)


@app.command()
@friendly
def export(
    workload: Annotated[str, typer.Argument(help="whose model")],
    output: Annotated[
        Path, typer.Option(metavar="FOLDER", help="where to write it; it must not be there, or be empty")
    ],
    version: Annotated[
        int | None, typer.Option(min=1, max=2**31 - 1, help="a certain version; default: the champion")
    ] = None,
    alias: Annotated[str, typer.Option(help="another alias of MLflow's registry")] = "champion",
) -> None:
    """Write a registered version to a folder, from which `mlpipes serve --model FOLDER` serves it without MLflow."""
    from mlpipes.serving.current import Registry
    from mlpipes.serving.model import opened, write_out
    from mlpipes.tracking.runs import Tracker, existing_uri

    wanted, output = _wanted(workload, version, alias), output.expanduser().absolute()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"{output} is there already; name another folder")
    above = next(place for place in (output, *output.parents) if place.exists())
    if not above.is_dir():
        raise ConfigError(f"{above} is a file, in which nothing can be written; name another folder")
    check_writable(above)
    tracker = Tracker(existing_uri())
    registered = Registry(lambda: tracker, wanted, default_store()).wanted_now()
    write_out(tracker, registered, output)
    console.print(
        f"{registered.name} version {registered.version} is in {output}, {opened(output)[0].size / 1e6:.1f} MB.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _wanted(workload: str, version: int | None, alias: str) -> "Wanted":
    from mlpipes.serving.current import Wanted
    from mlpipes.tracking.models import registered_name

    entry_named(workload)
    if version is not None and alias != "champion":
        raise ConfigError("name a --version or an --alias, not both")
    return Wanted(registered_name(workload), str(version) if version else None, alias)


def _source(workload: str | None, model: Path | None, version: int | None, alias: str) -> "Source":
    """Where a server has its model from."""
    from mlpipes.serving.current import Folder, Registry
    from mlpipes.tracking.runs import Tracker, existing_uri

    if (workload is None) == (model is None):
        raise ConfigError(f"name a workload, or a folder with --model{', not both' if workload else ''}")
    if model is not None:
        if version is not None or alias != "champion":
            raise ConfigError("a folder of --model has one version; --version and --alias are of a workload")
        return Folder(model.expanduser().absolute())
    # One client, but whether MLflow answers is asked each time: by itself, a client would try for minutes. Where MLflow
    # answers and its database does not, it would, too, for 120 s each of eight times; here is somebody who asks again.
    for name, value in {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}.items():
        os.environ.setdefault(name, value)
    tracker = cache(Tracker)
    return Registry(lambda: tracker(existing_uri()), _wanted(str(workload), version, alias), default_store())
