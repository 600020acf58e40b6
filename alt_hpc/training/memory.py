"""What a training holds of memory: arithmetic over a model's sizes (pure).

DeepSpeed keeps the model in the precision that is computed in, and of what is trained float32
masters, Adam's two moments and gradients, divided among the ranks as its ZeRO stage says. Beside it
our loop keeps the weights as they were given (`deepspeed.Originals`), on the host.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alt_hpc.lm.memory import Held, Moment
from alt_hpc.lm.sizes import BYTES, Sizes
from alt_hpc.training.settings import Training

CHUNK = 512  # positions whose logits [CHUNK, vocabulary] are alive at once
# Bytes that a block keeps of a token for the backward pass, in numbers of the precision: norms,
# projections and attention, and of the widest layer (counted: tests/test_memory.py).
_OF_HIDDEN, _OF_INNER = 12, 4
_PASSED = 0.75  # of that where a block is not trained, and gradients only pass through it
# Float32 tensors of a chunk's logits that are alive in its backward pass; of the reference's.
_LOGITS, _THEIRS = 8, 3


@dataclass(frozen=True)
class Task:
    """One rank of a training, as far as its memory goes."""

    sizes: Sizes
    settings: Training
    zero: Mapping[str, Any]  # `zero_optimization` of the DeepSpeed JSON
    world: int
    on_gpu: bool
    rows: int  # sequences of a micro-batch
    width: int  # tokens of the longest
    learned: int  # loss tokens of a micro-batch
    reference: float = 0  # weights of the KL term's reference that are computed

    def moments(self) -> list[Moment]:
        """Of the first rank, which holds most: it begins, steps, exports, publishes."""
        sizes, settings = self.sizes, self.settings
        given = 4.0 * sizes.weights  # the weights as they were given, in float32
        trained = 4.0 * sizes.trained(settings.trained_blocks, settings.trains_embeddings)
        # In float32 on a CPU the model is computed with as it was given; else it is another one.
        apart = self.on_gpu or self._dtype != "float32"
        left = given - trained if apart else 0.0
        model = Moment(Held(weights=self._model))
        states, gradients = self._optimiser(trained)
        beside = Moment(Held(self.reference * BYTES[self._dtype], activations=self._activations))
        written = BYTES[settings.export_dtype] * sizes.weights  # and read again, to be checked
        return [
            Moment(host=Held(weights=given)),
            model + states + Moment(host=Held(weights=given if apart else trained)),
            model + states + gradients + beside + Moment(host=Held(weights=left)),
            model + states + Moment(host=Held(weights=left + trained)),
            model + Moment(host=Held(weights=left + trained + 2 * written)),
        ]

    @property
    def _dtype(self) -> str:
        """What is computed in (see `deepspeed.precision`)."""
        half = self.settings.precision == "float16"
        return "float32" if half and not self.on_gpu else self.settings.precision

    @property
    def _stage(self) -> int:
        return self._given("stage", 1) or 1

    def _given(self, key: str, default: int) -> int:
        """A number of the JSON; what it leaves to DeepSpeed ("auto") is DeepSpeed's default."""
        value = self.zero.get(key, default)
        return int(value) if isinstance(value, int | float) else default

    @property
    def _model(self) -> float:
        """Bytes of the model as it is computed with, on one rank."""
        each, whole = BYTES[self._dtype], self.sizes.weights
        if self._stage == 3 and self.world > 1:
            live = min(whole, self._given("stage3_max_live_parameters", 10**9))
            return each * (whole / self.world + live)
        return each * whole

    def _optimiser(self, trained: float) -> tuple[Moment, Moment]:
        """Masters and moments, and gradients; `trained`: bytes of what is trained, in float32."""
        mine, each = trained / self.world, BYTES[self._dtype]
        states, summed = Held(optimiser=3 * mine), Held(gradients=2 * mine)
        bucket = min(trained / 4, self._given("reduce_bucket_size", 5 * 10**8)) * each
        made = Held(gradients=bucket)  # those of a bucket are divided among the ranks at once
        if self._stage == 1:  # each rank sums up all
            summed, made = Held(gradients=trained + mine), Held(gradients=trained / 4 * each)
        if self.on_gpu and self.zero.get("offload_optimizer"):
            return Moment(host=states), Moment(made, summed)
        return Moment(states), Moment(made + summed)

    @property
    def _activations(self) -> float:
        """Of a micro-batch, the logits of a chunk and the mask among them."""
        sizes, settings, tokens = self.sizes, self.settings, self.rows * self.width
        each = BYTES[self._dtype]
        numbers = _OF_HIDDEN * sizes.hidden + _OF_INNER * sizes.inner
        top, block = sizes.top(settings.trained_blocks), each * tokens * numbers
        # Gradients of the input embeddings come through the blocks that are not trained.
        lower = len(sizes.blocks) - top if settings.trains_embeddings else 0
        kept = (top + _PASSED * lower) * block
        if settings.checkpoint_activations:
            kept = (top + lower) * each * tokens * sizes.hidden + block
        mask = self.rows * self.width**2 * each
        logits = 4 * (_LOGITS + (_THEIRS if self.reference else 0)) + each
        return kept + mask + min(CHUNK, self.learned) * sizes.vocabulary * logits
