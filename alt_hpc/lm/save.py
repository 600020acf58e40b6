"""Save ordinary Hugging Face folders; the same input gives the same bytes."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from alt_hpc.lm import load
from alt_hpc.lm.tokens import Tokenizer


def policy(
    folder: Path,
    shape: PretrainedConfig,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    dtype: str,
    card: str,  # the text of README.md
    ends: Sequence[int],  # token ids that end a generation
    silent: Sequence[int] = (),  # those that are never generated
) -> None:
    """Write a causal language model, stored as `dtype`; InputError as `load.assembled`."""
    shape = type(shape).from_dict(shape.to_dict())
    model = load.assembled(transformers.AutoModelForCausalLM, shape, weights, dtype, folder)
    pad = tokenizer.pad_token_id
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else list(ends),
        pad_token_id=ends[0] if pad is None and ends else pad,
        suppress_tokens=list(silent) or None,
    )
    whole(folder, model, tokenizer, card)


def whole(folder: Path, model: PreTrainedModel, tokenizer: Tokenizer, card: str) -> None:
    """Write model, tokenizer and model card."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    for file in folder.glob("*.safetensors"):  # safetensors writes them for the owner alone
        shutil.copymode(folder / "README.md", file)
