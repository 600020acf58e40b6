"""What a model holds of memory while it answers or reads: arithmetic over its sizes (pure)."""

from dataclasses import dataclass
from typing import Self

from alt_hpc.lm.sizes import BYTES, Sizes

# Generations in one sequence: more of them share more, and step over more of each other's tokens.
ABREAST = 16
READ = 512  # tokens whose logits `reading.continuation_logprobs` has at once
TOGETHER = 16384  # on a GPU: tokens of several prompts, and what stands behind them, read at once
WIDE = 4096  # of one prompt with all that stands behind it
SEEN = 2**25  # pairs of tokens in all rows: some architectures hold a score of each
_PICKING = 40  # bytes of a logit as a token is picked: in float32 thrice; whole rows sorted
_HEAD = 64  # the usual size of an attention head


@dataclass(frozen=True)
class Held:
    """Bytes at one moment, by what they are."""

    weights: float = 0
    optimiser: float = 0  # float32 masters and Adam's moments
    gradients: float = 0
    activations: float = 0  # logits and masks among them
    cache: float = 0  # keys and values

    @property
    def all(self) -> float:
        return float(sum(vars(self).values()))

    def __add__(self, other: Self) -> "Held":
        return Held(
            *(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        )


@dataclass(frozen=True)
class Moment:
    """What a task holds at one moment: on its device, and of its host's memory beside it."""

    device: Held = Held()
    host: Held = Held()

    def __add__(self, other: Self) -> "Moment":
        return Moment(self.device + other.device, self.host + other.host)


def loading(sizes: Sizes, dtype: str) -> Moment:
    """A model is read on the host: its file is mapped; of another dtype it is there twice."""
    own = sizes.weights * BYTES[dtype]
    return Moment(host=Held(own if own == sizes.stored else own + sizes.stored))


def answering(
    sizes: Sizes, dtype: str, prompts: int, answers: int, prompt: int, new: int, on_gpu: bool
) -> Moment:
    """Prompts of so many tokens get so many answers each, side by side (see `lm/decode`)."""
    each, rows = BYTES[dtype], -(-answers // ABREAST)
    slots = rows * prompt + answers * new + prompt  # the last: the prompt as it was computed
    live = prompts * answers
    logits = live * sizes.vocabulary * (2 * each + _PICKING)
    begun = min(TOGETHER, prompts * prompt) if on_gpu else prompt  # tokens computed at once
    once = max(begun, live) * _working(sizes, each)
    return Moment(
        Held(
            weights=sizes.weights * each,
            activations=logits + once + _scores(sizes, prompt, prompt, each, on_gpu),
            cache=(prompts * slots + (begun if on_gpu else 0)) * sizes.kept(dtype),
        )
    )


def reading(
    sizes: Sizes, dtype: str, prompt: int, rest: int, budget: int, on_gpu: bool, logits: bool
) -> Moment:
    """Texts of `rest` tokens behind a prompt, up to `budget` tokens at once; on a GPU several
    prompts with what stands behind them (see `lm/reading`).
    """
    each = BYTES[dtype]
    rows = max(1, budget // max(1, rest))
    fork = 2 * rows * (prompt + rest) * sizes.cached * each  # a block at a time, old and new
    made = budget * sizes.vocabulary * (each + 8) if logits else 0
    once = max(budget, prompt) * _working(sizes, each)
    once += _scores(sizes, budget, prompt + rest, each, on_gpu)
    together = TOGETHER * _working(sizes, each) + SEEN * each if on_gpu else 0  # and the mask
    return Moment(
        Held(
            weights=sizes.weights * each,
            activations=made + max(once, together),
            cache=prompt * sizes.kept(dtype) + fork,
        )
    )


def _working(sizes: Sizes, each: int) -> int:
    """Bytes of a token within one block, without gradients."""
    return each * (8 * sizes.hidden + 3 * sizes.inner)


def _scores(sizes: Sizes, tokens: int, slots: int, each: int, on_gpu: bool) -> int:
    """Attention's scores of one block, where it is computed as plain products (`lm/cpu`)."""
    return 0 if on_gpu else 2 * max(1, sizes.hidden // _HEAD) * tokens * slots * each
