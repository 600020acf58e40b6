"""What a reward model reads: prompt and summary as the token ids whose last one is scored."""

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

    Summaries are stripped. The first EOS behind the prompt ends the text, also within a summary.
    A prompt is shortened to what the template and a summary of max_new_tokens leave of max_length,
    whatever its summaries: all generations of a prompt see the same prompt.
    """

    tokenizer: "PreTrainedTokenizerBase"
    domain: Domain
    template: tuple[str, str, str]  # before, between and after {prompt} and {summary}
    scores_eos: bool  # that EOS itself is scored, or (CarperAI) the token before it
    max_length: int
    max_new_tokens: int

    def ids(self, prompt: str, summaries: list[str]) -> tuple[list[list[int]], bool]:
        """Ids of each text (too long a summary loses its end); whether the prompt was shortened."""
        head, lost = self.domain.fit(self.tokenizer, self.template[0], prompt, self.room)
        return [head + self._tail(s, self.max_length - len(head)) for s in summaries], lost > 0

    @property
    def room(self) -> int:
        """Tokens that template and prompt may have, so that a summary still fits."""
        return self.max_length - len(self._tail("", self.max_length)) - self.max_new_tokens

    def _tail(self, summary: str, room: int) -> list[int]:
        _, between, after = self.template
        ids = tokens.continuation_ids(self.tokenizer, between + summary.strip() + after)
        eos: int = self.tokenizer.eos_token_id
        ids = ids[: ids.index(eos)] if eos in ids else ids
        return [*ids[: room - 1], eos] if self.scores_eos else ids[:room]


def of(
    folder: Path,
    settings: "Settings",
    domain: Domain,
    max_new_tokens: int,
    tokenizer: Path | None = None,
    *,
    carperai: bool = False,
) -> Text:
    """What a reward model reads; its tokenizer's folder is `tokenizer`, else `folder`.

    InputError where there is none, or the template cannot be used.
    """
    words = load.tokenizer(tokenizer or folder)
    template = settings.template or (CARPERAI_TEMPLATE if carperai else PLAIN_TEMPLATE)
    if template.count("{prompt}") != 1 or template.count("{summary}") != 1:
        raise InputError(f"{template!r} must hold {{prompt}} and {{summary}} once", ".template")
    before, _, rest = template.partition("{prompt}")
    between, mark, after = rest.partition("{summary}")
    if not mark:
        raise InputError(f"{template!r} has {{summary}} before {{prompt}}", ".template")
    if words.eos_token_id is None:
        raise InputError(f"{words.name_or_path}: the reward model's tokenizer has no EOS token")
    most = settings.max_length
    text = Text(words, domain, (before, between, after), not carperai, most, max_new_tokens)
    if text.room <= len(tokens.text_ids(words, before)):
        raise InputError(
            f"{most} tokens leave no room for a post beside the template and"
            f" {max_new_tokens} new tokens",
            ".max_length",
        )
    return text
