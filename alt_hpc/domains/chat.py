r"""chat: dialogues in the form of HH, `\n\nHuman: ...\n\nAssistant: ...\n\nHuman: ...` and so on.

The hub's HH has no column of prompts, but whole dialogues: `columns: {prompt: chosen}`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from alt_hpc.domains.domain import Domain
from alt_hpc.settings import GIVES_KIND

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


class Settings(Domain):
    """Where feedback stands around a dialogue.

    Where it is shortened its last turn, from the last `Human:` on, stays: those before lose their
    end.
    """

    model_config = GIVES_KIND
    probe: ClassVar[str] = f"{HUMAN} ...{ASSISTANT}"

    kind: Literal["chat"] = "chat"

    def example(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A prompt that has its reply (`chosen` of HH) loses it; it is the label, if none is."""
        before, mark, reply = row["prompt"].rpartition(ASSISTANT)
        if not mark or not reply.strip():
            return dict(row)
        return {"label": reply, **row, "prompt": before + mark}

    def split(self, prompt: str) -> tuple[str, str, str]:
        before, mark, last = prompt.rpartition(HUMAN)
        return before, "", mark + last

    def judged(self, prompt: str) -> str:
        """Without the empty lines in front, and without the mark that asks for the reply."""
        return prompt.strip().removesuffix(ASSISTANT.strip()).rstrip()
