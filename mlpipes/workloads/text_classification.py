"""Text: classification and regression of texts or pairs with an encoder of BERT's kind; `docstrings` and `sst2`."""

import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mlpipes.data.dataset import Columns, Source
from mlpipes.data.docstrings import DocstringSource
from mlpipes.data.ragged import Ragged
from mlpipes.data.snapshot import Prepared
from mlpipes.data.splits import SplitPlan
from mlpipes.data.tables import sst2_source
from mlpipes.errors import ConfigError, DataError
from mlpipes.reporting.classification import probabilities_of
from mlpipes.reporting.report import Table
from mlpipes.store.calibration import Calibration
from mlpipes.workloads import text_serving
from mlpipes.workloads.base import Batch, DataInfo, Hyperparameters, Workload
from mlpipes.workloads.classification import Classification
from mlpipes.workloads.deployables import PythonCode
from mlpipes.workloads.encoder_models import Pooling, attending, build, freeze, logits_of, pool
from mlpipes.workloads.encoder_trial import Trial
from mlpipes.workloads.encoders import Encoder, Pretrained, Tiny, tokenizer_of
from mlpipes.workloads.optimization import adamw, trapezoid
from mlpipes.workloads.regression import Regression
from mlpipes.workloads.served import served_predictions, served_rows
from mlpipes.workloads.temperature import TEMPERATURE
from mlpipes.workloads.tensors import RaggedTensor, has_native_bf16, on_device

SST2_VARIABLE = "MLPIPES_SST2"
SST2_MODEL_VARIABLE = "MLPIPES_SST2_MODEL"
_SHOWN_CHARACTERS = 300
_CPU = torch.device("cpu")


class TextHyperparameters(Hyperparameters):
    """What can be set about fine-tuning an encoder."""

    learning_rate: float = Field(default=5e-5, gt=0)
    weight_decay: float = Field(default=0.01, ge=0, description="of matrices; never of biases and norms")
    warmup: float = Field(default=0.1, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    clip: float | None = Field(default=1.0, gt=0, description="greatest norm of the global batch's gradient")
    dropout: float | None = Field(default=None, ge=0, lt=1, description="None: the encoder's own")
    attention_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="fused attention kernels, for long texts, need 0 on a CPU"
    )
    pooling: Pooling = Field(
        default="own", description="mean: the head sees the mean of all tokens, as encoders of sentences are pretrained"
    )
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    freeze_embeddings: bool = Field(default=False, description="leave the embeddings as they were pretrained")
    freeze_layers: int = Field(
        default=0,
        ge=0,
        description="leave so many of the encoder's layers, from below, and the embeddings as pretrained",
    )
    keep_layers: int | None = Field(
        default=None, ge=1, description="so many of the encoder's layers, from below, and no more; None: all"
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="padded tokens that go through the model at once; the rest of a shard accumulates",
    )


