"""The KL term's reference policy goes on from the policy's trunk where that is not trained."""

import logging
from typing import Any

import torch
from torch import nn

from alt_hpc.lm.blocks import blocks

log = logging.getLogger(__name__)


def share_trunk(policy: nn.Module, reference: nn.Module) -> int:
    """Let the reference go on from the policy's states below its lowest trained block.

    The policy (as `blocks.train_top` left it, not yet in DeepSpeed's hands) must be run first, on
    the same tokens (`losses.alt_loss` does). The reference (of the same architecture) then
    computes its top blocks only; the others' weights are freed. Returns how many: 0, with a line
    in the log, where the trunks differ or the policy drops out activations.
    """
    (trunk, ours), (other, theirs) = blocks(policy), blocks(reference)
    trained = [any(p.requires_grad for p in block.parameters()) for block in ours]
    shared = trained.index(True) if True in trained else len(trained)
    if why := _why_not(trunk, other, shared):
        log.warning("the reference policy is computed whole: %s", why)
        return 0
    states: dict[str, Any] = {}
    ours[shared - 1].register_forward_hook(lambda module, args, output: states.update(now=output))
    for block in theirs[:shared]:
        block.to("meta")
        block.forward = lambda *args, **kwargs: states["now"]  # tensor or tuple, as blocks return
    return shared


def _why_not(trunk: nn.Module, other: nn.Module, shared: int) -> str | None:
    if not shared:
        return "every block is trained"
    for module in trunk.modules():
        if isinstance(module, nn.Embedding) and module.weight.requires_grad:
            return "the embeddings are trained"
        name = "p" if isinstance(module, nn.Dropout) else "attention_dropout"
        if isinstance(p := getattr(module, name, 0.0), int | float) and p > 0:
            return "the policy drops out activations"
    theirs = dict(other.named_parameters())
    for name, parameter in trunk.named_parameters():
        same = parameter.to(theirs[name].device, theirs[name].dtype)
        if not parameter.requires_grad and not torch.equal(same, theirs[name]):
            return f"the policy's {name} differs from it"
    return None
