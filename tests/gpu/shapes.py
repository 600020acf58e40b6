"""The models of the GPU's check: real shapes, random weights, made where they are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
import transformers as tf

from alt_hpc.lm import load

SHAPES: dict[str, dict[str, Any]] = {
    "135M": {  # SmolLM2's
        **{"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
        **{"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152},
    },
    "1.2B": {
        **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    },
    "3.2B": {
        **{"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28},
        **{"num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 128256},
    },
    "30M": {  # of the tests' run: above what a process has without a model
        **{"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8},
        **{"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 12000},
    },
    "tiny": {
        **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512},
    },
}


def config(shape: str) -> tf.PretrainedConfig:
    ends = {"bos_token_id": tiny.EOS, "eos_token_id": tiny.EOS, "pad_token_id": None}
    its = {"max_position_embeddings": 2048, "tie_word_embeddings": True, **SHAPES[shape], **ends}
    return tf.LlamaConfig(**its)


def model(shape: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A random causal language model on a device, not to be trained."""
    torch.manual_seed(0)
    with torch.device(device):
        made = tf.AutoModelForCausalLM.from_config(config(shape), dtype=dtype)
    return load.ready(made, device)


def folder(place: Path, shape: str, device: torch.device) -> Path:
    """Its Hugging Face folder, with the tests' tokenizer of bytes."""
    model(shape, torch.float32, device).cpu().save_pretrained(place)
    tiny.tokenizer().save_pretrained(place)
    return place
