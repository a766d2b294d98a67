"""Settings of a training on the command line: those of the launchpad, from options and a file, validated as there."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError, create_model

from mlpipes.errors import ConfigError
from mlpipes.orchestration.training import TrainingConfig, make_recipe
from mlpipes.settings import load_mapping, load_value, problems, shown
from mlpipes.store.layout import Store
from mlpipes.store.references import (
    ChampionReference,
    EvaluationReference,
    ModelReference,
    SnapshotReference,
    TrainingReference,
)
from mlpipes.workloads.catalog import Entry

_OF_A_TRAINING = (TrainingReference, ModelReference, EvaluationReference, ChampionReference)


def settings_of(
    entry: Entry,
    file: Path | None = None,
    changes: Sequence[str] = (),
    seed: int | None = None,
    fresh: bool = False,
) -> TrainingConfig | None:
    """The settings of a training; None where nothing is set. Options count more than the file.

    `changes` are `name=value` of hyperparameters, or of other settings of the launchpad. Raises ConfigError naming what is
    unknown or out of range.
    """
    if file is None and not changes and seed is None and not fresh:
        return None
    content = {} if file is None else _from_file(entry, file)
    hyperparameters = content.get("hyperparameters", {})
    if not isinstance(hyperparameters, Mapping):
        raise ConfigError(f"{file}: `hyperparameters` is to be a mapping, lines of `name: value`")
    content["hyperparameters"] = dict(hyperparameters)
    known = entry.load().hyperparameters.model_fields
    given = set[str]()
    for change in changes:
        name, value = _change(change)
        if name in given:
            raise ConfigError(f"--set {name}: it is given twice; say it once")
        given.add(name)
        if name in known:
            content["hyperparameters"][name] = value
        elif name in TrainingConfig.model_fields and name != "hyperparameters":
            content[name] = value
        else:
            others = [field for field in TrainingConfig.model_fields if field != "hyperparameters"]
            raise ConfigError(
                f"--set {change}: {entry.name} has no hyperparameter {name!r}; it has {', '.join(known)}. Other settings "
                f"are {', '.join(others)}."
            )
    if seed is not None:
        content["seed"] = seed
    if fresh:
        content["fresh"] = True
    if not content["hyperparameters"]:
        del content["hyperparameters"]
    try:
        _check_types(entry, content)
        config = TrainingConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"settings of {entry.name}: {problems(error, TrainingConfig.model_fields)}") from error
    # A hyperparameter that is none is an error that names it; infinity has no place in a fingerprint.
    recipe = make_recipe(entry, entry.scales[0].key, "", config, "")
    for name, value in recipe.hyperparameters.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"hyperparameters of {entry.name}: {name}: write a finite number (got {value})")
    return config


def _check_types(entry: Entry, content: Mapping[str, Any]) -> None:
    """As the launchpad does: the class itself passes over what it does not know, and makes numbers of texts.

    Raises ConfigError, or ValidationError.
    """
    fields = TrainingConfig.model_fields
    if unknown := [name for name in content if name not in fields]:
        raise ConfigError(f"settings of {entry.name}: unknown are {', '.join(unknown)}; known are {', '.join(fields)}")
    given: dict[str, Any] = {name: (fields[name].annotation, ...) for name in content}
    create_model("Settings", **given).model_validate(dict(content), strict=True)


def _from_file(entry: Entry, file: Path) -> dict[str, Any]:
    """The settings in a file: those of the asset `checkpoints` by name, or the whole of what the launchpad shows."""
    content = load_mapping(file, "settings", "--config")
    if "ops" not in content:
        return {str(name): value for name, value in content.items()}
    op, inner = f"{entry.name}__checkpoints", content["ops"]
    found = inner.get(op) if isinstance(inner, Mapping) else None
    if len(content) > 1 or not isinstance(inner, Mapping) or list(inner) != [op]:
        raise ConfigError(f"settings {file}: under `ops:` only `{op}:` can be set here")
    if not isinstance(found, Mapping) or list(found) != ["config"] or not isinstance(found["config"], Mapping):
        raise ConfigError(f"settings {file}: under `{op}:` write `config:` and the settings below it")
    return {str(name): value for name, value in found["config"].items()}


def _change(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip() or not value.strip():
        raise ConfigError(f"--set {text}: write name=value, such as learning_rate=0.1")
    try:
        return name.strip(), load_value(value)
    except ValueError as error:
        raise ConfigError(f"--set {name.strip()}: {shown(value)} cannot be read as YAML: {error}") from error


def run_config(entry: Entry, config: TrainingConfig | None) -> dict[str, Any]:
    """What the launchpad would hold; empty for no settings."""
    if config is None:
        return {}
    return {"ops": {f"{entry.name}__checkpoints": {"config": config.model_dump(exclude_unset=True)}}}


def described(config: TrainingConfig) -> str:
    """The settings in one line, for people."""
    set_ = config.model_dump(exclude_unset=True)
    flat = {name: value for name, value in set_.items() if name != "hyperparameters"} | set_.get("hyperparameters", {})
    return ", ".join(f"{name} {value}" for name, value in flat.items())


def is_trained(entry: Entry, scale: str, config: TrainingConfig, store: Store) -> bool:
    """Whether training, model and evaluation of a scale are of these settings, by their fingerprint; never of a fresh start.

    Dagster's freshness says nothing of settings.
    """
    if config.fresh or (snapshot := store.read_reference(SnapshotReference, entry.name, scale)) is None:
        return False
    fingerprint = make_recipe(entry, scale, snapshot.digest, config, "").fingerprint
    found = [store.read_reference(kind, entry.name, scale) for kind in _OF_A_TRAINING]
    return all(reference is not None and reference.fingerprint == fingerprint for reference in found)
