"""quark: as words, but each quantile has a token of its own (Quark, arXiv 2205.13636).

As the ALT authors run it beside ALT-RM: selection and training are the same; the KL term's
reference reads the prompt without a token, over the vocabulary without the tokens.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from alt_hpc.errors import InputError
from alt_hpc.lm.tokens import Tokenizer
from alt_hpc.methods.method import Asking, LossView
from alt_hpc.methods.ranked import Ranked
from alt_hpc.settings import GIVES_KIND

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Settings(Ranked):
    """`_QUANTILE_TOKEN_0_` is the best; it stands right in front of a prompt."""

    model_config = GIVES_KIND
    defaults: ClassVar[Mapping[str, Any]] = {
        "domain.template": "{feedback}{prompt}",
        "train.kl": 0.05,
        "train.train_embeddings": True,  # the tokens are nothing else; no trunk could be shared
    }

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

    def extend(self, tokenizer: Tokenizer) -> None:
        tokenizer.add_special_tokens(
            {"extra_special_tokens": self.levels}, replace_extra_special_tokens=False
        )

    def prepare(self, model: "PreTrainedModel", tokenizer: Tokenizer, seed: int) -> None:
        """New rows are drawn as the others are spread, dimension by dimension.

        Rows that the tokenizer has no use for are lost first (GPT-J has 143).
        """
        from alt_hpc.lm import vocabulary

        ids = self.silent(tokenizer)
        if ids != tuple(range(ids[0], ids[0] + len(ids))) or ids[-1] + 1 != len(tokenizer):
            raise InputError(f"{tokenizer.name_or_path}: its last tokens are not {self.levels}")
        vocabulary.resize(model, ids[0], len(ids), seed)

    def silent(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        known = tokenizer.get_vocab()
        return tuple(known[token] for token in self.levels if token in known)

    def loss_view(self, tokenizer: Tokenizer) -> LossView:
        return LossView("plain", vocabulary=self.silent(tokenizer)[0])
