"""Reward models: a value head on a decoder; a prompt's answers share their common beginning."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification

from alt_hpc.domains import Domain
from alt_hpc.errors import InputError
from alt_hpc.lm import check as lm_check
from alt_hpc.lm import load, prefix, tokens
from alt_hpc.lm import save as lm_save
from alt_hpc.rewards import text
from alt_hpc.rewards.text import Text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from alt_hpc.rewards.model import Settings

_HEAD = "v_head.weight"
_TRUNK = "transformer."
_IGNORED = (".attn.bias", ".attn.masked_bias")  # causal masks that old GPT-J files carry
_BUDGET = {"cpu": 640, "cuda": 16384}  # tokens read at once, behind the prompt; measured on CPUs


@dataclass(frozen=True)
class Trunk:
    """A decoder without a head, and the text it reads."""

    model: PreTrainedModel
    text: Text

    @torch.no_grad()
    def hidden(self, prompt: str, summaries: list[str]) -> tuple[Tensor, bool]:
        """The state [texts, hidden] at each last token, float32; whether the prompt was shortened.

        The common beginning is computed once, and the rest is padded only on the right, behind the
        token that counts: one text scored alone gives the same.
        """
        texts, shortened = self.text.ids(prompt, summaries)
        width: int = self.model.config.get_text_config().hidden_size
        hidden = torch.empty(len(texts), width, dtype=torch.float32, device=self.model.device)
        if not texts:
            return hidden, shortened
        common = _common(texts)
        rests = [ids[common:] for ids in texts]
        budget = _BUDGET.get(self.model.device.type, 1024)
        for i, states in prefix.outputs(self.model, texts[0][:common], rests, budget):
            hidden[i] = states[-1].float()
        return hidden, shortened


def _common(texts: list[list[int]]) -> int:
    """Length of the beginning that all texts share; each keeps at least one token behind it."""
    first, last = min(texts), max(texts)  # in the order of lists, all others lie between
    shared = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return min([next(shared, len(first)), *(len(ids) - 1 for ids in texts)])


@dataclass(frozen=True)
class RewardModel:
    """A trunk and its value head."""

    trunk: Trunk
    head: Tensor  # [1, hidden], float32

    def score(self, prompt: str, summaries: list[str]) -> tuple[list[float], bool]:
        """Rewards (may be no numbers) of a plain prompt's summaries; whether it was shortened."""
        hidden, shortened = self.trunk.hidden(prompt, summaries)
        # One head product per text: a matrix product's rounding may depend on its rows.
        rewards: list[float] = (hidden * self.head).sum(-1).tolist()
        return rewards, shortened


@dataclass(frozen=True)
class _Checkpoint:
    """Where the parts of a reward model on disk are."""

    config: Path  # the folder of its architecture
    tokenizer: Path
    carperai: dict[str, Tensor] | None = None  # the weights, memory-mapped, if in that format

    def text(self, settings: Settings, domain: Domain, new: int) -> Text:
        carperai = self.carperai is not None
        return text.of(self.tokenizer, settings, domain, new, carperai=carperai)


def _found(places: Mapping[str, Path]) -> _Checkpoint:
    """What the folder of `model` holds; `base` and `tokenizer` have what it lacks."""
    folder, base = places["model"], places.get("base")
    own = folder if (folder / "tokenizer_config.json").is_file() else base
    home = places.get("tokenizer") or own or folder
    for file in (folder / "pytorch_model.bin", folder / "model.safetensors"):
        if file.is_file() and _HEAD in (state := load.tensors(file)):
            if base is None and not (folder / "config.json").is_file():
                problem = f"{folder}: CarperAI's format needs it, for its architecture"
                raise InputError(problem, ".base")
            return _Checkpoint(base or folder, home, state)
    return _Checkpoint(folder, home)


