"""Reached code: what a module runs, itself and by its imports, found by reading files. Nothing is imported.

What people edit counts by its code: every module outside the folders that installers write to, and the modules of the
distributions that the search starts in, wherever they lie. A library counts by its version, the standard library not at
all. Imports in functions count, those for type checkers do not; of computed names (`import_module(name)`), of what a
compiled module imports, and of files that code reads nothing is known.
"""

import ast
import hashlib
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from importlib.machinery import BYTECODE_SUFFIXES, EXTENSION_SUFFIXES, SOURCE_SUFFIXES, ModuleSpec
from importlib.util import find_spec, resolve_name
from pathlib import Path

from mlpipes.errors import ConfigError
from mlpipes.store.files import digest_of

_SUFFIXES = (*EXTENSION_SUFFIXES, *SOURCE_SUFFIXES, *BYTECODE_SUFFIXES)
"""In the order in which Python looks."""
_STANDARD = tuple({Path(sysconfig.get_paths()[name]) for name in ("stdlib", "platstdlib")})
_INSTALLED = frozenset({"site-packages", "dist-packages"})
_WORKERS = {"datasets": ("pandas", "pyarrow"), "torchvision": ("pillow",), "transformers": ("tokenizers",)}
"""Distributions that do the work of a library, released apart from it."""


@dataclass(frozen=True)
class ReachedCode:
    """Modules by name with a digest of their code, and libraries by distribution with their version."""

    modules: Mapping[str, str]
    libraries: Mapping[str, str]

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of both."""
        return digest_of(asdict(self))


def reached_code(roots: Iterable[str], counts: Callable[[str], bool]) -> ReachedCode:
    """All that the root modules reach; `counts` says of each module and distribution by name whether it is of interest.

    What does not count is not looked into either. Raises ConfigError for a root that has no file, and for a file that is
    no Python, with its line.
    """
    search = _Search()
    roots = list(roots)
    for root in roots:
        if search.file(root) is None:
            raise ConfigError(f"there is no module {root!r}; is its name right, and its folder on Python's path?")
    tops = {root.partition(".")[0] for root in roots if _is_installed(search.file(root))}
    own = {name for top in tops for name in _distributions(top)}
    modules: dict[str, str] = {}
    libraries: dict[str, str] = {}
    waiting, seen = roots, set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        top = name.partition(".")[0]
        if top != name:
            waiting.append(name.rpartition(".")[0])  # a package's `__init__` runs before what is in it
        if search.is_standard(top):
            continue
        file = search.file(name)
        if file is None:
            continue
        found = _distributions(top) if _is_installed(file) else {}
        if found and own.isdisjoint(found):
            for library in filter(counts, found):
                libraries |= {library: found[library]} | _workers(library)
        elif counts(name):
            code = _code(file)
            modules[name] = code.digest
            package = name if file.name.startswith("__init__.") else name.rpartition(".")[0]
            waiting.extend(search.imported(code, package))
    return ReachedCode(modules, libraries)


class _Search:
    """Where modules lie, as Python would find them; each name is looked up once."""

    def __init__(self) -> None:
        self.spec, self.file, self.is_standard = cache(self._spec), cache(self._file), cache(self._is_standard)

    def _spec(self, top: str) -> ModuleSpec | None:
        """Only top-level names are asked for: to find a submodule, Python would import what lies above it."""
        try:
            return find_spec(top)
        except (ImportError, ValueError):
            return None

    def _file(self, module: str) -> Path | None:
        """A module's file; None for a namespace, for what is built in, and for what is no module."""
        top, *rest = module.split(".")
        spec = self.spec(top)
        if spec is None:
            return None
        if not rest:
            return Path(spec.origin) if spec.has_location and spec.origin and Path(spec.origin).is_file() else None
        for location in spec.submodule_search_locations or ():
            path = Path(location, *rest)
            for stem in (path / "__init__", path):
                for suffix in _SUFFIXES:
                    if (file := stem.with_name(stem.name + suffix)).is_file():
                        return file
        return None

    def _is_standard(self, top: str) -> bool:
        spec = self.spec(top)
        if spec is None or (spec.submodule_search_locations and spec.origin is None):
            return False
        file = self.file(top)
        return file is None or (not _is_installed(file) and any(file.is_relative_to(folder) for folder in _STANDARD))

    def imported(self, code: "_Code", package: str) -> Iterator[str]:
        """Absolute names of all that may be modules among what code imports that is in a package (or in none)."""
        for level, module, names in code.imports:
            parts = package.split(".") if level and package else []
            if level > len(parts) > 0:
                continue  # beyond the top, which Python refuses too
            target = ".".join([*parts[: len(parts) - level + 1], *([module] if module else [])])
            if not target:
                continue
            yield target
            for name in names:
                if name != "*":
                    yield f"{target}.{name}"
                elif (file := self.file(target)) and not _is_installed(file):
                    yield from (f"{target}.{exported}" for exported in _code(file).exported)


