"""Check models without loading them: every weight there, whole and finite; what can be decoded."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.conversion_mapping import get_model_conversion_mapping

from alt_hpc.errors import InputError
from alt_hpc.lm import load, prefix
from alt_hpc.lm.fetch import weight_files


def weights(folder: Path) -> None:
    """Raise InputError unless every weight of the architecture is there, whole and finite."""
    shape, files = load.config(folder), weight_files(folder)
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for file in files:
        for name, tensor in sorted(load.tensors(file).items()):
            found[name] = (file, tuple(tensor.shape))
            finite(file, name, tensor)
    kind = (getattr(shape, "architectures", None) or [""])[0]
    classifies = kind.endswith("ForSequenceClassification")
    auto: Any = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    model = load.empty(shape, auto)
    if get_model_conversion_mapping(model, add_legacy=False):
        return  # the file's names differ from the model's: loading compares them
    for name, expected in load.shapes(model).items():
        # The prefix of the base model may be absent: `gpt2` on the hub has no `transformer.`
        key = name if name in found else name.removeprefix(model.base_model_prefix + ".")
        if key not in found:
            raise InputError(f"{files[0]}: the weight {name} is missing")
        file, given = found[key]
        if given != expected:
            raise InputError(f"{file}: the weight {name} has shape {given}, expected {expected}")


def finite(file: Path, name: str, tensor: torch.Tensor) -> None:
    """Raise InputError where a weight of a file is not finite."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{file}: the weight {name} is not finite everywhere")


def decodable(folder: Path) -> None:
    """Raise InputError where a folder's model keeps what answers to a prompt cannot share."""
    # Asked of a model without memory. Mamba, LFM2 and others keep states of another kind than keys
    # and values; what cannot even be tried so is refused too.
    model = load.empty(load.config(folder), AutoModelForCausalLM, "bfloat16")
    name, ids = type(model).__name__, torch.zeros(1, 4, dtype=torch.long, device="meta")
    with load.refusing(f"{name}: cannot be tried before it is used"), torch.no_grad():
        kept = prefix.cache_of(model(input_ids=ids, use_cache=True))
    if found := prefix.strange(kept):
        raise InputError(f"{name}: keeps {found} that answers cannot share")
