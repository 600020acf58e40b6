"""Reward models: a value head on a decoder, the text it reads, their folders."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alt_hpc.domains import Domain
from alt_hpc.domains.domain import Around
from alt_hpc.errors import InputError
from alt_hpc.lm import check as lm_check
from alt_hpc.lm import load, reading, tokens
from alt_hpc.rewards.model import AT_ONCE, Settings
from alt_hpc.rewards.reward import Answers, Scored

CLASSIFIER = transformers.AutoModelForSequenceClassification
PLAIN_TEMPLATE = "{prompt} {summary}"
_HEAD, _TRUNK = "v_head.weight", "transformer."
_IGNORED = (".attn.bias", ".attn.masked_bias")  # causal masks that old GPT-J files carry


class Text:
    """How prompt and summary become the token ids whose last one is scored.

    Summaries are stripped. The first EOS behind the prompt ends the text, also within a summary.
    A prompt is shortened to what the template and a summary of `new` tokens leave of max_length,
    whatever its summaries: all generations of a prompt see the same prompt. InputError where
    `folder` has no tokenizer, or the template cannot be used.
    """

    def __init__(
        self, folder: Path, settings: Settings, domain: Domain, new: int, *, carperai: bool = False
    ) -> None:
        self.tokenizer, self.domain = load.tokenizer(folder), domain
        self.most, self.scores_eos = settings.max_length, not carperai  # or the token before EOS
        template = settings.template or ("<|startoftext|>" if carperai else "") + PLAIN_TEMPLATE
        if template.count("{prompt}") != 1 or template.count("{summary}") != 1:
            raise InputError(f"{template!r} must hold {{prompt}} and {{summary}} once", ".template")
        self.before, _, rest = template.partition("{prompt}")
        self.between, mark, self.after = rest.partition("{summary}")
        if not mark:
            raise InputError(f"{template!r} has {{summary}} before {{prompt}}", ".template")
        if self.tokenizer.eos_token_id is None:
            name = self.tokenizer.name_or_path
            raise InputError(f"{name}: the reward model's tokenizer has no EOS token")
        self.room = self.most - len(self._tail("", self.most)) - new
        if self.room <= len(tokens.text_ids(self.tokenizer, self.before)):
            problem = f"{self.most} tokens leave no room for a post beside the template and"
            raise InputError(f"{problem} {new} new tokens", ".max_length")

    def ids(self, prompt: str, summaries: Sequence[str]) -> tuple[list[list[int]], bool]:
        """Ids of each text (too long a summary loses its end); whether the prompt was shortened."""
        head, lost = self.domain.fit(self.tokenizer, prompt, self.room, Around(self.before))
        return [head + self._tail(s, self.most - len(head)) for s in summaries], lost > 0

    def _tail(self, summary: str, room: int) -> list[int]:
        text = self.between + summary.strip() + self.after
        ids, eos = tokens.continuation_ids(self.tokenizer, text), self.tokenizer.eos_token_id
        ids = ids[: ids.index(eos)] if eos in ids else ids
        return [*ids[: room - 1], eos] if self.scores_eos else ids[:room]


def _shared(texts: list[list[int]]) -> reading.Text:
    """What texts begin with, and what is left of each."""
    common = tokens.common(texts) if texts else 0
    return texts[0][:common] if texts else [], [ids[common:] for ids in texts]


@dataclass(frozen=True)
class Trunk:
    """A decoder without a head, and the text it reads."""

    model: PreTrainedModel
    text: Text

    @torch.no_grad()
    def hidden(self, asked: Iterable[tuple[str, Sequence[str]]]) -> Iterator[tuple[Tensor, bool]]:
        """Of prompts with summaries of each: the state [texts, hidden] at each last token, float32;
        whether the prompt was shortened.

        The common beginning is computed once, and the rest is padded only on the right, behind the
        token that counts: one text scored alone gives the same (but for rounding on a GPU).
        """
        width: int = self.model.config.get_text_config().hidden_size
        mine, again = itertools.tee(self.text.ids(prompt, texts) for prompt, texts in asked)
        budget = AT_ONCE.get(self.model.device.type, 1024)
        found = reading.read(self.model, map(_shared, (texts for texts, _ in again)), budget)
        for states, (texts, shortened) in zip(found, mine, strict=True):
            hidden = torch.empty(len(texts), width, dtype=torch.float32, device=self.model.device)
            for i, one in enumerate(states):
                hidden[i] = one[-1].float()
            yield hidden, shortened


@dataclass(frozen=True)
class RewardModel:
    """A trunk and its value head: the scorer of kind `model`."""

    trunk: Trunk
    head: Tensor  # [1, hidden], float32

    def score(self, groups: Iterable[Answers]) -> Iterator[Scored]:
        asked = ((answers.prompt, answers.texts) for answers in groups)
        for hidden, shortened in self.trunk.hidden(asked):
            # One head product per text: a matrix product's rounding may depend on its rows.
            yield Scored((hidden * self.head).sum(-1).tolist(), shortened=shortened)


def _found(places: Mapping[str, Path]) -> tuple[Path, Path, dict[str, Tensor] | None]:
    """Folders of architecture and tokenizer; the weights, memory-mapped, if in CarperAI's format.

    `base` and `tokenizer` have what the folder of `model` lacks; without one, `base` is trained.
    """
    base = places.get("base")
    folder = places.get("model") or places["base"]
    own = folder if base is None or (folder / "tokenizer_config.json").is_file() else base
    home = places.get("tokenizer", own)
    for file in (folder / "pytorch_model.bin", folder / "model.safetensors"):
        if "model" in places and file.is_file() and _HEAD in (state := load.tensors(file)):
            if base is None and not (folder / "config.json").is_file():
                problem = f"{folder}: CarperAI's format needs it, for its architecture"
                raise InputError(problem, ".base")
            return base or folder, home, state
    return folder, home, None


def load_reward_model(
    settings: Settings, domain: Domain, new: int, places: Mapping[str, Path], device: torch.device
) -> RewardModel:
    """The reward model in the folder `places["model"]`, which tells of which kind it is.

    A Hugging Face sequence-classification folder with one label scores `{prompt} {summary}` + EOS
    at the EOS. CarperAI's format (the trunk of a GPT-J under `transformer.` and `v_head.weight`
    [1, hidden]; its architecture is the config of `base`) scores
    `<|startoftext|>{prompt} {summary}<|endoftext|>` at the token before the first
    `<|endoftext|>`; its prompts end in `TL;DR:`. `settings.template` replaces the text before
    the EOS. InputError where there is no such model, or a weight is missing, unknown or of the
    wrong shape; and as `Text`.
    """
    folder, dtype = places["model"], settings.dtype
    config, home, state = _found(places)
    if state is None:
        whole = load.whole(CLASSIFIER, folder, dtype, device)
        model: PreTrainedModel = getattr(whole, whole.base_model_prefix)
        head: Tensor = score_of(whole, folder).weight
    else:
        shape, head = load.config(config), state.pop(_HEAD)
        if strange := [name for name in state if not name.startswith(_TRUNK)]:
            raise InputError(f"{folder}: the weight {min(strange)} is unknown to CarperAI's format")
        kept = {n.removeprefix(_TRUNK): t for n, t in state.items() if not n.endswith(_IGNORED)}
        model = load.assembled(transformers.AutoModel, shape, kept, dtype, folder)
        given, wanted = tuple(head.shape), (1, shape.hidden_size)
        if given != wanted:
            raise InputError(f"{folder}: {_HEAD} has shape {given}, not {wanted}")
        model = load.ready(model, device)
    trunk = Trunk(model, Text(home, settings, domain, new, carperai=state is not None))
    return RewardModel(trunk, head.to(device, torch.float32))


def check(settings: Settings, domain: Domain, new: int, places: Mapping[str, Path]) -> None:
    """Raise InputError where a reward model cannot be loaded or made, or a weight is not finite."""
    folder, most = places["base" if settings.trained else "model"], settings.max_length
    config, home, state = _found(places)
    for name, tensor in (state or {}).items():
        lm_check.finite(folder, name, tensor)
    shape = load.config(config)
    if state is None:
        lm_check.weights(folder)
        if not settings.trained and shape.num_labels != 1:
            raise InputError(f"{folder}: not a reward model: expected one label")
        shape.num_labels = 1
        score_of(load.empty(shape, CLASSIFIER), folder)
    Text(home, settings, domain, new, carperai=state is not None)
    if most > (context := tokens.context_length(shape, unknown=most)):
        raise InputError(f"{most}, but {config} reads {context} tokens", ".max_length")


def score_of(model: PreTrainedModel, folder: Path) -> nn.Linear:
    """The head of a decoder with one label."""
    head: nn.Linear | None = getattr(model, "score", None)
    if head is None or getattr(head, "weight", None) is None or head.weight.shape[0] != 1:
        problem = "expected a decoder with one label (score.weight of shape [1, hidden])"
        raise InputError(f"{folder}: not a reward model: {problem}")
    return head


def classifier(folder: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A causal language model as a sequence classifier whose head is zero, in float32 on the CPU.

    Plain transformers scores the last token that is not padding. Where padding and EOS are the
    same token it would skip the EOS: then the model names no padding token, and plain
    transformers scores one text at a time.
    """
    shape, cpu = load.config(folder), torch.device("cpu")
    shape.num_labels = 1
    if shape.pad_token_id == tokenizer.eos_token_id:
        shape.pad_token_id = None
    model = load.whole(CLASSIFIER, folder, "float32", cpu, shape=shape, new=("score.weight",))
    nn.init.zeros_(score_of(model, folder).weight)
    return model
