r"""tldr: posts of Reddit to summarise, `SUBREDDIT: r/...\nTITLE: ...\nPOST: ...\nTL;DR:`."""

from collections.abc import Mapping
from typing import Literal

from alt_hpc.domains.domain import Domain, Fitted
from alt_hpc.errors import InputError
from alt_hpc.lm.tokens import Tokenizer

TLDR = "TL;DR:"


class Settings(Domain):
    """Where feedback stands around a post."""

    kind: Literal["tldr"] = "tldr"
    template: str = "{feedback} input: {prompt}"

    def check(self) -> None:
        for part in ("{feedback}", "{prompt}"):
            if self.template.count(part) != 1:
                raise InputError(f"must contain {part} once", "domain.template")
        if not self.template.endswith("{prompt}"):  # the generation continues the prompt
            raise InputError("must end in {prompt}", "domain.template")

    def example(self, row: Mapping[str, str]) -> dict[str, str]:
        """A `TL;DR:` that begins all summaries (comparisons on the hub) ends the prompt instead."""
        sides = {side: text.lstrip() for side, text in row.items() if side != "prompt"}
        if not sides or not all(text.startswith(TLDR) for text in sides.values()):
            return dict(row)
        prompt = row["prompt"].rstrip().removesuffix(TLDR).rstrip() + "\n" + TLDR
        return {"prompt": prompt} | {side: t.removeprefix(TLDR) for side, t in sides.items()}

    def before(self, feedback: str | None) -> str:
        """The prompt is put behind, never formatted or parsed back: it may contain anything."""
        if feedback is None:
            return ""
        return self.template.removesuffix("{prompt}").replace("{feedback}", feedback)

    def fit(self, tokenizer: Tokenizer, before: str, prompt: str, room: int) -> Fitted:
        r"""What does not fit is lost from the end of the post; title and last line stay.

        That is everything up to the first `\nPOST:`, and the tail from the last newline on. Where
        these alone are too long, or there is no newline, the prompt's own end is lost.
        """
        from alt_hpc.lm import tokens

        ids = tokens.text_ids(tokenizer, before + prompt)
        if len(ids) <= room:
            return ids, 0
        front, newline, last = prompt.rpartition("\n")
        title, mark, _ = front.partition("\nPOST:")
        must = tokens.text_ids(tokenizer, before + (title + mark if mark else ""))
        tail = tokens.continuation_ids(tokenizer, newline + last) if newline else []
        kept = room - len(tail)
        if not newline or kept < max(len(must), 1):
            return ids[:room], len(ids) - room
        head = tokens.text_ids(tokenizer, before + front)
        return head[:kept] + tail, max(len(head) - kept, 0)
