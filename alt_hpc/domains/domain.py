"""What a domain is: how an example becomes text for policy and reward, and how it is shortened."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from alt_hpc.errors import InputError
from alt_hpc.lm.tokens import Tokenizer, continuation_ids, text_ids
from alt_hpc.settings import Settings

# (token ids, how many tokens of the prompt were left out: 0 where it fits)
Fitted = tuple[list[int], int]
HOLE = re.compile(r"\{\w+\}")  # of a template, to be filled


class Around(NamedTuple):
    """What stands around a prompt; `between` its body and last line (None: what it has there)."""

    front: str = ""
    between: str | None = None
    behind: str = ""
    bos: bool = False  # whether a BOS begins it all


PLAIN = Around()


def around(template: str, feedback: str = "") -> Around:
    """A template, filled: a prompt is put into it, never formatted or parsed back."""
    text = template.removeprefix("{bos}")
    front, hole, rest = text.partition("{prompt}")
    between, behind = None, rest
    if not hole:
        front, _, rest = text.partition("{body}")
        between, _, behind = rest.partition("{last_line}")
        between = between.replace("{feedback}", feedback)
    front, behind = (part.replace("{feedback}", feedback) for part in (front, behind))
    return Around(front, between, behind, text != template)


class Domain(Settings):
    """Settings and texts. A prompt is raw text in every file of a run: feedback comes only here.

    The default is any text: it has no last line of its own, and its end is lost where it is long.
    """

    probe: ClassVar[str] = "..."  # a prompt as it may be
    holes: ClassVar[tuple[str, ...]] = ("{bos}", "{prompt}")  # beside {feedback}

    kind: str
    template: str = "{feedback} input: {prompt}"
    """Where feedback stands: around {prompt}, or between {body} and {last_line}; {bos} in front."""

    @property
    def bare(self) -> dict[str, Any]:
        """All but where feedback stands: what decides texts that have none."""
        return self.model_dump(exclude={"template"})

    @property
    def is_behind(self) -> bool:
        """Whether feedback stands behind the prompt, or behind all of it but its last line."""
        at = [self.template.find(hole) for hole in ("{prompt}", "{body}")]
        return self.template.find("{feedback}") > max(at)

    @property
    def variant(self) -> str:
        """What tables add to a method's name where feedback is not in the paper's place."""
        if self.is_behind:
            return " (behind)"
        return " (after BOS)" if self.template.startswith("{bos}") else ""

    def check(self) -> None:
        """Raise InputError, with its field, where its settings contradict each other."""
        if self.template.count("{feedback}") != 1:
            raise InputError("must contain {feedback} once", "domain.template")
        if problem := self.problem(self.template):
            raise InputError(problem, "domain.template")
        ends = ("{prompt}", "{last_line}", "{feedback}")
        if not self.template.endswith(ends):
            problem = "must end in {prompt}, {last_line} or {feedback}, as an answer goes on there"
            raise InputError(problem, "domain.template")

    def problem(self, template: str) -> str:
        """Why no prompt can be put into a template, or nothing."""
        found = HOLE.findall(template.replace("{feedback}", ""))
        for hole in found:
            if hole in ("{body}", "{last_line}") and hole not in self.holes:
                of = f"prompts of {self.kind} have no last line of their own"
                return f"{hole}: {of}: use {{prompt}}"
            if hole not in self.holes:
                return f"no such placeholder {hole} (there are: {', '.join(self.holes)})"
        found = [hole for hole in found if hole != "{bos}"]
        if "{bos}" in template and (template.count("{bos}") > 1 or template.find("{bos}")):
            return "{bos} can only begin it"
        if found in (["{prompt}"], ["{body}", "{last_line}"]):
            return ""
        if "{prompt}" in found or "{last_line}" not in self.holes:
            return "must contain {prompt} once"
        return "must contain {prompt} once, or {body} and behind it {last_line}"

    def example(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row of a data set (columns `prompt` and others) as it is used: as it was read."""
        return dict(row)

    def around(self, feedback: str | None) -> Around:
        """What stands around a prompt that is asked with this feedback."""
        return PLAIN if feedback is None else around(self.template, feedback)

    def answer(self, label: str) -> str:
        """What is written behind a prompt: the text of a label."""
        return f" {label.strip()}"

    def judged(self, prompt: str) -> str:
        """A prompt as a judge reads it, with what is said of it."""
        return prompt

    def post(self, prompt: str) -> str:
        """What of a prompt makes it the same as another: all of it."""
        return prompt

    def split(self, prompt: str) -> tuple[str, str, str]:
        """A prompt's body, which gives way where it is too long, its last line, what parts them."""
        return prompt, "", ""

    def kept(self, body: str) -> str:
        """What of the body's beginning is never lost for the sake of the last line."""
        return ""

    def text(self, prompt: str, it: Around) -> str:
        """A prompt with what stands around it; a BOS is no text."""
        body, gap, last = self.split(prompt)
        return it.front + body + (gap if it.between is None else it.between) + last + it.behind

    def fit(self, tokenizer: Tokenizer, prompt: str, room: int, it: Around = PLAIN) -> Fitted:
        """Token ids of a prompt with what stands around it, at most `room` of them (at least 1).

        What does not fit is lost from the end of the body; or, where what must stay is too long
        alone, from the end of the prompt.
        """
        ids = text_ids(tokenizer, self.text(prompt, it), bos=it.bos)
        if len(ids) <= room:
            return ids, 0
        body, gap, last = self.split(prompt)
        gap = gap if it.between is None else it.between
        must = text_ids(tokenizer, it.front + self.kept(body), bos=it.bos)
        behind = continuation_ids(tokenizer, gap + last + it.behind)
        if room - len(behind) < max(len(must), 1):
            body, behind = body + gap + last, continuation_ids(tokenizer, it.behind)
        head, left = text_ids(tokenizer, it.front + body, bos=it.bos), max(room - len(behind), 0)
        return head[:left] + behind, max(len(head) - left, 0)

    def conditioned(
        self, tokenizer: Tokenizer, feedback: str | None, prompt: str, room: int, texts: list[str]
    ) -> Fitted:
        """Token ids of a prompt asked with feedback, at most `room` of them.

        It is shortened once, for the longest of all `texts`: a group's answers saw the same post.
        InputError where the tokenizer makes one token of feedback and prompt.
        """
        mine, others = self.around(feedback), {self.around(text) for text in texts}
        ids, lost = self.fit(tokenizer, prompt, room, mine)
        if feedback is not None and not lost:
            self._check_apart(tokenizer, feedback, prompt, ids)
        most = max((len(self.text("", other).encode()) + other.bos for other in others), default=0)
        if len(ids) + most < room:
            return ids, lost  # a token is a byte at least: it fits with all of them
        most = max([lost, *(self.fit(tokenizer, prompt, room, other)[1] for other in others)])
        if most > lost:
            ids, lost = self.fit(tokenizer, prompt, len(ids) - (most - lost), mine)
        return ids, lost

    def _check_apart(
        self, tokenizer: Tokenizer, feedback: str, prompt: str, ids: list[int]
    ) -> None:
        body, _, last = self.split(prompt)
        parts = {"{prompt}": prompt, "{body}": body, "{last_line}": last, "{bos}": ""}
        sides = self.template.split("{feedback}")
        left, right = (HOLE.sub(lambda hole: parts[hole[0]], side) for side in sides)
        for text, goes_on in ((left, feedback), (left + feedback, right)):
            space = goes_on[: len(goes_on) - len(goes_on.lstrip())]
            begun = [
                text_ids(tokenizer, start, bos=self.template.startswith("{bos}"))
                for start in (text, text.rstrip(), text + space)
            ]
            if text.strip() and goes_on and not any(ids[: len(b)] == b for b in begun):
                problem = f"the tokenizer makes one token of {feedback!r} and what stands beside it"
                raise InputError(f"{problem}: part them by a space or a line", "domain.template")