class TextWorkload(Workload):
    """What classification and regression share: columns `text`, `text_pair` (UTF-8) become `tokens`, `types` (ragged)."""

    sparse_embedding_gradients = True
    served_rows = 4

    def __init__(
        self,
        source: Source,
        split: SplitPlan,
        encoder: Encoder,
        hyperparameters: type[TextHyperparameters] = TextHyperparameters,
        max_length: int = 128,
    ) -> None:
        self.source, self.split, self.encoder, self.max_length = source, split, encoder, max_length
        self.hyperparameters = hyperparameters

    # -- data ---------------------------------------------------------------------------------------------------------
    @property
    def preparation(self) -> dict[str, Any]:
        """The encoder with the digests of its files, and the greatest length."""
        return {"max_length": self.max_length, **self.encoder.describe()}

    def prepare(self, splits: Mapping[str, Columns], facts: Mapping[str, Any], scratch: Path) -> Prepared:
        """Tokenize every split once; a vocabulary, where one is learnt, sees the training split only.

        The encoder is tried: raises DataError or ConfigError if it does not fit its tokenizer or the texts.
        """
        self._check(facts)
        train = splits["train"]
        texts = [text for name in ("text", "text_pair") if name in train for text in train[name].texts()]
        tokenizer = self.encoder.prepare(texts, scratch)
        info = DataInfo(facts, {}, scratch)
        name = str(getattr(self.encoder, "name", type(self.encoder).__name__))
        trial = Trial(name, scratch, tokenizer, self._outputs(info)[0])
        if trial.positions is not None and trial.positions < self.max_length:
            raise ConfigError(
                f"max_length is {self.max_length}, but the encoder takes {trial.positions} tokens at most"
            )
        trial.settle(texts)
        tokenized, cut = {}, {}
        for name, columns in splits.items():
            encoded, cut[name] = self.tokenized(tokenizer, columns)
            tokenized[name] = dict(columns) | encoded
        self._try(trial, tokenized["train"])
        files = {p.relative_to(scratch).as_posix(): p for p in sorted(scratch.rglob("*")) if p.is_file()}
        warnings = {"warnings": trial.warnings} if trial.warnings else {}
        return Prepared(tokenized, dict(facts) | {"truncated": cut} | warnings, files)

    def _try(self, trial: Trial, train: Columns) -> None:
        """The longest text and the shortest go through the encoder together."""
        trial.check_known(train["tokens"])
        lengths = train["tokens"].lengths
        if len(lengths) == 0:
            return
        extremes = np.array([lengths.argmax(), lengths.argmin()])
        columns = on_device({name: train[name][extremes] for name in ("tokens", "types") if name in train}, _CPU)
        batch = self.batch(columns, torch.arange(2), self.hyperparameters(), augment=False)
        trial.run(lambda model: self._logits(model, batch, self.hyperparameters()))

    def tokenized(self, tokenizer: Any, columns: Columns) -> tuple[dict[str, Ragged], int]:
        """`tokens` (and `types`, of pairs) int32, and how many rows were cut to `max_length`."""
        parts = [list(columns[name].texts()) for name in ("text", "text_pair") if name in columns]
        if not parts[0]:
            return {"tokens": Ragged.of([], np.int32)}, 0
        encoded = tokenizer(*parts, truncation=True, max_length=self.max_length)
        # Counted without special tokens: a row that was cut is as long as it may be, and one more would not have fitted.
        longest = [row for row, ids in enumerate(encoded["input_ids"]) if len(ids) == self.max_length]
        again = [[part[row] for row in longest] for part in parts]
        cut = sum(len(ids) > self.max_length for ids in tokenizer(*again)["input_ids"]) if longest else 0
        found = {"tokens": Ragged.of([np.array(ids, dtype=np.int32) for ids in encoded["input_ids"]], np.int32)}
        types = encoded.get("token_type_ids", [])
        # Of a single text, most tokenizers say nothing but zeros.
        if types and (len(parts) == 2 or any(any(row) for row in types)):
            found["types"] = Ragged.of([np.array(row, dtype=np.int32) for row in types], np.int32)
        return found, cut

    @abstractmethod
    def _check(self, facts: Mapping[str, Any]) -> None:
        """Raises DataError if the data are for the other task."""

    def statistics(self, train: Columns) -> dict[str, Any]:
        """Lengths of the training split."""
        lengths = train["tokens"].lengths
        return {"tokens": int(lengths.sum()), "mean_length": float(lengths.mean()), "longest": int(lengths.max())}

    def lengths(self, columns: Mapping[str, Any]) -> np.ndarray:
        """Tokens of each sample."""
        return columns["tokens"].lengths

    # -- model and optimization ---------------------------------------------------------------------------------------
    @abstractmethod
    def _outputs(self, info: DataInfo) -> tuple[int, dict[int, str] | None]:
        """How many outputs the head has, and the class names by number where they are classes."""

    def build_model(self, hp: TextHyperparameters, info: DataInfo) -> nn.Module:
        """The encoder with a head."""
        assert info.files is not None  # noqa: S101 - `prepare` has put the encoder there
        outputs, names = self._outputs(info)
        model = build(info.files, outputs, names, hp.dropout, hp.attention_dropout, hp.keep_layers)
        pool(model, hp.pooling)
        if hp.freeze_embeddings or hp.freeze_layers:
            freeze(model, True, hp.freeze_layers)
        return model

    def optimizers(self, model: nn.Module, hp: TextHyperparameters) -> Sequence[torch.optim.Optimizer]:
        """AdamW, fused."""
        return [adamw(model, hp.learning_rate, hp.weight_decay)]

    def learning_rate_factor(self, progress: float, hp: TextHyperparameters) -> float:
        """Linear warm-up, then linear decay to zero."""
        return trapezoid(progress, hp.warmup)

    def gradient_clip(self, hp: TextHyperparameters) -> float | None:
        """`clip`."""
        return hp.clip

    # -- one batch ----------------------------------------------------------------------------------------------------
    def micro_batches(self, columns: Mapping[str, Any], rows: Tensor, hp: TextHyperparameters) -> Sequence[Tensor]:
        """Consecutive rows, as many as `micro_batch` and the token budget let through at once."""
        if hp.max_tokens is None or len(rows) == 0:
            return super().micro_batches(columns, rows, hp)
        offsets = columns["tokens"].offsets
        picked = rows.to(offsets.device)
        lengths = (offsets[picked + 1] - offsets[picked]).tolist()
        parts, start, longest = [], 0, 0
        for end, length in enumerate(lengths):
            longest = max(longest, length)
            count = end + 1 - start
            if end > start and (longest * count > hp.max_tokens or count > (hp.micro_batch or count)):
                parts.append(rows[start:end])
                start, longest = end, length
        return [*parts, rows[start:]]

    def batch(self, columns: Mapping[str, Any], rows: Tensor, hp: TextHyperparameters, *, augment: bool) -> Batch:
        """`input_ids`, `attention_mask` (B, L) padded to the longest row, `token_type_ids` of pairs, `label` (B,)."""
        tokens: RaggedTensor = columns["tokens"]
        ids, real = tokens.padded(rows)
        batch = {"input_ids": ids, "attention_mask": real}
        if "types" in columns:
            batch["token_type_ids"] = columns["types"].padded(rows)[0]
        if "label" in columns:
            batch["label"] = columns["label"][rows.to(tokens.device)]
        return batch

    def _logits(self, model: Any, batch: Batch, hp: TextHyperparameters) -> Tensor:
        real, pad = batch["attention_mask"], model.config.pad_token_id or 0
        inputs = {"input_ids": batch["input_ids"].masked_fill(~real, pad)}
        if "token_type_ids" in batch:
            inputs["token_type_ids"] = batch["token_type_ids"]
        if model.pads_left:
            length = real.shape[1]
            turned = (torch.arange(length, device=real.device) + real.sum(1, keepdim=True)) % length
            real, inputs = real.gather(1, turned), {name: rows.gather(1, turned) for name, rows in inputs.items()}
        # Without padding no mask is needed, and attention is faster.
        mask = None if bool(real.all()) else real.long()
        with attending(model, real.device, real.shape[1], self.max_length):
            return logits_of(model, hp.pooling, mask, **inputs)

    # -- serving ------------------------------------------------------------------------------------------------------
    def served_length(self, length: int) -> int:
        """16, 24, 32, 48, 64, … tokens, or the greatest length."""
        return next(each for each in text_serving.lengths(self.max_length) if each >= length)

    def served_batch(self, columns: Mapping[str, Any], rows: Tensor, hp: TextHyperparameters) -> Batch:
        """The rows, and one that nobody asks for."""
        longest = int(columns["tokens"].lengths[rows.cpu().numpy()].max())
        return text_serving.batch(columns, rows, self.served_length(longest))

    def deployable(self, model: Any, hp: TextHyperparameters, info: DataInfo, columns: Columns) -> PythonCode:
        """Texts (or pairs) in; labels and probabilities, or values, out. The tokenizer goes with it."""
        rows = np.arange(min(4, len(columns["text"])))
        example = {name: list(columns[name][rows].texts()) for name in _names(columns)}
        raw = on_device(self.raw_columns(example["text"], example.get("text_pair"), info), _CPU)
        # As the served code does: of a model trained on a GPU, a CPU without bf16 would be asked for it here.
        precision = info.precision if has_native_bf16(_CPU) else "fp32"
        answers = self.answers(served_predictions(self, model.cpu(), raw, hp, precision), info)
        size = served_rows(self, hp)
        how = {"pooling": hp.pooling, "rows": size, "lengths": text_serving.lengths(self.max_length)}
        # Another `build_model` than ours says nothing of the kind, and computes as transformers has it.
        how |= {"rounds_states": getattr(model, "rounds_states", False), "attention": model.config._attn_implementation}
        return text_serving.deployed(model, info, how, example, answers)

    @abstractmethod
    def answers(self, outputs: Mapping[str, Any], info: DataInfo) -> dict[str, Sequence[Any]]:
        """Outputs of `predict` as people read them, by column."""

    def raw_columns(self, texts: Sequence[str], pairs: Sequence[str] | None, info: DataInfo) -> dict[str, Ragged]:
        """The columns of new texts, tokenized as the training split was."""
        assert info.files is not None  # noqa: S101 - `prepare` has put the tokenizer there
        raw = {"text": Ragged.of_texts(texts)} | ({"text_pair": Ragged.of_texts(pairs)} if pairs is not None else {})
        return self.tokenized(tokenizer_of(info.files), raw)[0]


