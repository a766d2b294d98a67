"""Settings that a user writes: YAML files, read strictly, and what is wrong with their values in one line."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mlpipes.errors import ConfigError, UserError


class _UniqueKeyLoader(yaml.SafeLoader):
    """A YAML loader to which a repeated mapping key is an error instead of a silent overwrite."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} occurs twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_mapping(path: Path, what: str, variable: str, error: type[UserError] = ConfigError) -> dict[Any, Any]:
    """The mapping in a YAML file; empty if the file is.

    Raises `error`, which says that it is `what` and that `$variable` names it, if the file cannot be read, is no YAML, is
    no mapping or has a key twice.
    """
    try:
        with path.open(encoding="utf-8") as stream:
            content = yaml.load(stream, Loader=_UniqueKeyLoader)  # noqa: S506 - a SafeLoader subclass
    except OSError as cause:
        raise error(f"{what} {path} (from {variable}) cannot be read: {cause.strerror}") from cause
    except (yaml.YAMLError, UnicodeDecodeError) as cause:
        raise error(f"{what} {path} (from {variable}) is not valid YAML: {cause}") from cause
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise error(f"{what} {path} (from {variable}): expected a mapping, lines of `name: value`")
    return content


def problems(error: ValidationError, known: Iterable[str] = (), whole: str = "") -> str:
    """What pydantic found, in one line: field, rule and value of each problem, and the fields that are `known`.

    `whole` names what is wrong where no single field is.
    """
    found = "; ".join(
        f"{'.'.join(map(str, p['loc'])) or whole}: {p['msg'].removeprefix('Value error, ')} (got {p['input']!r})"
        for p in error.errors()
    )
    return f"{found}. Known: {', '.join(known)}." if known else found
