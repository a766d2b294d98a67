"""Small random encoders of many kinds, with tokenizers of each sort, as tests make them."""

import random
import shutil
from pathlib import Path
from typing import Any

import torch

from mlpipes.workloads.encoders import wordpiece_tokenizer

WORDS = ("a", "film", "of", "no", "great", "story", "but", "with", "some", "wonderful", "clumsy", "minutes", "in", "it")
BASE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
GROUPS = ("q", "k", "v", "post_attention", "intermediate", "output")
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("wordpiece", BASE),
    "electra": ("wordpiece", {**BASE, "embedding_size": 16}),
    "albert": ("sentencepiece", {**BASE, "embedding_size": 16}),
    "distilbert": (
        "wordpiece",
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 64},
    ),
    "deberta": (
        "wordpiece",
        {**BASE, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0},
    ),
    "deberta-v2": (
        "sentencepiece",
        {**BASE, "relative_attention": True, "type_vocab_size": 0, "pooler_hidden_size": 16},
    ),
    "convbert": ("wordpiece", {**BASE, "embedding_size": 16, "head_ratio": 1, "conv_kernel_size": 3}),
    "squeezebert": (
        "wordpiece",
        {**BASE, "embedding_size": 16} | {f"{n}_groups": 1 for n in GROUPS},
    ),
    "funnel": ("wordpiece", {"block_sizes": [1, 1], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32}),
    "fnet": (
        "wordpiece",
        {
            **{name: BASE[name] for name in BASE if name != "num_attention_heads"},
            "tpu_short_seq_length": 64,
            "type_vocab_size": 2,
        },
    ),
    "modernbert": ("wordpiece", {**BASE, "cls_token_id": 2, "sep_token_id": 3}),
    "roberta": ("bytes", {**BASE, "max_position_embeddings": 66, "type_vocab_size": 1}),
    "mpnet": ("bytes", {**BASE, "max_position_embeddings": 66}),
    "longformer": ("bytes", {**BASE, "max_position_embeddings": 66, "attention_window": 8, "type_vocab_size": 1}),
    "gpt2": ("end", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "xlnet": ("sentencepiece", {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32}),
    "bart": (
        "bytes",
        {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64}
        | {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
        | {f"{part}_ffn_dim": 32 for part in ("encoder", "decoder")},
    ),
}
START, PAD, END, UNKNOWN = "<s>", "<pad>", "</s>", "<unk>"


def texts(count: int = 60) -> list[str]:
    chance = random.Random(0)  # noqa: S311 - not for secrets
    return [" ".join(chance.choices(WORDS, k=chance.randint(2, 20))) + f" {n}" for n in range(count)]


def tokenizers_in(root: Path) -> dict[str, Path]:
    """Folders, in an empty one, with the files of a tokenizer of each sort, as they are published."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    wordpiece_tokenizer(texts(), 200).save_pretrained(root / "wordpiece")
    learner = Tokenizer(models.BPE(unk_token=UNKNOWN))
    learner.pre_tokenizer, learner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = [START, PAD, END, UNKNOWN]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(
        texts(),
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    PreTrainedTokenizerFast(tokenizer_object=learner, eos_token=END, bos_token=END, unk_token=END).save_pretrained(
        root / "end"
    )
    learner.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {"bos_token": START, "cls_token": START, "eos_token": END, "sep_token": END, "pad_token": PAD}
    PreTrainedTokenizerFast(tokenizer_object=learner, unk_token=UNKNOWN, **names).save_pretrained(root / "bytes")
    return {path.name: path for path in root.iterdir()} | {"sentencepiece": sentencepiece_in(root / "sentencepiece")}


def sentencepiece_in(folder: Path) -> Path:
    """Only a vocabulary of sentencepiece's, under the names that ALBERT, XLNet (spiece) and DeBERTa (spm) give it."""
    import sentencepiece

    folder.mkdir()
    trainer: Any = sentencepiece.SentencePieceTrainer
    trainer.train(
        sentence_iterator=iter(texts()),
        model_prefix=str(folder / "spiece"),
        vocab_size=60,
        hard_vocab_limit=False,
        user_defined_symbols="[CLS],[SEP],[MASK],<cls>,<sep>",
        pad_id=3,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    shutil.copy(folder / "spiece.model", folder / "spm.model")
    return folder


def model_in(folder: Path, kind: str, tokenizers: dict[str, Path], **changes: Any) -> Path:
    """A folder with a small random model of a kind with a head for three classes, and its tokenizer."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    sort, sizes = KINDS[kind]
    shutil.copytree(tokenizers[sort], folder)
    config = AutoConfig.for_model(kind, **{"vocab_size": 1000, "num_labels": 3, **sizes, **changes})
    if sort == "bytes":
        config.update({"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2})
    config.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if sort != "bytes" and kind != "gpt2":
        config.pad_token_id = tokenizer.pad_token_id
    if "vocab_size" not in changes:
        config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:  # an untrained encoder says much the same of any text
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder
