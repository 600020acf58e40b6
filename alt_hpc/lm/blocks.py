"""The transformer blocks of a model, and which of them are trained."""

from typing import Any

from torch import nn

from alt_hpc.errors import InputError
from alt_hpc.lm import sizes


def blocks(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The module that holds a model's transformer blocks (and its embeddings), and those blocks."""
    base: Any = model.base_model
    count = getattr(model.config, "num_hidden_layers", None)
    for module in base.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return module, child
    raise InputError(f"{type(model).__name__}: cannot find its {count} transformer blocks")


def train_top(model: nn.Module, share: float, embeddings: bool) -> None:
    """Have of L blocks only the top max(1, floor(share * L)) trained.

    The final norm and an untied head are. The input embeddings (with what is tied to them: the
    head) only with `embeddings`. InputError where the blocks are not found.
    """
    trunk, layers = blocks(model)
    trained = sizes.top(len(layers), share)
    model.requires_grad_(True)
    layers[: len(layers) - trained].requires_grad_(False)
    for name, child in trunk.named_children():
        # By name too: BLOOM has a norm, OPT projections that belong to the embeddings.
        if not embeddings and (isinstance(child, nn.Embedding) or "embed" in name):
            child.requires_grad_(False)
