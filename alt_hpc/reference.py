"""The KL term's reference policy without its frozen trunk: that is the policy's, computed once."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from alt_hpc.trainer import blocks

log = logging.getLogger(__name__)


def share_trunk(policy: nn.Module, reference: nn.Module) -> int:
    """Let the reference go on from the policy's states below its lowest trained block.

    The policy must be run first, on the same tokens (`losses.alt_loss` does). The reference then
    computes its top blocks only, and the weights of the others are freed.

    Parameters
    ----------
    policy
        As `trainer.freeze` left it, not yet in DeepSpeed's hands.
    reference
        A model of the same architecture, in any floating dtype.

    Returns
    -------
    How many blocks the reference no longer computes: 0, with a line in the log, where the trunks
    differ (embeddings or low blocks are or were trained) or the policy drops out activations.
    """
    (trunk, ours), (other, theirs) = blocks(policy), blocks(reference)
    shared = _frozen(ours)
    why = _why_not(trunk, other, shared)
    if why:
        log.warning("the reference policy is computed whole: %s", why)
        return 0
    states: dict[str, Any] = {}
    shared[-1].register_forward_hook(lambda module, args, output: states.update(now=output))
    for block in list(theirs)[: len(shared)]:
        block.to("meta")
        block.forward = lambda *args, **kwargs: states["now"]  # tensor or tuple, as blocks return
    return len(shared)


def _frozen(layers: nn.ModuleList) -> list[nn.Module]:
    """The lowest blocks, up to the first that is trained."""
    found: list[nn.Module] = []
    for block in layers:
        if any(parameter.requires_grad for parameter in block.parameters()):
            break
        found.append(block)
    return found


def _why_not(trunk: nn.Module, other: nn.Module, shared: list[nn.Module]) -> str | None:
    if not shared:
        return "every block is trained"
    for module in trunk.modules():
        if isinstance(module, nn.Embedding) and module.weight.requires_grad:
            return "the embeddings are trained"
        if _drops_out(module):
            return "the policy drops out activations"
    theirs = dict(other.named_parameters())
    for name, parameter in trunk.named_parameters():
        same = parameter.to(theirs[name].device, theirs[name].dtype)
        if not parameter.requires_grad and not torch.equal(same, theirs[name]):
            return f"the policy's {name} differs from it"
    return None


def _drops_out(module: nn.Module) -> bool:
    attention = getattr(module, "attention_dropout", 0.0)
    return (isinstance(module, nn.Dropout) and module.p > 0) or (
        isinstance(attention, float) and attention > 0
    )
