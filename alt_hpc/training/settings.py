"""How a model is optimised: what all trainings have, and the keys of each."""

from typing import Any

from pydantic import Field

from alt_hpc.errors import InputError
from alt_hpc.settings import BelowOne, Count, Dtype, NotNegative, Part, Positive, Settings, Share

ZERO2: dict[str, Any] = {  # configs/deepspeed/zero2.json, which an installation has not
    "zero_optimization": {
        **{"stage": 2, "overlap_comm": True, "contiguous_gradients": True},
        **{"reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000},
    },
    "data_types": {"grad_accum_dtype": "fp32"},
}


class Training(Settings):
    """One optimisation. The defaults are the paper's (arXiv 2407.16970)."""

    epochs: Count = 2
    global_batch: Count = 16
    """Sequences of an optimiser step, whatever the number of processes."""
    micro_batch: Count = 8
    """Sequences that a process computes at once."""
    lr: Positive = 2e-5
    betas: list[BelowOne] = Field([0.8, 0.999], min_length=2, max_length=2)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 3e-7
    clip: Positive = 1.0
    warmup: Part = 0.05
    """Share of all steps; then linear decay to 0."""
    trained_blocks: Share = 0.3
    """Top share of blocks that is trained; 1: all of them."""
    train_embeddings: bool = True
    """Whether the input embeddings (and a head tied to them) are trained, as by the authors."""
    checkpoint_activations: bool = False
    """Compute them again in the backward pass: less memory."""
    precision: Dtype = "bfloat16"
    export_dtype: Dtype = "float32"
    """The float32 master weights lose nothing between iterations."""
    deepspeed: str | None = None
    """A DeepSpeed JSON; none: as configs/deepspeed/zero2.json."""
    checkpoint_minutes: NotNegative = 15.0
    """Between DeepSpeed checkpoints."""

    @property
    def trains_embeddings(self) -> bool:
        return self.train_embeddings


def check_batches(settings: Training, world: int) -> None:
    """Raise InputError where batches cannot be divided evenly among `world` processes."""
    batch, micro = settings.global_batch, settings.micro_batch
    share, left = divmod(batch, world)
    if left:
        problem = f"{batch} sequences cannot be divided among {world} processes"
        raise InputError(problem, ".global_batch")
    if share % min(micro, share):
        problem = f"{share} sequences of a process cannot be divided into micro-batches of {micro}"
        raise InputError(problem, ".micro_batch")


class Sft(Training):
    """`sft`: prompts and labels make the starting policy."""

    max_length: Count = 1024
    """Tokens of a training sequence."""


class RewardModelTraining(Training):
    """`reward_model`: comparisons make the reward model."""

    head_only: bool = False
    """Train only the value head; the trunk stays as it is."""


class PolicyTraining(Training):
    """`train`: feedback makes the next policy."""

    entropy: NotNegative = 0.06
    """Coefficient of H in the loss."""
    kl: NotNegative = 0.0
    """Coefficient of KL(reference || policy); the paper's KL variant: 0.05."""
    train_embeddings: bool | None = None  # type: ignore[assignment]
    """Default: unless the KL term is on, whose reference then shares the policy's trunk."""
    share_prompts: bool | None = None
    """Generations of a prompt (with the same feedback, where that stands in front) are one row,
    with one prompt to compute. Default: where feedback stands behind the prompt."""
    carry_moments: bool = False
    """Adam's moments go on from the iteration before; the schedule begins anew either way."""

    @property
    def trains_embeddings(self) -> bool:
        return not self.kl if self.train_embeddings is None else self.train_embeddings
