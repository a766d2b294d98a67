"""The doctor for Slurm: what training there needs, what is there, and what to do about what is missing."""

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlpipes.compute.jobs import python_path
from mlpipes.compute.slurm import SETTINGS_VARIABLE, SlurmSettings, run_slurm, shape
from mlpipes.errors import ConfigError, PreflightError, UserError
from mlpipes.scales import RayScaleConfig
from mlpipes.store.environment import value_of
from mlpipes.store.layout import Store

COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "srun")
_PROBE_SECONDS = 600


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    good: bool
    detail: str


def examine_slurm(scales: Mapping[str, Sequence[RayScaleConfig]], store: Store, *, probe: bool) -> Iterator[Finding]:
    """What training the `scales` of each workload on Slurm needs, one after the other.

    `probe` sends a job to a node. Nothing is left behind.
    """
    try:
        path = value_of(SETTINGS_VARIABLE) or ""
        settings = SlurmSettings.load(Path(path)) if path else SlurmSettings()
    except UserError as error:
        yield Finding("settings", False, str(error))
        return
    missing = (
        f"{SETTINGS_VARIABLE} is not set, so trainings run on this machine; set it to a YAML file, which may be empty"
    )
    yield Finding("settings", bool(path), path or missing)
    versions = set()
    for name in COMMANDS:
        found = _tried(name, lambda name=name: run_slurm(settings.command_prefix, [name, "--version"]))
        if not found.good:
            yield found
            return
        versions.add(found.detail)
    yield Finding("commands", True, f"{', '.join(COMMANDS)} ({', '.join(sorted(versions))})")
    where = [f"--partition={settings.partition}"] if settings.partition else []
    shown = ["sinfo", "-h", *where, "-o", "%P: %D nodes, %c CPUs, %G, %l, %T"]
    yield (nodes := _tried("partition", lambda: run_slurm(settings.command_prefix, shown)))
    if not nodes.good:  # the controller is away
        return
    if not nodes.detail:
        yield Finding("partition", False, f"there is no partition {settings.partition or 'at all'}")
    for workload, offered in scales.items():
        for scale in offered:
            options = shape(scale, settings.of_scale(scale.key))
            yield _tried(
                f"{workload} {scale.key}",
                lambda options=options: (
                    run_slurm(settings.command_prefix, ["sbatch", "--test-only", *options], "#!/bin/sh\n")
                    or f"could start: {' '.join(options)}"
                ),
            )
    store.root.mkdir(parents=True, exist_ok=True)
    if probe:
        yield _tried("a node", lambda: _probe(settings, store))
    else:
        yield Finding("store", True, f"{store.root} must be the same on all nodes; `--probe` sends a job to see")


def _probe(settings: SlurmSettings, store: Store) -> str:
    """Run a small job on a node: does it see the store, and can its Python import what a training needs?"""
    witness = store.root / f"probe-{os.getpid()}"
    checks = (
        "import mlpipes, ray, platform, torch; print(platform.node(), platform.python_version(), torch.__version__)"
    )
    lines = list(settings.setup)
    if shlex.split(settings.python) == [sys.executable]:  # as for a training
        lines.append(f"export PYTHONPATH={shlex.quote(python_path())}")
    lines += [f"{settings.python} -c {shlex.quote(checks)} > {shlex.quote(str(witness))}"]
    options = shape(RayScaleConfig(workers=1, batch_size=1, epochs=1), settings)
    try:
        run_slurm(
            settings.command_prefix,
            ["sbatch", "--wait", "--output=/dev/null", *options, "--time=5"],
            "\n".join(["#!/bin/bash", "set -e", *lines, ""]),
            _PROBE_SECONDS,
        )
        return f"node, Python and torch: {witness.read_text(encoding='utf-8').strip()}"
    except FileNotFoundError as error:
        raise PreflightError(f"a node wrote to {witness}, and nothing is there: {store.root} is not shared") from error
    finally:
        witness.unlink(missing_ok=True)


def _tried(what: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(what, True, " ".join(look().split()))
    except (ConfigError, PreflightError, ConnectionError) as error:
        return Finding(what, False, str(error))
