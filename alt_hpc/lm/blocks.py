"""The transformer blocks of a model, and which of them are trained."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from alt_hpc.errors import InputError


def blocks(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The module that holds a model's transformer blocks (and its embeddings), and those blocks.

    InputError where there is no list of `num_hidden_layers` blocks.
    """
    base: Any = model.base_model
    count = getattr(model.config, "num_hidden_layers", None)
    for module in base.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return module, child
    raise InputError(f"{type(model).__name__}: cannot find its {count} transformer blocks")


def train_top(model: nn.Module, share: float, embeddings: bool) -> None:
    """Have only the top share of a transformer's blocks trained.

    Of L blocks the lowest L - max(1, floor(share * L)) are not; the final norm and an untied head
    are. The input embeddings (with what is tied to them: the head) only with `embeddings`.
    InputError as `blocks`.
    """
    trunk, layers = blocks(model)
    trained = max(1, math.floor(share * len(layers) + 1e-9))  # 0.29 * 100 is 28.999...
    model.requires_grad_(True)
    for block in list(layers)[: len(layers) - trained]:
        block.requires_grad_(False)
    for name, child in trunk.named_children():
        # By name too: BLOOM has a norm, OPT projections that belong to the embeddings.
        if not embeddings and (isinstance(child, nn.Embedding) or "embed" in name):
            child.requires_grad_(False)
