"""What a method is: it turns scored generations into training data and conditioning."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np

from alt_hpc.lm.tokens import Tokenizer
from alt_hpc.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Row = Mapping[str, Any]
Asking = str  # "plain", "best", "worst", or the number of a quantile between: "quantile 1"
Known = Mapping[int, Sequence[str]]  # feedback that was written, of each quantile
QUANTILE = "quantile "
NOTHING: Known = MappingProxyType({})


@dataclass(frozen=True)
class Label:
    """What was decided of each generation of a prompt; None where it was set aside."""

    quantiles: Sequence[int | None]  # 0 is the best
    feedback: Sequence[str | None]


class Choice(NamedTuple):
    """A generation that is trained on."""

    generation: int  # its index among the prompt's
    feedback: str | None  # that it is trained with; None: the prompt as it is
    family: int  # those of a family have the same feedback and can share one computed prompt


@dataclass(frozen=True)
class LossView:
    """What the KL term's reference policy reads, and over which vocabulary it is compared."""

    reads: Literal["conditioned", "plain"] = "conditioned"  # plain: the prompt without feedback
    vocabulary: int | None = None  # the first token ids; None: all


class Method(Settings):
    """A method's settings, and what it decides. Pure, but for `prepare`.

    The defaults are those of most methods: a kind states what raises NotImplementedError here.
    """

    # Keys of other sections that the method's paper sets so, where a config leaves them out.
    defaults: ClassVar[Mapping[str, Any]] = {}
    adds_tokens: ClassVar[bool] = False  # then the embeddings must be trained
    reads_words: ClassVar[bool] = False  # then the reward must write feedback

    kind: str

    def check(self) -> None:
        """Raise InputError, with its field, where its settings contradict each other."""

    @property
    def title(self) -> str:
        """What tables call it."""
        return self.kind

    @property
    def levels(self) -> list[str]:
        """What its quantiles are called, best first, in tables and curves."""
        raise NotImplementedError

    @property
    def rated(self) -> int | None:
        """In how many levels its reward must rate answers; None: it can be any number."""
        return None

    @property
    def widest(self) -> list[str]:
        """The feedback that a prompt must leave room for: it is shortened once for all of it."""
        return self.levels

    @property
    def taught(self) -> int:
        """How many families (see `family`) a prompt has, at most."""
        return len(self.levels)

    @property
    def family(self) -> int:
        """How many generations of a prompt make a family, which has the same feedback, at most."""
        raise NotImplementedError

    def pooled(self, iteration: int) -> range:
        """The iterations whose draws are trained on in an iteration, the earliest first."""
        return range(iteration, iteration + 1)

    def sources(self, iteration: int) -> tuple[str, ...]:
        """Stages of an iteration whose rows `recall` reads when the policy after it is asked."""
        return ()

    def start(self, iteration: int) -> Any:
        """What of it decides how the starting policy is evaluated (0), or sampled from (1).

        Runs whose methods differ in nothing else can share that. Here: all its settings.
        """
        return self

    def recall(self, rows: Iterable[Row]) -> Known:
        """What the policy after an iteration can be asked with; `rows`: of its `sources`."""
        return NOTHING

    def asked(self, iteration: int) -> tuple[Asking, ...]:
        """How the policy after an iteration is asked when it is evaluated."""
        return ("plain", "best", "worst")

    def between(self, iteration: int) -> tuple[Asking, ...]:
        """How else it can be asked: with the words between the best and the worst."""
        knows = {"best", "worst"} <= {*self.asked(iteration)}
        return tuple(f"{QUANTILE}{i}" for i in range(1, len(self.levels) - 1) if knows)

    def ask(self, how: Asking, row: Row, known: Known = NOTHING, seed: int = 0) -> str | None:
        """The feedback to ask with for a prompt; None: as it is.

        `known` is what `recall` gave. Where it is drawn from, `seed` draws: a function of the run's
        seed, the iteration and the row.
        """
        raise NotImplementedError

    def called(self, how: Asking) -> str | None:
        """What tables call a way of asking; None: plain."""
        return self.ask(how, {})

    def label(self, row: Row) -> Label | None:
        """Of a scored row; None where `labels` decides over the pool, not row by row."""
        raise NotImplementedError

    def together(self, row: Row) -> Any:
        """The same value for all scored rows whose generations are put in order together."""
        return row["row"]

    def labels(self, rows: Iterable[Row]) -> Iterator[Label]:
        """Of each scored row of an iteration's pool: what training and reports go by.

        A row's `post` says which of the frozen prompts it is a draw of.
        """
        return (Label(row["quantiles"], row["feedback"]) for row in rows)

    def select(
        self, label: Label, finished: Sequence[bool], rng: np.random.Generator
    ) -> list[Choice]:
        """The generations that are trained on; `finished`: those that ended by EOS."""
        raise NotImplementedError

    def learned(self, generation: Row, tokenizer: Tokenizer, limit: int) -> list[int]:
        """Token ids that are learned of a selected generation: those that were sampled."""
        return list(generation["ids"])

    def extend(self, tokenizer: Tokenizer) -> bool:
        """Add the method's own tokens to a policy's tokenizer; whether it lacked them.

        InputError where it cannot have them.
        """
        return False

    def prepare(self, model: "PreTrainedModel", tokenizer: Tokenizer, seed: int) -> None:
        """Give a policy rows for the tokens that `extend` has added, before it is trained.

        A function of model, tokenizer and seed alone. InputError where the model cannot have them.
        """

    def silent(self, tokenizer: Tokenizer, rows: int) -> Sequence[int]:
        """Token ids, of so many in a policy's vocabulary, that it and its export never sample."""
        return ()

    def loss_view(self, tokenizer: Tokenizer) -> LossView:
        """What the KL term compares."""
        return LossView()
