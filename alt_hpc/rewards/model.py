"""model: a reward model ranks generations; sequence classification, or CarperAI's format."""

from typing import Literal

from alt_hpc.errors import blaming
from alt_hpc.rewards.reward import Found, Given, Named, Reward, Scorer
from alt_hpc.settings import Count, Dtype

# Tokens read at once behind a prompt that is read by itself; measured (tests/gpu/results.md).
AT_ONCE = {"cpu": 640, "cuda": 2048}


class Settings(Reward):
    """A sequence-classification folder or one in CarperAI's format; the folder tells which."""

    kind: Literal["model"] = "model"
    model: str | None = None
    """Hub name or folder; none: the `reward-model` stage makes it."""
    base: str | None = None
    """The architecture of a CarperAI checkpoint, or what `reward-model` starts from."""
    tokenizer: str | None = None
    template: str | None = None
    """Around {prompt} and {summary}; by default the checkpoint's kind decides (see heads.py)."""
    max_length: Count = 550
    dtype: Dtype = "float32"

    @property
    def trained(self) -> bool:
        return self.model is None

    def named(self) -> dict[str, Named]:
        named = {"model": self.model, "base": self.base, "tokenizer": self.tokenizer}
        whole = "base" if self.trained else "model"
        return {key: Named(name, key == whole) for key, name in named.items() if name}

    def check(self, found: Found) -> None:
        from alt_hpc.rewards import heads  # imports torch

        places = {key: found.place(key) for key in self.named()}
        with blaming(".base" if self.trained else ".model"):
            heads.check(self, found.domain, found.new_tokens, places)

    def load(self, given: Given) -> Scorer:
        from alt_hpc.rewards import heads

        if self.trained:  # what the run has made has a tokenizer of its own
            assert given.made is not None
            places = {"model": given.made}
        else:
            places = {key: given.place(key) for key in self.named()}
        return heads.load_reward_model(self, given.domain, given.new_tokens, places, given.device)
