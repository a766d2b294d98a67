"""The deployed text model: texts (or pairs) in, labels with probabilities, or values, out. Read by MLflow as code.

MLflow copies this file beside the weights and runs it where the model is served, so it imports nothing of mlpipes.
"""

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow.pyfunc import PythonModel, PythonModelContext

BATCH = 64


class TextModel(PythonModel):
    """A fine-tuned encoder with its tokenizer."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read weights (safetensors) and tokenizer; no code that comes with them is run."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        folder = context.artifacts["model"]
        options = {"local_files_only": True, "trust_remote_code": False}
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True, **options).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, **options)

    @torch.no_grad()
    def predict(self, context, model_input: pd.DataFrame, params=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Columns `text` (and `text_pair`) in; `label` and one column of probabilities a class, or `value`, out."""
        # No other hints, because MLflow would take them for a schema of its own.
        config, outputs = self.model.config, []
        for start in range(0, len(model_input), BATCH):
            part = model_input.iloc[start : start + BATCH]
            texts = [part[name].tolist() for name in ("text", "text_pair") if name in part]
            length = config.mlpipes["max_length"]
            inputs = self.tokenizer(*texts, truncation=True, max_length=length, padding=True, return_tensors="pt")
            outputs.append(self._logits(inputs).double().numpy())
        found = np.concatenate(outputs)
        if config.num_labels == 1:
            return pd.DataFrame({"value": found[:, 0] * config.mlpipes["label_std"] + config.mlpipes["label_mean"]})
        found /= config.mlpipes.get("temperature", 1.0)
        probabilities = np.exp(found - found.max(axis=1, keepdims=True))
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        names = [config.id2label[number] for number in range(config.num_labels)]
        labels = [names[number] for number in probabilities.argmax(axis=1)]
        return pd.DataFrame({"label": labels} | {f"p({n})": probabilities[:, i] for i, n in enumerate(names)})

    def _logits(self, inputs):
        # As `logits_of` in mlpipes/workloads/encoder_models.py.
        model, mask = self.model, inputs["attention_mask"]
        if model.config.mlpipes["pooling"] == "own":
            return model(**inputs).logits
        if isinstance(getattr(model, "classifier", None), torch.nn.Linear) and hasattr(model, "dropout"):
            return model.classifier(_mean_of_tokens(model, model.base_model(**inputs).last_hidden_state, mask))

        def averaged(module, arguments, output):
            output["last_hidden_state"] = _mean_of_tokens(model, output[0], mask).unsqueeze(1).expand_as(output[0])
            return output

        handle = model.base_model.register_forward_hook(averaged)
        try:
            return model(**inputs).logits
        finally:
            handle.remove()


def _mean_of_tokens(model, hidden, mask):
    weights = mask.unsqueeze(-1).float()
    while weights.shape[1] > hidden.shape[1]:
        weights = model.base_model.encoder.attention_structure.pool_tensor(weights, mode="min")
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


mlflow.models.set_model(TextModel())