class TextClassification(Classification, TextWorkload):
    """One label of several for each text or pair: `label` int64, facts `class_names`."""

    def _check(self, facts: Mapping[str, Any]) -> None:
        if "class_names" not in facts:
            raise DataError("the labels are real numbers: use TextRegression, or name another label column")

    def _outputs(self, info: DataInfo) -> tuple[int, dict[int, str]]:
        names = info.facts["class_names"]
        return len(names), dict(enumerate(names))

    def loss(self, model: nn.Module, batch: Batch, hp: TextHyperparameters) -> Tensor:
        """Cross-entropy, summed."""
        return F.cross_entropy(
            self._logits(model, batch, hp), batch["label"], reduction="sum", label_smoothing=hp.label_smoothing
        )

    def predict(self, model: nn.Module, batch: Batch, hp: TextHyperparameters) -> dict[str, Tensor]:
        """`logits` (B, classes)."""
        return {"logits": self._logits(model, batch, hp) / getattr(model, "temperature", 1.0)}

    def calibrated(self, model: Any, calibration: Calibration) -> nn.Module:
        """The same model, with the temperature that `predict` divides by."""
        model.temperature = calibration.parameters[TEMPERATURE]  # pooling may pass `forward` by
        return model

    def answers(self, outputs: Mapping[str, Any], info: DataInfo) -> dict[str, Sequence[Any]]:
        """`label`, and `p(<class>)` for each class."""
        names, probabilities = info.facts["class_names"], probabilities_of(np.asarray(outputs["logits"]))
        found: dict[str, Sequence[Any]] = {"label": [names[number] for number in probabilities.argmax(axis=1)]}
        return found | {f"p({name})": probabilities[:, i].tolist() for i, name in enumerate(names)}

    def shown(self, columns: Columns, rows: np.ndarray, captions: Sequence[str], info: DataInfo) -> Table:
        """The texts as a table."""
        return _texts_table("Most confident mistakes", columns, rows, captions)


class TextRegression(Regression, TextWorkload):
    """A number for each text or pair: `label` float64."""

    def _check(self, facts: Mapping[str, Any]) -> None:
        if "class_names" in facts:
            raise DataError("the labels are classes: use TextClassification, or say task='regression' in the source")

    def _outputs(self, info: DataInfo) -> tuple[int, None]:
        return 1, None

    def statistics(self, train: Columns) -> dict[str, Any]:
        """Lengths, and mean and standard deviation of the labels."""
        return super().statistics(train) | TextWorkload.statistics(self, train)

    def build_model(self, hp: TextHyperparameters, info: DataInfo) -> nn.Module:
        """The encoder with a head that knows the labels' scale."""
        model = super().build_model(hp, info)
        for name in ("label_mean", "label_std"):
            model.register_buffer(name, torch.tensor(info.statistics[name], dtype=torch.float32))
        return model

    def _values(self, model: Any, batch: Batch, hp: TextHyperparameters) -> Tensor:
        # Under autocast the head answers in bf16, which knows no number between 200 and 201.
        return self._logits(model, batch, hp)[:, 0].float() * model.label_std + model.label_mean

    def loss(self, model: Any, batch: Batch, hp: TextHyperparameters) -> Tensor:
        """Squared error in standard deviations of the labels, summed."""
        return (((self._values(model, batch, hp) - batch["label"].float()) / model.label_std) ** 2).sum()

    def predict(self, model: nn.Module, batch: Batch, hp: TextHyperparameters) -> dict[str, Tensor]:
        """`value` (B,)."""
        return {"value": self._values(model, batch, hp)}

    def answers(self, outputs: Mapping[str, Any], info: DataInfo) -> dict[str, Sequence[Any]]:
        """`value`."""
        return {"value": np.asarray(outputs["value"], dtype=np.float64).tolist()}

    def shown(self, columns: Columns, rows: np.ndarray, captions: Sequence[str]) -> Table:
        """The texts as a table."""
        return _texts_table("Widest misses", columns, rows, captions)