@dataclass(frozen=True)
class _Code:
    """What is known of a file."""

    digest: str
    imports: tuple[tuple[int, str, tuple[str, ...]], ...] = ()
    """Leading dots, module, names taken from it."""
    exported: tuple[str, ...] = ()
    """`__all__`."""


def _code(file: Path) -> _Code:
    content = file.read_bytes()
    if file.suffix not in SOURCE_SUFFIXES:
        return _Code(hashlib.sha256(content).hexdigest())
    try:
        return _parsed(content)
    except (SyntaxError, ValueError) as error:
        said, line = getattr(error, "msg", str(error)), getattr(error, "lineno", None)
        where = f"{file}, line {line}" if line else str(file)
        raise ConfigError(f"{where}: this is no Python that can be read ({said})") from error


@cache  # by content: in a process that lives long, an edited file is read again and the others are not
def _parsed(content: bytes) -> _Code:
    """A source file without comments, formatting, docstrings and what is for type checkers only.

    The form of the digested tree is Python's own, so another minor version of Python gives another digest.
    """
    tree = ast.parse(content)
    imports, exported = [], []
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and getattr(node.test, "id", getattr(node.test, "attr", "")) == "TYPE_CHECKING":
            node.body = []
        for field in ("body", "orelse", "finalbody"):
            if isinstance(statements := getattr(node, field, None), list):
                # A constant by itself is a docstring, of an attribute maybe. That a body may be empty then does not matter.
                kept = [s for s in statements if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
                setattr(node, field, kept)
        imports += _imports(node)
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
                exported += [text for part in ast.walk(node.value) if (text := _text(part))]
        waiting.extend(ast.iter_child_nodes(node))
    return _Code(hashlib.sha256(ast.dump(tree).encode()).hexdigest(), tuple(imports), tuple(exported))


def _imports(node: ast.AST) -> list[tuple[int, str, tuple[str, ...]]]:
    if isinstance(node, ast.ImportFrom):
        return [(node.level, node.module or "", tuple(alias.name for alias in node.names))]
    if isinstance(node, ast.Import):
        return [(0, alias.name, ()) for alias in node.names]
    called = getattr(node.func, "id", getattr(node.func, "attr", "")) if isinstance(node, ast.Call) else ""
    if called in ("import_module", "__import__") and isinstance(node, ast.Call) and node.args:
        name = _text(node.args[0])
        within = [*node.args[1:2], *(keyword.value for keyword in node.keywords if keyword.arg == "package")]
        if name.startswith(".") and within and (package := _text(within[0])):
            with suppress(ImportError):  # beyond the top
                name = resolve_name(name, package)
        return [(len(name) - len(name.lstrip(".")), name.lstrip("."), ())]
    return []


def _text(node: ast.AST) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _is_installed(file: Path | None) -> bool:
    return file is not None and not _INSTALLED.isdisjoint(file.parts)


@cache
def _distributions(top: str) -> dict[str, str]:
    """The installed distributions that a top-level name belongs to, by name, with their versions.

    `packages_distributions` of the standard library takes a second for it.
    """
    try:
        if _provides(alike := metadata.distribution(top), top):
            return dict([_version(alike)])
    except metadata.PackageNotFoundError:
        pass
    return dict(_version(found) for found in metadata.distributions() if _provides(found, top))


def _provides(distribution: metadata.Distribution, top: str) -> bool:
    if top in (distribution.read_text("top_level.txt") or "").split():
        return True
    record = "\n" + (distribution.read_text("RECORD") or "")
    return f"\n{top}/" in record or f"\n{top}." in record


@cache
def _workers(library: str) -> dict[str, str]:
    found = {}
    for name in _WORKERS.get(library, ()):
        with suppress(metadata.PackageNotFoundError):
            found |= [_version(metadata.distribution(name))]
    return found


def _version(distribution: metadata.Distribution) -> tuple[str, str]:
    """Name and version; with what was installed if that came from a folder, a file or a repository, by no release."""
    described = distribution.metadata
    name, version = described["Name"], described["Version"]
    if distribution.read_text("direct_url.json") is None:
        return name, version
    rows = (distribution.read_text("RECORD") or "").splitlines()
    code = sorted(r for r in rows if not r.startswith("..") and ".dist-info/" not in r and "__pycache__" not in r)
    return name, f"{version} {digest_of(code)[:16]}"
