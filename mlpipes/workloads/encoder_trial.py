"""An encoder tried with its tokenizer before anything starts, and the tokenizer fitted to what the encoder can do."""

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlpipes.data.ragged import Ragged
from mlpipes.errors import DataError, UserError
from mlpipes.workloads.encoder_models import Pooling, build, logits_of, positions_of
from mlpipes.workloads.encoders import ENCODER, TOKENIZER, in_a_line

MOST_UNKNOWN = 0.3
"""Share of unknown tokens from which on texts are refused: an encoder sees nothing of them."""
_NOISE = 1e-5
"""Differences of outputs that rounding makes."""
_LOOKS = 1e-3
"""Difference, relative to the outputs, from which on an encoder does look at padding. Those that do are far above it."""


class Trial:
    """The encoder and tokenizer in a folder of a snapshot's files to be. Random numbers stay as they were."""

    def __init__(self, name: str, files: Path, tokenizer: Any, outputs: int) -> None:
        """Raises DataError if they do not load or do not fit each other."""
        self.name, self.files, self.tokenizer = name, files, tokenizer
        self.warnings: list[str] = []
        with self._told("does not load"), torch.random.fork_rng(devices=[]):
            self.model = build(files, outputs, None, dropout=None, attention_dropout=0.0).eval()
        try:
            rows = self.model.get_input_embeddings().num_embeddings
        except (NotImplementedError, AttributeError):  # it looks characters up by their hashes, as CANINE does
            return
        if (greatest := max(tokenizer.get_vocab().values())) >= rows:
            raise DataError(
                f"{name}: its tokenizer has ids up to {greatest}, but its embeddings end at {rows - 1}. Take the tokenizer "
                "that belongs to the weights, or call `resize_token_embeddings(len(tokenizer))` and save both"
            )

    @property
    def positions(self) -> int | None:
        """The longest sequence that it takes, tokens; None: there is no limit."""
        return positions_of(self.model)

    def settle(self, texts: Sequence[str]) -> None:
        """Give the tokenizer what it lacks, or must do otherwise, for this encoder, and save both if that is anything.

        That is a token to pad with, the side to pad on, and no token types where the encoder makes nothing of them. So
        what is served, which has only the two of them, pads as in training.
        """
        settings: dict[str, Any] = {}
        if (pad := self._pad_token()) is not None:
            settings["pad_token"] = self.tokenizer.pad_token = pad
        self._settle_pad_id()
        some = [ids for ids in self.tokenizer(list(texts[:8]))["input_ids"] if ids]
        if some:
            with self._told("does not read its tokenizer's tokens"):
                if "token_type_ids" in self.tokenizer.model_input_names and not self._reads_types(some):
                    names = [name for name in self.tokenizer.model_input_names if name != "token_type_ids"]
                    settings["model_input_names"] = self.tokenizer.model_input_names = names
                side = self._padding_side(some)
                if side != self.tokenizer.padding_side or side == "left":  # written down, not some class's own way
                    settings["padding_side"] = self.tokenizer.padding_side = side
                self.model.pads_left = side == "left"
        if settings:
            self.tokenizer.init_kwargs.update(settings)
            self.tokenizer.save_pretrained(self.files / TOKENIZER)

    def check_known(self, tokens: Ragged) -> None:
        """Raises DataError if the tokenizer knows too few of the tokens."""
        unknown = self.tokenizer.unk_token_id
        special = [number for number in self.tokenizer.all_special_ids if number != unknown]
        if unknown is None or unknown in special:
            return
        counted = ~np.isin(tokens.values, special)
        share = float((tokens.values[counted] == unknown).mean()) if counted.any() else 0.0
        if share > MOST_UNKNOWN:
            raise DataError(
                f"{self.name}: its tokenizer knows {1 - share:.0%} of the training texts' words, the others are all the "
                "same to it. Take an encoder for the language and the writing of the texts"
            )

    def run(self, logits: Callable[[Any], Tensor]) -> None:
        """Forward and backward of some rows, by the workload's own code. Raises DataError with the cause in a line."""
        self.model.train()
        with self._told("cannot be trained on the longest text"), torch.random.fork_rng(devices=[]):
            found = logits(self.model)
            found.float().sum().backward()
            finite = bool(found.isfinite().all())
        self.model.zero_grad(set_to_none=True)
        if not finite:
            raise DataError(f"{self.name}: its outputs are not finite; its weights are broken")

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            raise type(error)(f"{self.name}: {error}") from error
        except Exception as error:
            raise DataError(f"{self.name} {what}: {in_a_line(error)}") from error

    def _pad_token(self) -> str | None:
        tokenizer = self.tokenizer
        if tokenizer.pad_token is not None:
            return None
        for token in (tokenizer.eos_token, tokenizer.sep_token, tokenizer.unk_token, tokenizer.bos_token):
            if token is not None:
                return str(token)
        raise DataError(f"{self.name}: its tokenizer has no token to pad with; set its `pad_token` and save it")

    def _settle_pad_id(self) -> None:
        """The configuration's padding is the tokenizer's: some encoders find the end of a text by it."""
        pad, config = self.tokenizer.pad_token_id, self.model.config
        offset = (self.positions or 0) != (getattr(config, "max_position_embeddings", 0) or 0)
        if config.pad_token_id == pad or (offset and config.pad_token_id is not None):
            return  # where positions are counted from the padding's id, that id is the weights'
        config.pad_token_id = pad
        path = self.files / ENCODER / "config.json"
        changed = json.loads(path.read_text(encoding="utf-8")) | {"pad_token_id": pad}
        path.unlink()  # it may be a link to the user's
        path.write_text(json.dumps(changed, indent=2, sort_keys=True), encoding="utf-8")

    def _reads_types(self, some: list[list[int]]) -> bool:
        """Whether the encoder tells two texts apart by types, and takes a single one's as their absence."""
        if "token_type_ids" not in inspect.signature(self.model.forward).parameters:
            return False
        if (getattr(self.model.config, "type_vocab_size", None) or 2) < 2:
            return False
        ids = torch.tensor([min(some, key=len)])
        return self._distance(self._logits(ids), self._logits(ids, token_type_ids=torch.zeros_like(ids))) <= _NOISE

    def _padding_side(self, some: list[list[int]]) -> str:
        """Where padding says least: on the right, but for encoders whose head takes the last token as it comes."""
        ids, room = min(some, key=len), max(map(len, some))
        if self.positions is not None:
            room = self.positions - len(ids)
        counts = {count for count in (1, 5, max(map(len, some)) - len(ids)) if 0 < count <= room}
        apart = {side: self._moved_by_padding(ids, counts, side) for side in ("right", "left")}
        side = "left" if apart["right"] > _NOISE and apart["left"] * 10 < apart["right"] else "right"
        moved = apart[side]
        with suppress(Exception):  # some cannot have the other pooling, which is an error only where it is asked for
            moved = max(moved, self._moved_by_padding(ids, counts, side, "mean"))
        if moved > _LOOKS:
            self.warnings.append(
                # Without its name, which may be a folder's: this is part of the snapshot's digest.
                "the encoder looks past the end of a text into its padding, whatever the mask says: its answers depend on "
                "the longest text beside it. Trainings stay exact; single answers differ from the evaluation's."
            )
        return side

    def _moved_by_padding(self, ids: list[int], counts: Iterable[int], side: str, pooling: Pooling = "own") -> float:
        """The greatest difference that padding of some lengths makes to the answer to a text."""
        alone, greatest = self._logits(torch.tensor([ids]), pooling=pooling), 0.0
        for count in counts:
            filler, real, none = [self.tokenizer.pad_token_id] * count, [1] * len(ids), [0] * count
            padded, mask = (ids + filler, real + none) if side == "right" else (filler + ids, none + real)
            found = self._logits(torch.tensor([padded]), torch.tensor([mask]), pooling)
            greatest = max(greatest, self._distance(alone, found))
        return greatest

    @torch.no_grad()
    def _logits(self, ids: Tensor, mask: Tensor | None = None, pooling: Pooling = "own", **inputs: Tensor) -> Tensor:
        return logits_of(self.model, pooling, torch.ones_like(ids) if mask is None else mask, input_ids=ids, **inputs)

    @staticmethod
    def _distance(first: Tensor, second: Tensor) -> float:
        return float((first - second).abs().max() / first.abs().max().clamp(min=1e-12))
