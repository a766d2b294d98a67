"""Settings that a user writes: YAML files, read strictly, and what is wrong with their values in one line."""

import re
from collections.abc import Hashable, Iterable
from pathlib import Path
from reprlib import Repr
from typing import Any

import yaml
from pydantic import ValidationError

from mlpipes.errors import ConfigError, UserError

_PLAIN = re.compile(
    r"[-+]?(0|[1-9]\d*|(\d+\.\d*|\.\d+)(e[-+]?\d+)?|\d+e[-+]?\d+|\.inf)|\.nan", re.ASCII | re.IGNORECASE
)


class _StrictLoader(yaml.SafeLoader):
    """A YAML loader that takes nothing for what was not written.

    A repeated mapping key is an error instead of a silent overwrite, and so is a number in a writing of which few know
    that it is one: `1:30` is 90 in YAML, and `010` is 8. `1e-3` is a number, which in YAML it is not.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        known = self.anchors.get(event.anchor) if isinstance(event, yaml.AliasEvent) else None
        if known is not None and known.end_mark is None:  # it has not come to its end yet
            raise yaml.constructor.ConstructorError(None, None, f"*{event.anchor} contains itself", event.start_mark)
        return super().compose_node(parent, index)

    def construct_number(self, node: yaml.ScalarNode) -> float:
        text = self.construct_scalar(node)
        if not _PLAIN.fullmatch(text):
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"write {text[:40]} as a plain decimal number, or in quotes if it is a text",
                node.start_mark,
            )
        if node.tag.endswith(":int"):
            return self.construct_yaml_int(node)
        return self.construct_yaml_float(node)

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


for _kind in ("int", "float"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _StrictLoader.construct_number)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", re.ASCII), list("-+0123456789")
)


def load_value(text: str) -> Any:
    """A single value written as YAML, read as strictly as a file. Raises ValueError in one line for what is none."""
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader subclass
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(" ".join(str(getattr(error, "problem", None) or error).split())) from error


def load_mapping(path: Path, what: str, variable: str, error: type[UserError] = ConfigError) -> dict[Any, Any]:
    """The mapping in a YAML file; empty if the file is.

    Raises `error`, which says that it is `what` and that `$variable` names it, if the file cannot be read, is no YAML, is
    no mapping or has a key twice.
    """
    try:
        with path.expanduser().open(encoding="utf-8") as stream:
            content = yaml.load(stream, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader subclass
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
