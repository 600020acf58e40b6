"""The KL term's reference policy goes on from the policy's trunk where that is not trained."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from alt_hpc.lm.blocks import blocks

log = logging.getLogger(__name__)


def share_trunk(policy: nn.Module, reference: nn.Module) -> int:
    """Let the reference go on from the policy's states below its lowest trained block.

    The policy must be run first, on the same tokens (`losses.alt_loss` does). The reference then
    computes its top blocks only, and the weights of the others are freed.

    Parameters
    ----------
    policy
        As `blocks.train_top` left it, not yet in DeepSpeed's hands.
    reference
        A model of the same architecture, in any floating dtype.

    Returns
    -------
    How many blocks the reference no longer computes: 0, with a line in the log, where the trunks
    differ (embeddings or low blocks are or were trained) or the policy drops out activations.
    """
    (trunk, ours), (other, theirs) = blocks(policy), blocks(reference)
    trained = [any(p.requires_grad for p in block.parameters()) for block in ours]
    shared = trained.index(True) if True in trained else len(trained)
    why = _why_not(trunk, other, shared)
    if why:
        log.warning("the reference policy is computed whole: %s", why)
        return 0
    states: dict[str, Any] = {}
    ours[shared - 1].register_forward_hook(lambda module, args, output: states.update(now=output))
    for block in list(theirs)[:shared]:
        block.to("meta")
        block.forward = lambda *args, **kwargs: states["now"]  # tensor or tuple, as blocks return
    return shared


def _why_not(trunk: nn.Module, other: nn.Module, shared: int) -> str | None:
    if not shared:
        return "every block is trained"
    for module in trunk.modules():
        if isinstance(module, nn.Embedding) and module.weight.requires_grad:
            return "the embeddings are trained"
        attention = getattr(module, "attention_dropout", 0.0)
        drops = isinstance(module, nn.Dropout) and module.p > 0
        if drops or (isinstance(attention, float) and attention > 0):
            return "the policy drops out activations"
    theirs = dict(other.named_parameters())
    for name, parameter in trunk.named_parameters():
        same = parameter.to(theirs[name].device, theirs[name].dtype)
        if not parameter.requires_grad and not torch.equal(same, theirs[name]):
            return f"the policy's {name} differs from it"
    return None
