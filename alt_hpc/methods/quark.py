"""quark: as words, but each quantile has a token of its own (Quark, arXiv 2205.13636).

As the ALT authors run it beside ALT-RM: selection and training are the same; the KL term's
reference reads the prompt without a token, over the vocabulary without the tokens.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from alt_hpc.errors import InputError
from alt_hpc.lm.tokens import Tokenizer
from alt_hpc.methods.method import Asking, LossView
from alt_hpc.methods.ranked import Ranked
from alt_hpc.settings import GIVES_KIND

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_TOKEN = re.compile(r"_QUANTILE_TOKEN_\d+_")


class Settings(Ranked):
    """`_QUANTILE_TOKEN_0_` is the best; it stands right in front of a prompt."""

    model_config = GIVES_KIND
    defaults: ClassVar[Mapping[str, Any]] = {
        "domain.template": "{feedback}{prompt}",
        "train.kl": 0.05,
        "train.train_embeddings": True,  # the tokens are nothing else; no trunk could be shared
    }

    adds_tokens: ClassVar[bool] = True

    kind: Literal["quark"] = "quark"

    @property
    def title(self) -> str:
        return "Quark"

    @property
    def levels(self) -> list[str]:
        return [f"_QUANTILE_TOKEN_{i}_" for i in range(self.quantiles)]

    def asked(self, iteration: int) -> tuple[Asking, ...]:
        """The starting policy does not know the tokens."""
        return super().asked(iteration) if iteration else ("plain",)

    def extend(self, tokenizer: Tokenizer) -> bool:
        levels, name = self.levels, tokenizer.name_or_path
        known = [token for token in tokenizer.get_vocab() if _TOKEN.fullmatch(token)]
        if known and {*known} != {*levels}:
            problem = f"{name}: knows {len(known)} quantile tokens, but there are {len(levels)}"
            raise InputError(f"{problem} quantiles", "method.quantiles")
        if not known:
            tokenizer.add_special_tokens(
                {"extra_special_tokens": levels}, replace_extra_special_tokens=False
            )
        ids = [tokenizer.get_vocab()[token] for token in levels]
        if ids != [*range(len(tokenizer) - len(ids), len(tokenizer))]:
            raise InputError(f"{name}: its last tokens cannot be the quantiles' (they are {ids})")
        return not known

    def prepare(self, model: "PreTrainedModel", tokenizer: Tokenizer, seed: int) -> None:
        """New rows are drawn as the others are spread, dimension by dimension.

        Rows that the tokenizer has no use for are lost first (GPT-J has 143).
        """
        from alt_hpc.lm import vocabulary

        vocabulary.resize(model, len(tokenizer) - self.quantiles, self.quantiles, seed)

    def silent(self, tokenizer: Tokenizer, rows: int) -> Sequence[int]:
        """The tokens, and whatever rows a starting policy has behind its tokenizer's."""
        first = tokenizer.get_vocab().get(self.levels[0], rows)
        return range(first, rows)

    def loss_view(self, tokenizer: Tokenizer) -> LossView:
        return LossView("plain", vocabulary=len(tokenizer) - self.quantiles)
