"""Tiny random models and a byte-level tokenizer for the tests: no download, no training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

EOS = 256  # of `tokenizer`
VOCABULARY = 257

_ROTARY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}
_GROUPED: dict[str, Any] = {**_ROTARY, "num_key_value_heads": 2}
_GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 1024}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "tied": ("LlamaConfig", {**_GROUPED, "tie_word_embeddings": True}),
    "gptj": ("GPTJConfig", {**_GPT, "rotary_dim": 4}),
    "gpt_neox": ("GPTNeoXConfig", _ROTARY),
    "gpt2": ("GPT2Config", _GPT),
    "mistral": ("MistralConfig", {**_GROUPED, "sliding_window": None}),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 8}),
    "sliding": ("MistralConfig", {**_GROUPED, "sliding_window": 8}),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
}


def config(name: str) -> tf.PretrainedConfig:
    """The config of a tiny model of this architecture."""
    kind, sizes = _CONFIGS[name]
    ends = {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": None}
    made: tf.PretrainedConfig = getattr(tf, kind)(vocab_size=VOCABULARY, **ends, **sizes)
    return made


def model(name: str, auto: Any = tf.AutoModelForCausalLM, **changes: Any) -> Any:
    """A tiny random model; its weights are large enough to make peaked distributions."""
    torch.manual_seed(7)
    settings = config(name)
    for key, value in changes.items():
        setattr(settings, key, value)
    made = auto.from_config(settings).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(4.0 if weight.dim() > 1 else 1.0)
    return made


def tokenizer() -> tf.PreTrainedTokenizerBase:
    """One token per byte, and `<|endoftext|>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)}
    made = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>")


def folder(path: Path, name: str, auto: Any = tf.AutoModelForCausalLM, **changes: Any) -> Path:
    """A tiny model's folder with weights and tokenizer."""
    model(name, auto, **changes).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path
