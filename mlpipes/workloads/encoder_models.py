"""What an encoder's files become: a model with a fresh head, how it computes, its pooling, what of it is frozen."""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mlpipes.errors import ConfigError, DataError
from mlpipes.workloads.encoders import ENCODER, TOKENIZER, in_a_line, quiet

_ATTENTION_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
_DROPOUTS = (
    *(
        "hidden_dropout_prob",
        "hidden_dropout",
        "dropout",
        "resid_pdrop",
        "embd_pdrop",
        "embedding_dropout",
        "mlp_dropout",
    ),
    *("classifier_dropout", "classifier_dropout_prob", "seq_classif_dropout", "summary_last_dropout", "pooler_dropout"),
)
"""What kinds of encoders call them in their configurations."""
_ONE_A_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "attention_layers",
    "attn_layers",
    "attention_window",
    "no_rope_layers",
)
"""Lists with an entry a layer in configurations, such as ModernBERT's, Reformer's, Longformer's."""
SHORT_TOKENS = 128
"""Up to so many, attention on a CPU is faster where it is written out than in its fused kernel."""
_NORMED = ("bert", "camembert", "distilbert", "electra", "mpnet", "roberta", "xlm-roberta")
"""Kinds whose every sum of states goes through a norm before it is added to again, so that rounding does not add up.

In bf16, on a CPU, the states between their layers are rounded, and what attention multiplies. Autocast would keep the states
in float32, and round them anew for each layer that takes them, which is a tenth of a step of MiniLM.
"""


def build(
    files: Path,
    outputs: int,
    names: Mapping[int, str] | None,
    dropout: float | None,
    attention_dropout: float,
    layers: int | None = None,
) -> Any:
    """The encoder of a snapshot's files with a fresh head of so many outputs; pretrained weights where there are any.

    With `layers`, of so many of its layers from below (Sajjad et al. 2023, On the effect of dropping layers of pre-trained
    transformer models). Raises DataError if the weights are not those of the configuration, ConfigError if there are fewer
    layers, or none can be left out.
    """
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig, AutoModelForSequenceClassification

    folder = files / ENCODER
    labels = {"id2label": dict(names), "label2id": {name: number for number, name in names.items()}} if names else {}
    with quiet():
        config = AutoConfig.from_pretrained(folder, num_labels=outputs, trust_remote_code=False, **labels)
        for names_of_it, value in ((_ATTENTION_DROPOUTS, attention_dropout), (_DROPOUTS, dropout)):
            for field in names_of_it if value is not None else ():
                if hasattr(config, field):
                    setattr(config, field, value)
        if layers is not None:
            keep(config, layers)
        kind: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
        # Not every kind has fused attention.
        options = {"attn_implementation": "sdpa" if kind._supports_sdpa else "eager", "trust_remote_code": False}
        if any(folder.glob("*.safetensors")):
            model, loaded = AutoModelForSequenceClassification.from_pretrained(
                folder, config=config, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
            )
            _check_loaded(model, loaded["missing_keys"])
            model = model.float()
        else:
            model = AutoModelForSequenceClassification.from_config(config, **options)
    settings = files / TOKENIZER / "tokenizer_config.json"
    side = json.loads(settings.read_text(encoding="utf-8")).get("padding_side") if settings.is_file() else None
    model.pads_left = side == "left"
    model.rounds_states = config.model_type in _NORMED
    if model.rounds_states:
        model.base_model.embeddings.register_forward_hook(_rounded)
    return model


def keep(config: Any, layers: int) -> None:
    """Have a configuration be that of an encoder of the first `layers` of its layers.

    Raises ConfigError if it has fewer, or is of a kind of which none can be left out.
    """
    kind, count = config.model_type, getattr(config, "num_hidden_layers", None)
    if count is None or config.is_encoder_decoder or getattr(config, "num_hidden_groups", 1) > 1:
        why = (
            "has a decoder, too" if config.is_encoder_decoder else "does not count its layers, or shares them in groups"
        )
        raise ConfigError(f"keep_layers is {layers}, but an encoder of the kind {kind} {why}; leave it out")
    if layers > count:
        raise ConfigError(f"keep_layers is {layers}, but the encoder has {_layers(count)}")
    if layers == count:
        return
    try:
        config.num_hidden_layers = layers
        for each in _ONE_A_LAYER:
            if isinstance(values := getattr(config, each, None), list) and len(values) == count:
                setattr(config, each, values[:layers])
        type(config).from_dict(config.to_dict())  # what is served is read so
    except Exception as error:
        raise ConfigError(
            f"keep_layers is {layers}, but no layer of an encoder of the kind {kind} can be left out "
            f"({in_a_line(error)}); leave it out"
        ) from error


def _layers(count: int) -> str:
    return f"{count} layer{'s' if count != 1 else ''}"


def _rounded(_module: nn.Module, _arguments: Any, states: Tensor) -> Tensor:
    # As `_rounded` in mlpipes/workloads/served_text_model.py.
    on_cpu = states.device.type == "cpu"
    return states.to(torch.bfloat16) if on_cpu and torch.is_autocast_enabled("cpu") else states


