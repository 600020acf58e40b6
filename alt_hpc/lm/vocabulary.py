"""A model's vocabulary made longer: rows of the embeddings for new tokens."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alt_hpc.errors import InputError


def resize(model: PreTrainedModel, old: int, new: int, seed: int) -> None:
    """Keep the first `old` rows of embeddings and head, and add `new` ones behind them.

    Each number of a new row is drawn from a normal distribution with mean and spread of its
    dimension over the old rows; a new bias is their mean (so do the authors of Quark, for the
    embeddings). InputError where the model has fewer than `old`.
    """
    rows = len(_weight(model.get_input_embeddings()))
    if rows < old:
        raise InputError(f"a model with embeddings for {rows} tokens cannot keep {old}")
    model.resize_token_embeddings(old, mean_resizing=False)
    model.resize_token_embeddings(old + new, mean_resizing=False)
    source = torch.Generator().manual_seed(seed)
    head: Any = model.get_output_embeddings()
    weights = [_weight(model.get_input_embeddings()), _weight(head)]
    tied = weights[0] is weights[1]
    with torch.no_grad():
        for weight in weights[: 1 if tied else 2]:
            _draw(weight, old, source)
        if getattr(head, "bias", None) is not None:
            head.bias[old:] = head.bias[:old].mean()


def _weight(module: Any) -> Tensor:
    weight: Tensor = module.weight
    return weight


def _draw(weight: Tensor, old: int, source: torch.Generator) -> None:
    known = weight[:old].float()
    noise = torch.randn(weight[old:].shape, generator=source)
    weight[old:] = (known.mean(0) + noise.to(known.device) * known.std(0)).to(weight.dtype)