def _names(columns: Columns) -> list[str]:
    return [name for name in ("text", "text_pair") if name in columns]


def _texts_table(title: str, columns: Columns, rows: np.ndarray, captions: Sequence[str]) -> Table:
    texts = [[text[:_SHOWN_CHARACTERS] for text in columns[name][rows].texts()] for name in _names(columns)]
    return Table(title, ["label → prediction", *_names(columns)], list(zip(captions, *texts, strict=True)))


class DocstringHyperparameters(TextHyperparameters):
    """The recipe for a tiny encoder from scratch."""

    learning_rate: float = Field(default=2e-3, gt=0)
    dropout: float | None = Field(default=0.2, ge=0, lt=1)


docstrings = TextClassification(
    DocstringSource(),
    SplitPlan(0.1, test_fraction=0.15, stratify_by="label", content=("text",), group_by="file"),
    Tiny(layers=1),
    DocstringHyperparameters,
    max_length=64,
)


class _Sst2:
    """SST-2 from the folder in `$MLPIPES_SST2` where it is set, and from the Hugging Face hub otherwise."""

    def load(self) -> Any:
        folder = os.environ.get(SST2_VARIABLE)
        return sst2_source(Path(folder).expanduser() if folder else None).load()


class Sst2Hyperparameters(TextHyperparameters):
    """The usual recipe, for at most 20,000 sentences."""

    # Of 32 sentences, 4 shards cost half of the speed (69 against 135 sentences per CPU-second).
    logical_shards: int | None = Field(default=None, ge=1)


sst2 = TextClassification(
    _Sst2(),
    SplitPlan(0.02, stratify_by="label", content=("text",), train_cap=20_000),
    Pretrained(os.environ.get(SST2_MODEL_VARIABLE, "bert-base-uncased")),
    Sst2Hyperparameters,
)
