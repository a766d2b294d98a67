"""Settings that a user writes: YAML files, read strictly, and what is wrong with their values in one line."""

from collections.abc import Hashable, Iterable
from pathlib import Path
from reprlib import Repr
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
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is no name", key_node.start_mark)
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
        with path.expanduser().open(encoding="utf-8") as stream:
            content = yaml.load(stream, Loader=_UniqueKeyLoader)  # noqa: S506 - a SafeLoader subclass
    except (OSError, RuntimeError) as cause:
        if isinstance(cause, RecursionError):
            raise error(f"{what} {path} (from {variable}) is nested too deeply") from None
        why = cause.strerror if isinstance(cause, OSError) else cause  # the home of a user that there is not
        raise error(f"{what} {path} (from {variable}) cannot be read: {why}") from cause
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        OverflowError,
    ) as cause:  # a date of a month 13, say, is a ValueError
        raise error(f"{what} {path} (from {variable}) is not valid YAML: {cause}") from cause
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise error(f"{what} {path} (from {variable}): expected a mapping, lines of `name: value`")
    return content


_SHOWN = Repr()
_SHOWN.maxstring = _SHOWN.maxother = 120


def shown(value: Any) -> str:
    """A value as a user may have written it, for a message: one that is long or deep in its first parts."""
    return _SHOWN.repr(value)


def problems(error: ValidationError, known: Iterable[str] = (), whole: str = "") -> str:
    """What pydantic found, in one line: field, rule and value of each problem, and the fields that are `known`.

    `whole` names what is wrong where no single field is.
    """
    found = "; ".join(
        f"{'.'.join(map(str, p['loc'])) or whole}: {p['msg'].removeprefix('Value error, ')} (got {shown(p['input'])})"
        for p in error.errors()
    )
    return f"{found}. Known: {', '.join(known)}." if known else found
