"""What a domain is: how an example becomes text for policy and reward, and how it is shortened."""

from collections.abc import Mapping

from alt_hpc.lm.tokens import Tokenizer
from alt_hpc.settings import Settings

# (token ids, how many tokens of the prompt were left out: 0 where it fits)
Fitted = tuple[list[int], int]


class Domain(Settings):
    """Settings and texts. A prompt is raw text in every file of a run: feedback comes only here."""

    kind: str

    def check(self) -> None:
        """Raise InputError, with its field, where its settings contradict each other."""

    def example(self, row: Mapping[str, str]) -> dict[str, str]:
        """A row of a data set (columns `prompt` and others) as it is used: as it was read."""
        return dict(row)

    def before(self, feedback: str | None) -> str:
        """The text in front of a prompt that is asked with this feedback."""
        raise NotImplementedError

    def answer(self, label: str) -> str:
        """What is written behind a prompt: the text of a label."""
        return f" {label.strip()}"

    def fit(self, tokenizer: Tokenizer, before: str, prompt: str, room: int) -> Fitted:
        """Token ids of `before` + prompt, at most `room` of them (at least 1): shortened."""
        raise NotImplementedError

    def conditioned(
        self, tokenizer: Tokenizer, feedback: str | None, prompt: str, room: int, texts: list[str]
    ) -> Fitted:
        """Token ids of a prompt asked with feedback, at most `room` of them.

        It is shortened once, for the longest of all `texts`: a group's answers saw the same post.
        """
        mine, others = self.before(feedback), {self.before(text) for text in texts}
        ids, lost = self.fit(tokenizer, mine, prompt, room)
        if len(ids) + max((len(other.encode()) for other in others), default=0) < room:
            return ids, lost  # a token is a byte at least: it fits behind all of them
        most = max([lost, *(self.fit(tokenizer, other, prompt, room)[1] for other in others)])
        if most > lost:
            ids, lost = self.fit(tokenizer, mine, prompt, len(ids) - (most - lost))
        return ids, lost