def attending(model: Any, device: torch.device, length: int, longest: int) -> AbstractContextManager[Any]:
    """The context for a forward pass of texts of `length` tokens, where none of the workload's is longer than `longest`.

    Of sentences of 13 tokens, a step takes 1.2 times the CPU-seconds with torch's parts of the fused operation (MATH)
    instead of transformers' own ("eager"), and more with the fused kernel for CPUs. In bf16, "eager" rounds scores and
    probabilities, where MATH does not: so it is for kinds that round their states as well. One way for all texts of a
    workload: the served code, which answers several at once, cannot change it from one to the next.
    """
    on_cpu = device.type == "cpu"
    wanted = "eager" if on_cpu and longest <= SHORT_TOKENS else "sdpa"
    # Some kinds have only one of both.
    switches = getattr(model, "rounds_states", False) and model._supports_sdpa
    if switches and model.config._attn_implementation != wanted and model._can_set_attn_implementation():
        model.set_attn_implementation(wanted)
    return sdpa_kernel(SDPBackend.MATH) if on_cpu and length <= SHORT_TOKENS else nullcontext()


def _check_loaded(model: Any, missing: set[str]) -> None:
    """Raises DataError if most of the encoder is not in the weights: it would be trained from scratch without a word."""
    inner = {n: p.numel() for n, p in model.named_parameters() if n.startswith(f"{model.base_model_prefix}.")}
    if (lost := sum(size for name, size in inner.items() if name in missing)) > sum(inner.values()) / 2:
        share = lost / sum(inner.values())
        raise DataError(
            f"{share:.0%} of the encoder's parameters ({type(model.base_model).__name__}) are not in its weights "
            f"({', '.join(sorted(missing)[:2])}, …): the weights belong to another configuration"
        )


Pooling = Literal["own", "mean"]
"""What of an encoder's output its head sees: what its kind has by default (the first token, mostly), or the mean."""


def pool(model: Any, pooling: Pooling) -> None:
    """Prepare a model for `logits_of` with this pooling."""
    if pooling == "mean" and _is_plain(model):
        for unused in ("pooler", "pre_classifier"):
            if (module := getattr(model.base_model, unused, getattr(model, unused, None))) is not None:
                module.requires_grad_(False)


def _is_plain(model: Any) -> bool:
    """Whether the head is one linear layer, and what comes before it is the pooling."""
    return isinstance(getattr(model, "classifier", None), nn.Linear) and hasattr(model, "dropout")


def logits_of(model: Any, pooling: Pooling, mask: Tensor | None, **inputs: Tensor) -> Tensor:
    """The head's outputs (B, outputs) float32 for token ids (B, L), of which `mask` (B, L) says which are real."""
    if pooling == "own":
        return model(attention_mask=mask, **inputs).logits.float()
    if _is_plain(model):
        hidden = model.base_model(attention_mask=mask, **inputs).last_hidden_state.float()
        return model.classifier(model.dropout(mean_of_tokens(model, hidden, mask))).float()

    def averaged(module: nn.Module, arguments: Any, output: Any) -> Any:
        # Whichever token's state the head takes, it takes the mean of all.
        hidden = output[0].float()
        output["last_hidden_state"] = mean_of_tokens(model, hidden, mask).unsqueeze(1).expand_as(hidden)
        return output

    handle = model.base_model.register_forward_hook(averaged)
    try:
        return model(attention_mask=mask, **inputs).logits.float()
    finally:
        handle.remove()


def mean_of_tokens(model: Any, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The mean (B, H) of the real tokens' states (B, S, H). Raises ConfigError if it is not known which those are."""
    if mask is None:
        weights = torch.ones_like(hidden[:, :, :1])
    else:
        weights = mask.unsqueeze(-1).float()
        if mask.shape[1] != hidden.shape[1]:  # the Funnel Transformer pools neighbours, and its masks with them
            structure = getattr(getattr(model.base_model, "encoder", None), "attention_structure", None)
            if structure is None:
                raise ConfigError(f"pooling 'mean' does not know which states of {type(model).__name__} are padding")
            while weights.shape[1] > hidden.shape[1]:
                weights = structure.pool_tensor(weights, mode="min")
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def freeze(model: Any, embeddings: bool, layers: int) -> None:
    """Exclude the embeddings and the first layers of an encoder from training, in place.

    Nothing is propagated back through what lies below the first layer that is trained. Raises ConfigError if the encoder
    has fewer layers.
    """
    base, count = model.base_model, getattr(model.config, "num_hidden_layers", 0)
    if layers > count:
        raise ConfigError(f"freeze_layers is {layers}, but the encoder has {_layers(count)}")
    frozen: list[nn.Module] = []
    if embeddings:
        own = getattr(base, "embeddings", None)
        frozen = [m for m in base.children() if isinstance(m, nn.Embedding)] if own is None else [own]
    if layers:
        # Its name differs from architecture to architecture, its length does not; some have blocks of layers.
        lists = ((name, m) for name, m in base.named_modules() if isinstance(m, nn.ModuleList))
        flat = [
            (name, [one for m in some for one in (m if isinstance(m, nn.ModuleList) else [m])]) for name, some in lists
        ]
        alike = {name: found for name, found in flat if len(found) == count}
        # CANINE's encoders of characters may have as many.
        stack = next((found for name, found in alike.items() if name.startswith("encoder.")), None)
        stack = stack or next(iter(alike.values()), None)
        if stack is None:
            raise ConfigError(f"freeze_layers is {layers}, but the layers of {type(base).__name__} share their weights")
        frozen += stack[:layers]
    for module in frozen:
        module.requires_grad_(False)


def positions_of(model: Any) -> int | None:
    """The longest sequence that an encoder takes, tokens; None: there is no limit."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    # Encoders of RoBERTa's kind count positions from behind the padding's.
    offsets = (
        module.padding_idx + 1
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.Embedding) and "position" in name and module.padding_idx is not None
    )
    return limit - max(offsets, default=0)
