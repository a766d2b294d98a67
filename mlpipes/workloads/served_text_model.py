"""The deployed text model: texts (or pairs) in, labels with probabilities, or values, out. Read by MLflow as code.

MLflow copies this file beside the weights and runs it where the model is served, so it imports nothing of mlpipes. It
computes as the evaluation did: on one thread, in batches of one size and few lengths, so that an answer depends on its own
text alone, in its last bit.
"""

import contextlib

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow.pyfunc import PythonModel, PythonModelContext
from torch.nn.attention import SDPBackend, sdpa_kernel

SHORT_TOKENS = 128


class TextModel(PythonModel):
    """A fine-tuned encoder with its tokenizer."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read weights (safetensors) and tokenizer; no code that comes with them is run."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        folder = context.artifacts["model"]
        options = {"local_files_only": True, "trust_remote_code": False}
        model = AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True, **options).eval()
        # As `attending` and `build` in mlpipes/workloads/encoder_models.py.
        if model.config._attn_implementation != model.config.mlpipes["attention"]:
            model.set_attn_implementation(model.config.mlpipes["attention"])
        if model.config.mlpipes["rounds_states"]:
            model.base_model.embeddings.register_forward_hook(_rounded)
        self.model = model
        self.tokenizer = AutoTokenizer.from_pretrained(folder, **options)

    @torch.no_grad()
    def predict(self, context, model_input: pd.DataFrame, params=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Columns `text` (and `text_pair`) in; `label` and one column of probabilities a class, or `value`, out."""
        # No other hints, because MLflow would take them for a schema of its own.
        texts = [model_input[name].tolist() for name in ("text", "text_pair") if name in model_input]
        config, threads = self.model.config, torch.get_num_threads()
        torch.set_num_threads(1)  # other numbers of them give other bits
        try:
            # Where the CPU does not have it, fp32 is many times faster, and equal but for rounding.
            bf16 = config.mlpipes["precision"] == "bf16" and _has_native_bf16()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                found = self._in_batches(texts)
        finally:
            torch.set_num_threads(threads)
        if config.num_labels == 1:
            spread, mean = (torch.tensor(config.mlpipes[name]) for name in ("label_std", "label_mean"))
            return pd.DataFrame({"value": (found[:, 0] * spread + mean).double().numpy()})
        logits = (found / config.mlpipes.get("temperature", 1.0)).double().numpy()
        probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        names = [config.id2label[number] for number in range(config.num_labels)]
        labels = [names[number] for number in probabilities.argmax(axis=1)]
        return pd.DataFrame({"label": labels} | {f"p({n})": probabilities[:, i] for i, n in enumerate(names)})

    def _in_batches(self, texts):
        """The head's outputs (N, outputs) float32."""
        how = self.model.config.mlpipes
        lengths, rows = how["lengths"], how["rows"]
        tokens = self.tokenizer(*texts, truncation=True, max_length=lengths[-1])
        padded = np.array([next(n for n in lengths if n >= len(ids)) for ids in tokens["input_ids"]], dtype=np.int64)
        found = torch.empty(len(padded), self.model.config.num_labels)
        for length in np.unique(padded):
            numbers = np.flatnonzero(padded == length)
            for start in range(0, len(numbers), rows):
                part = numbers[start : start + rows]
                found[part] = self._logits(self._batch(tokens, part, rows, int(length)))[: len(part)]
        return found

    def _batch(self, tokens, numbers, rows, length):
        """As `batch` in mlpipes/workloads/text_serving.py: filled up with the first row, and one more that has padding."""
        filled = [*numbers, *[numbers[0]] * (rows - len(numbers))]
        parts = {name: [list(tokens[name][number]) for number in filled] for name in tokens if name != "attention_mask"}
        for values in parts.values():
            first = values[0]
            values.append(first[:1] + first[2:] if len(first) == length > 1 else first)
        parts["attention_mask"] = [[1] * len(ids) for ids in parts["input_ids"]]
        left = self.tokenizer.padding_side == "left"
        fill = {"input_ids": self.model.config.pad_token_id or 0}
        inputs = {}
        for name, several in parts.items():
            made = torch.full((len(several), length), fill.get(name, 0))
            for row, values in enumerate(several):
                made[row, slice(length - len(values), None) if left else slice(len(values))] = torch.tensor(values)
            inputs[name] = made
        return inputs

    def _logits(self, inputs):
        # As `attending` in mlpipes/workloads/encoder_models.py.
        short = inputs["input_ids"].shape[1] <= SHORT_TOKENS
        with sdpa_kernel(SDPBackend.MATH) if short else contextlib.nullcontext():
            return self._pooled(inputs).float()

    def _pooled(self, inputs):
        # As `logits_of` in mlpipes/workloads/encoder_models.py.
        model, mask = self.model, inputs["attention_mask"]
        if model.config.mlpipes["pooling"] == "own":
            return model(**inputs).logits
        if isinstance(getattr(model, "classifier", None), torch.nn.Linear) and hasattr(model, "dropout"):
            hidden = model.base_model(**inputs).last_hidden_state.float()
            return model.classifier(_mean_of_tokens(model, hidden, mask))

        def averaged(module, arguments, output):
            output["last_hidden_state"] = _mean_of_tokens(model, output[0], mask).unsqueeze(1).expand_as(output[0])
            return output

        handle = model.base_model.register_forward_hook(averaged)
        try:
            return model(**inputs).logits
        finally:
            handle.remove()


def _rounded(module, arguments, states):
    return states.to(torch.bfloat16) if torch.is_autocast_enabled("cpu") else states


def _has_native_bf16():
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _mean_of_tokens(model, hidden, mask):
    weights = mask.unsqueeze(-1).float()
    while weights.shape[1] > hidden.shape[1]:
        weights = model.base_model.encoder.attention_structure.pool_tensor(weights, mode="min")
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


mlflow.models.set_model(TextModel())