def load_reward_model(
    settings: Settings,
    domain: Domain,
    max_new_tokens: int,
    places: Mapping[str, Path],
    device: torch.device,
) -> RewardModel:
    """The reward model in the folder `places["model"]`, which tells of which kind it is.

    A Hugging Face sequence-classification folder with one label scores `{prompt} {summary}` + EOS
    at the EOS. CarperAI's format (the trunk of a GPT-J under `transformer.` and `v_head.weight`
    [1, hidden]; its architecture is the config of `base`) scores
    `<|startoftext|>{prompt} {summary}<|endoftext|>` at the token before the first
    `<|endoftext|>`; its prompts end in `TL;DR:`. `settings.template` replaces the text before
    the EOS. `max_new_tokens` are kept free for a summary when a prompt is shortened.

    InputError where there is no such model, a weight is missing, unknown or of the wrong shape,
    or the template is bad.
    """
    folder, found = places["model"], _found(places)
    if found.carperai is None:
        whole = load.whole(AutoModelForSequenceClassification, folder, settings.dtype, device)
        model: PreTrainedModel = getattr(whole, whole.base_model_prefix)
        head: Tensor = score_of(whole, folder).weight
    else:
        model, head = _carperai(folder, found.carperai, found.config, settings.dtype)
        model = load.ready(model, device)
    trunk = Trunk(model, found.text(settings, domain, max_new_tokens))
    return RewardModel(trunk, head.to(device, torch.float32))


def _carperai(
    folder: Path, state: dict[str, Tensor], config: Path, dtype: str
) -> tuple[PreTrainedModel, Tensor]:
    head, shape = state[_HEAD], load.config(config)
    names = state.keys() - {_HEAD}
    if strange := [name for name in names if not name.startswith(_TRUNK)]:
        raise InputError(f"{folder}: the weight {min(strange)} is unknown to CarperAI's format")
    kept = {n.removeprefix(_TRUNK): state[n] for n in names if not n.endswith(_IGNORED)}
    model = load.assembled(AutoModel, shape, kept, dtype, folder)
    given, wanted = tuple(head.shape), (1, shape.hidden_size)
    if given != wanted:
        raise InputError(f"{folder}: {_HEAD} has shape {given}, not {wanted}")
    return model, head


def check(
    settings: Settings, domain: Domain, max_new_tokens: int, places: Mapping[str, Path]
) -> None:
    """Raise InputError where a reward model cannot be loaded or made, or a weight is not finite."""
    folder, most = places["base" if settings.trained else "model"], settings.max_length
    if settings.trained:
        found = _Checkpoint(folder, places.get("tokenizer", folder))
    else:
        found = _found(places)
    for name, tensor in (found.carperai or {}).items():
        lm_check.finite(folder, name, tensor)
    shape = load.config(found.config)
    if found.carperai is None:
        lm_check.weights(folder)
        if not settings.trained and shape.num_labels != 1:
            raise InputError(f"{folder}: not a reward model: expected one label")
        shape.num_labels = 1
        score_of(load.empty(shape, AutoModelForSequenceClassification), folder)
    found.text(settings, domain, max_new_tokens)
    if most > (context := tokens.context_length(shape, unknown=most)):
        raise InputError(f"{most}, but {found.config} reads {context} tokens", ".max_length")


def score_of(model: PreTrainedModel, folder: Path) -> nn.Linear:
    """The head of a decoder with one label."""
    head: nn.Linear | None = getattr(model, "score", None)
    if getattr(head, "weight", None) is None or head is None or head.weight.shape[0] != 1:
        raise InputError(
            f"{folder}: not a reward model: expected a decoder with one label (score.weight of"
            " shape [1, hidden])"
        )
    return head


def load_trunk(folder: Path, words: Text, dtype: str, device: torch.device) -> Trunk:
    """The trunk of a causal language model, reading what `words` says."""
    return Trunk(load.whole(AutoModel, folder, dtype, device), words)


def classifier(folder: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A causal language model as a sequence classifier whose head is zero, in float32 on the CPU.

    Plain transformers scores the last token that is not padding. Where padding and EOS are the
    same token it would skip the EOS: then the model names no padding token, and plain
    transformers scores one text at a time.
    """
    shape = load.config(folder)
    shape.num_labels = 1
    if shape.pad_token_id == tokenizer.eos_token_id:
        shape.pad_token_id = None
    auto, cpu = AutoModelForSequenceClassification, torch.device("cpu")
    model = load.whole(auto, folder, "float32", cpu, shape=shape, new=("score.weight",))
    nn.init.zeros_(score_of(model, folder).weight)
    return model


# A sequence classifier made of (config, weights, dtype, folder), see `load.assembled`.
assembled = functools.partial(load.assembled, AutoModelForSequenceClassification)


def save(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, card: str
) -> None:
    """Write a sequence-classification folder."""
    lm_save.whole(folder, model, tokenizer, f"# Reward model\n{card}\n")
