"""The part of the command line about serving: serve."""

import os
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Annotated

import typer

from mlpipes.cli.common import console, friendly
from mlpipes.errors import ConfigError
from mlpipes.store.layout import default_store
from mlpipes.store.redaction import redact
from mlpipes.workloads.catalog import entry_named

app = typer.Typer()
TOKEN_VARIABLE = "MLPIPES_SERVE_TOKEN"  # noqa: S105 - its name


@app.command()
@friendly
def serve(
    workload: Annotated[str, typer.Argument(help="whose model")],
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
    poll: Annotated[float, typer.Option(min=0.1, help="seconds between two looks whether the alias has moved")] = 5.0,
    tls_cert: Annotated[Path | None, typer.Option(help="certificate, PEM; with --tls-key")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="its key, PEM")] = None,
    behind_proxy: Annotated[bool, typer.Option("--behind-proxy", help="something in front of it speaks TLS")] = False,
    max_body: Annotated[int, typer.Option(min=1, help="MiB of a request")] = 8,
    max_requests: Annotated[int, typer.Option(min=1, help="at once; beyond them: 429")] = 128,
    drain: Annotated[float, typer.Option(min=0, help="seconds of not being ready before the end, for balancers")] = 0.0,
) -> None:
    """Serve a workload's champion over HTTP; when another model becomes champion, it takes over without a pause."""
    from mlpipes.serving.current import Registry, Wanted
    from mlpipes.serving.limits import Limits
    from mlpipes.serving.server import Address, serve
    from mlpipes.serving.web import State
    from mlpipes.tracking.models import registered_name
    from mlpipes.tracking.runs import Tracker, existing_uri

    entry_named(workload)
    if version is not None and alias != "champion":
        raise ConfigError("name a --version or an --alias, not both")
    if canary is None and share:
        raise ConfigError("--share is of a --canary: name a version or an alias")
    if canary is not None and canary == (alias if version is None else str(version)):
        raise ConfigError(f"--canary {canary} is what is served already; name another version or alias")
    token = os.environ.get(TOKEN_VARIABLE, "")
    address = Address(host, port, tls_cert, tls_key, behind_proxy, drain)
    address.check(token)
    wanted = Wanted(registered_name(workload), str(version) if version else None, alias)
    # One client, but whether MLflow answers is asked each time: by itself, a client would try for minutes.
    tracker = cache(Tracker)

    def registry(wanted: Wanted) -> Registry:
        return Registry(lambda: tracker(existing_uri()), wanted, default_store())

    beside = None
    if canary is not None:
        beside = registry(Wanted(wanted.name, canary) if canary.isdecimal() else Wanted(wanted.name, alias=canary))

    def tell(text: str) -> None:
        with suppress(OSError, SystemExit):  # who has read it has gone, or its disk is full: the server serves on
            console.print(redact(text), markup=False, highlight=False, soft_wrap=True)

    limits = Limits(max_body << 20, in_flight=max_requests, token=token)
    state = State(registry(wanted), poll, tell, limits, canary=beside, share=share, shadowed=shadow, sample=sample)
    serve(state, address)
