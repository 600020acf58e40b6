"""What a reward model reads: prompt and summary as the token ids whose last one is scored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from alt_hpc.domains import Domain
from alt_hpc.errors import InputError
from alt_hpc.lm import load, tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from alt_hpc.rewards.model import Settings

CARPERAI_TEMPLATE = "<|startoftext|>{prompt} {summary}"
PLAIN_TEMPLATE = "{prompt} {summary}"


@dataclass(frozen=True)
class Text:
    """How prompt and summary become the token ids whose last one is scored.

    Attributes
    ----------
    before, between, after
        The template around `{prompt}` and `{summary}`. The token of `eos` ends the text: of what
        follows the prompt, the first one counts, also where a summary contains it.
    scores_eos
        Whether that EOS itself is scored (sequence classification) or the token before it
        (CarperAI).
    max_length, max_new_tokens
        A prompt is cut to the room that the template and a summary of max_new_tokens leave in
        max_length, whatever its summaries: all generations of a prompt see the same prompt.
    """

    tokenizer: PreTrainedTokenizerBase
    domain: Domain
    before: str
    between: str
    after: str
    eos: int
    scores_eos: bool
    max_length: int
    max_new_tokens: int

    def ids(self, prompt: str, summaries: list[str]) -> tuple[list[list[int]], bool]:
        """Token ids of each text, and whether the prompt was shortened (see `Domain.fit`).

        Summaries are stripped. One that is longer than foreseen loses its end.
        """
        head, lost = self.domain.fit(self.tokenizer, self.before, prompt, self.room)
        room = self.max_length - len(head)
        return [head + self._shortened(self._tail(s), room) for s in summaries], lost > 0

    @property
    def room(self) -> int:
        """Tokens that template and prompt may have, so that a summary still fits."""
        return self.max_length - len(self._tail("")) - self.max_new_tokens

    def _tail(self, summary: str) -> list[int]:
        text = self.between + summary.strip() + self.after
        ids = tokens.continuation_ids(self.tokenizer, text)
        if self.eos in ids:
            ids = ids[: ids.index(self.eos)]
        return [*ids, self.eos] if self.scores_eos else ids

    def _shortened(self, tail: list[int], room: int) -> list[int]:
        if len(tail) <= room:
            return tail
        return [*tail[: room - 1], self.eos] if self.scores_eos else tail[:room]


def of_checkpoint(
    carperai: bool, home: Path, domain: Domain, settings: Settings, max_new_tokens: int
) -> Text:
    """What a reward model of either kind reads; its tokenizer's folder is `home`."""
    template = CARPERAI_TEMPLATE if carperai else PLAIN_TEMPLATE
    tokenizer = load.tokenizer(home)
    return _text(tokenizer, domain, settings, template, max_new_tokens, scores_eos=not carperai)


def of_base(
    folder: Path,
    settings: Settings,
    domain: Domain,
    max_new_tokens: int,
    tokenizer: Path | None = None,
) -> Text:
    """What a sequence classifier made of a causal language model reads."""
    words = load.tokenizer(tokenizer or folder)
    return _text(words, domain, settings, PLAIN_TEMPLATE, max_new_tokens, scores_eos=True)


def _text(
    tokenizer: PreTrainedTokenizerBase,
    domain: Domain,
    settings: Settings,
    template: str,
    max_new_tokens: int,
    *,
    scores_eos: bool,
) -> Text:
    template = settings.template or template
    if template.count("{prompt}") != 1 or template.count("{summary}") != 1:
        raise InputError(f"{template!r} must hold {{prompt}} and {{summary}} once", ".template")
    before, _, rest = template.partition("{prompt}")
    between, mark, after = rest.partition("{summary}")
    if not mark:
        raise InputError(f"{template!r} has {{summary}} before {{prompt}}", ".template")
    eos = tokenizer.eos_token_id
    if eos is None:
        raise InputError(f"{tokenizer.name_or_path}: the reward model's tokenizer has no EOS token")
    text = Text(
        tokenizer,
        domain,
        before,
        between,
        after,
        eos,
        scores_eos,
        settings.max_length,
        max_new_tokens,
    )
    if text.room <= len(tokens.text_ids(tokenizer, before)):
        raise InputError(
            f"{settings.max_length} tokens leave no room for a post beside the template and"
            f" {max_new_tokens} new tokens",
            ".max_length",
        )
    return text
