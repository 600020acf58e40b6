"""What a training minimises: losses summed over what they teach.

A loss takes (model, batch) and returns its *sum* over the batch's loss tokens (or pairs), with
its parts as detached sums; the loop divides by their number in the whole optimiser step. A
model's head is always called as a module, never through its weight: under ZeRO-3 the weight is
there only while its module runs.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from alt_hpc.errors import InputError
from alt_hpc.lm.prefix import sight
from alt_hpc.training.examples import FeatureBatch, PairBatch, TextBatch

Parts = dict[str, Tensor]
Loss = Callable[[nn.Module, Any], tuple[Tensor, Parts]]

_AFTER_HEAD = ("logit_scale", "logits_scaling", "final_logit_softcapping")  # Cohere, Granite, Gemma


class ForLoss(nn.Module):
    """A model whose forward pass is its loss: what DeepSpeed's engine wraps and calls."""

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, batch: Any) -> tuple[Tensor, Parts]:
        return self.loss(self.module, batch)


def alt_loss(
    model: nn.Module,
    batch: TextBatch,
    *,
    entropy: float = 0.06,
    kl: float = 0.0,
    reference: nn.Module | None = None,
    vocabulary: int | None = None,
) -> tuple[Tensor, Parts]:
    """Sum over loss tokens of CE - entropy * H + kl * KL(reference || policy).

    H is the entropy of the policy's next-token distribution, KL is over the full vocabulary at
    temperature 1, with the same input to both (arXiv 2407.16970, section 3). The reference is a
    model in eval mode on the batch's device. Quark's is given another prompt
    (`TextBatch.reference`), and knows but the first `vocabulary` token ids: KL is then over these
    alone, CE and H over all.

    Returns the sum (float32) and the detached sums "ce", "entropy" and, with a reference, "kl".
    InputError for `kl` without one, or a model that changes its logits after the head.
    """
    if kl and reference is None:
        raise InputError("the KL term of the loss needs a reference model")
    hidden = _hidden(model, batch)
    other, other_head = hidden.new_empty(len(hidden), 0), None
    if reference is not None:
        with torch.no_grad():
            other = _hidden(reference, batch.reference or batch)
        other_head = checked_head(reference)
    fixed = (checked_head(model), other_head, vocabulary)
    totals = hidden.new_zeros(3, dtype=torch.float32)
    pieces = (t.tensor_split(batch.chunks) for t in (hidden, batch.targets, other))
    for piece in zip(*pieces, strict=True):
        # The logits are computed again in the backward pass, so that those of one chunk are
        # alive at a time. Nothing in there is random.
        totals = totals + checkpoint(
            _chunk, *fixed, *piece, use_reentrant=False, preserve_rng_state=False
        )
    loss = totals[0] - entropy * totals[1] + kl * totals[2]
    names = ("ce", "entropy") if reference is None else ("ce", "entropy", "kl")
    return loss, dict(zip(names, totals.detach(), strict=False))


# Sum over loss tokens of the cross-entropy; the entropy is only reported.
sft_loss = functools.partial(alt_loss, entropy=0.0)


def pair_loss(model: nn.Module, batch: PairBatch) -> tuple[Tensor, Parts]:
    """Sum over pairs of -log sigmoid(r_chosen - r_rejected); r is `score` of the last token."""
    score: nn.Module = model.score  # type: ignore[assignment]
    chosen, rejected = score(_hidden(model, batch)).float().squeeze(-1).chunk(2)
    return _preference(chosen, rejected, batch.weights)


def feature_loss(head: nn.Module, batch: FeatureBatch) -> tuple[Tensor, Parts]:
    """As `pair_loss`, with a head (a linear layer to one number) on cached features."""
    dtype = next(head.parameters()).dtype
    rewards = head(batch.features.to(dtype)).float().squeeze(-1)
    return _preference(rewards[:, 0], rewards[:, 1], batch.weights)


def checked_head(model: nn.Module) -> nn.Module:
    """What makes logits; InputError where the losses would not be those of plain transformers."""
    for name in _AFTER_HEAD:
        if getattr(model.config, name, None) not in (None, 1):
            raise InputError(f"{type(model).__name__}: logits changed by {name} are not supported")
    return model.get_output_embeddings()  # type: ignore[operator, no-any-return]


def _preference(chosen: Tensor, rejected: Tensor, weights: Tensor) -> tuple[Tensor, Parts]:
    """Rewards and weights are [pairs]; the part "accuracy" counts pairs in the right order."""
    loss = -(weights * functional.logsigmoid(chosen - rejected)).sum()
    return loss, {"accuracy": (weights * (chosen > rejected)).sum().detach()}


def _hidden(model: nn.Module, batch: TextBatch | PairBatch) -> Tensor:
    """Hidden states after the final norm, [n, hidden], at the batch's positions [n]."""
    trunk: nn.Module = model.base_model  # type: ignore[assignment]
    seen: dict[str, Tensor | None] = {"attention_mask": batch.mask}
    if isinstance(batch, TextBatch) and batch.owners is not None:
        mask = sight(batch.owners, batch.owners, next(model.parameters()).dtype, causal=True)
        seen = {"attention_mask": mask, "position_ids": batch.places}
    states = trunk(input_ids=batch.ids, use_cache=False, **seen).last_hidden_state
    return states.flatten(0, 1).index_select(0, batch.positions)  # type: ignore[no-any-return]


def _chunk(
    head: nn.Module, other_head: nn.Module | None, vocabulary: int | None, *piece: Tensor
) -> Tensor:
    """Sums of CE, H and KL over the positions of a chunk, [3] in float32."""
    hidden, targets, other = piece
    logits = head(hidden).float()  # [n, vocabulary]
    log_p = functional.log_softmax(logits, dim=-1)
    ce = -log_p.gather(1, targets[:, None]).sum()
    entropy = -(log_p.exp() * log_p).sum()
    if other_head is None:
        return torch.stack([ce, entropy, torch.zeros_like(ce)])
    with torch.no_grad():
        log_q = other_head(other).float()[:, :vocabulary]
        log_q = functional.log_softmax(log_q, dim=-1)
    if vocabulary is not None:
        log_p = functional.log_softmax(logits[:, :vocabulary], dim=-1)
    return torch.stack([ce, entropy, (log_q.exp() * (log_q - log_p)).sum()])
