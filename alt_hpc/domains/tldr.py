r"""tldr: posts of Reddit to summarise, `SUBREDDIT: r/...\nTITLE: ...\nPOST: ...\nTL;DR:`."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from alt_hpc.domains.domain import Domain

TLDR = "TL;DR:"
SUMMARIES = ("label", "chosen", "rejected")  # columns


class Settings(Domain):
    """Where feedback stands around a post.

    A post's title, all up to the first `POST:`, and its last line stay where it is shortened.
    """

    probe: ClassVar[str] = f"SUBREDDIT: r/...\nTITLE: ...\nPOST: ...\n{TLDR}"
    holes: ClassVar[tuple[str, ...]] = ("{bos}", "{prompt}", "{body}", "{last_line}")

    kind: Literal["tldr"] = "tldr"

    def example(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A `TL;DR:` that begins all summaries (comparisons on the hub) ends the prompt instead."""
        sides = {side: str(row[side]).lstrip() for side in SUMMARIES if side in row}
        if not sides or not all(text.startswith(TLDR) for text in sides.values()):
            return dict(row)
        prompt = row["prompt"].rstrip().removesuffix(TLDR).rstrip() + "\n" + TLDR
        bare = {side: text.removeprefix(TLDR) for side, text in sides.items()}
        return {**row, "prompt": prompt, **bare}

    def judged(self, prompt: str) -> str:
        """Without the last `TL;DR:`, which asks for a summary."""
        return prompt.rstrip().removesuffix(TLDR).rstrip()

    def post(self, prompt: str) -> str:
        """Without subreddit, title and last line: the same post may be given other ones."""
        body, _, _ = self.split(prompt)
        return body.removeprefix(self.kept(body)) or prompt

    def split(self, prompt: str) -> tuple[str, str, str]:
        body, newline, last = prompt.rpartition("\n")
        return (body, newline, last) if newline else (prompt, "", "")

    def kept(self, body: str) -> str:
        title, mark, _ = body.partition("\nPOST:")
        return title + mark if mark else ""
