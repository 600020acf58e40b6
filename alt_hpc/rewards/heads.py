"""Reward models: a value head on a decoder; a prompt's answers share their common beginning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from alt_hpc.domains import Domain
from alt_hpc.errors import InputError
from alt_hpc.lm import check as lm_check
from alt_hpc.lm import load, prefix, tokens
from alt_hpc.lm import save as lm_save
from alt_hpc.rewards import text
from alt_hpc.rewards.text import Text

if TYPE_CHECKING:
    from alt_hpc.rewards.model import Settings

_HEAD = "v_head.weight"
_TRUNK = "transformer."
_IGNORED = (".attn.bias", ".attn.masked_bias")  # causal masks that old GPT-J files carry
_BUDGET = {"cpu": 640, "cuda": 16384}  # tokens read at once, behind the prompt; measured on CPUs


# --- the models -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trunk:
    """A decoder without a head, and the text it reads."""

    model: PreTrainedModel
    text: Text

    @torch.no_grad()
    def hidden(self, prompt: str, summaries: list[str]) -> tuple[Tensor, bool]:
        """Last hidden state at each text's last token.

        The texts' common beginning is computed once, and the rest is padded only on the right,
        behind the token that counts: one text scored alone gives the same.

        Returns
        -------
        hidden
            [len(summaries), hidden], float32, on the model's device.
        cut
            Whether the prompt was too long and lost the end of its post.
        """
        texts, cut = self.text.ids(prompt, summaries)
        width: int = self.model.config.get_text_config().hidden_size
        hidden = torch.empty(len(texts), width, dtype=torch.float32, device=self.model.device)
        if not texts:
            return hidden, cut
        common = _common(texts)
        rests = [ids[common:] for ids in texts]
        budget = _BUDGET.get(self.model.device.type, 1024)
        for i, states in prefix.outputs(self.model, texts[0][:common], rests, budget):
            hidden[i] = states[-1].float()
        return hidden, cut


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
        """Rewards of one prompt's summaries, and whether the prompt had to be cut.

        The prompt is the plain one, never conditioned. A reward that is not a number is
        returned as it is.
        """
        hidden, cut = self.trunk.hidden(prompt, summaries)
        # One head product per text: a matrix product's rounding may depend on its rows.
        rewards: list[float] = (hidden * self.head).sum(-1).tolist()
        return rewards, cut


# --- loading ----------------------------------------------------------------------------------


def load_reward_model(
    folder: Path,
    settings: Settings,
    device: torch.device,
    *,
    domain: Domain,
    max_new_tokens: int,
    base: Path | None = None,
    tokenizer: Path | None = None,
) -> RewardModel:
    """A reward model of either kind; the folder tells which.

    A Hugging Face sequence-classification folder with one label scores
    `{prompt} {summary}` + EOS at the EOS. CarperAI's format (the trunk of a GPT-J under
    `transformer.` and `v_head.weight` [1, hidden]; its architecture is the config of `base`)
    scores `<|startoftext|>{prompt} {summary}<|endoftext|>` at the token before the first
    `<|endoftext|>`; its prompts end in `TL;DR:`. `settings.template` replaces the text before
    the EOS.

    Parameters
    ----------
    max_new_tokens
        Tokens that are kept free for a summary when a prompt is cut to `settings.max_length`.
    base, tokenizer
        Folders, where the model's own has no configuration or no tokenizer.

    Raises
    ------
    InputError
        No such model, a weight missing, unknown or of the wrong shape, or a bad template.
    """
    carperai = _carperai_state(folder)
    if carperai is not None:
        model, head = _load_carperai(folder, carperai, base, settings.dtype, device)
    else:
        model, head = _load_classifier(folder, settings.dtype, device)
    home = _tokenizer_home(folder, base, tokenizer)
    words = text.of_checkpoint(carperai is not None, home, domain, settings, max_new_tokens)
    return RewardModel(Trunk(model, words), head.to(device, torch.float32))


def check(
    settings: Settings, domain: Domain, max_new_tokens: int, found: Mapping[str, Path]
) -> None:
    """Raise InputError where a reward model cannot be loaded, or made, or a weight is not finite.

    One tensor is in memory at a time. `found` are the folders of the models that it names.
    """
    base, tokenizer = found.get("base"), found.get("tokenizer")
    if settings.trained:
        assert base is not None
        lm_check.weights(base)
        _check_head(base)
        text.of_base(base, settings, domain, max_new_tokens, tokenizer)
        _check_context(base, settings)
        return
    folder = found["model"]
    carperai = _carperai_state(folder)
    if carperai is None:
        lm_check.weights(folder)
        if load.config(folder).num_labels != 1:
            raise InputError(f"{folder}: not a reward model: expected one label")
        _check_head(folder)
    for name, tensor in (carperai or {}).items():
        lm_check.finite(folder, name, tensor)
    home = _tokenizer_home(folder, base, tokenizer)
    text.of_checkpoint(carperai is not None, home, domain, settings, max_new_tokens)
    _check_context(folder if carperai is None else base or folder, settings)


def _check_head(folder: Path) -> None:
    """Stop where no classifier with the head that we use can be made of a folder's config."""
    architecture = load.config(folder)
    architecture.num_labels = 1
    model = load.empty(architecture, AutoModelForSequenceClassification)
    score_of(model, folder)


def _check_context(folder: Path, settings: Settings) -> None:
    context = tokens.context_length(load.config(folder), unknown=settings.max_length)
    if settings.max_length > context:
        raise InputError(
            f"{settings.max_length}, but {folder} reads {context} tokens", ".max_length"
        )


def _tokenizer_home(folder: Path, base: Path | None, tokenizer: Path | None) -> Path:
    own = folder if (folder / "tokenizer_config.json").is_file() else base
    return tokenizer or own or folder


def load_trunk(folder: Path, words: Text, dtype: str, device: torch.device) -> Trunk:
    """The trunk of a causal language model, reading what `words` says."""
    return Trunk(load.whole(AutoModel, folder, dtype, device), words)


def _load_classifier(
    folder: Path, dtype: str, device: torch.device
) -> tuple[PreTrainedModel, Tensor]:
    model = load.whole(AutoModelForSequenceClassification, folder, dtype, device)
    return getattr(model, model.base_model_prefix), score_of(model, folder).weight


def score_of(model: PreTrainedModel, folder: Path) -> nn.Linear:
    """The head of a decoder with one label."""
    head: nn.Linear | None = getattr(model, "score", None)
    if getattr(head, "weight", None) is None or head is None or head.weight.shape[0] != 1:
        raise InputError(
            f"{folder}: not a reward model: expected a decoder with one label (score.weight of"
            " shape [1, hidden])"
        )
    return head


def _carperai_state(folder: Path) -> dict[str, Tensor] | None:
    """The state dict of a folder in CarperAI's format, memory-mapped; None for another folder."""
    for name in ("pytorch_model.bin", "model.safetensors"):
        file = folder / name
        if not file.is_file():
            continue
        if file.suffix == ".safetensors":
            with load.blaming(f"{file}: the weights cannot be read"):
                state = load_file(file)
        else:
            state = load.pickled(file)
        if _HEAD in state:
            return state
    return None


def _load_carperai(
    folder: Path, state: dict[str, Tensor], base: Path | None, dtype: str, device: torch.device
) -> tuple[PreTrainedModel, Tensor]:
    if base is None and not (folder / "config.json").is_file():
        raise InputError(f"{folder}: CarperAI's format needs it, for its architecture", ".base")
    architecture: PretrainedConfig = load.config(base or folder)
    weights = {
        name.removeprefix(_TRUNK): tensor
        for name, tensor in state.items()
        if name != _HEAD and not name.endswith(_IGNORED)
    }
    strange = [name for name in state if name != _HEAD and not name.startswith(_TRUNK)]
    if strange:
        raise InputError(f"{folder}: the weight {min(strange)} is unknown to CarperAI's format")
    model = load.assembled(AutoModel, architecture, weights, dtype, folder)
    head = state[_HEAD]
    if tuple(head.shape) != (1, architecture.hidden_size):
        raise InputError(
            f"{folder}: {_HEAD} has shape {tuple(head.shape)}, not (1, {architecture.hidden_size})"
        )
    return load.ready(model, device), head


# --- making and saving ------------------------------------------------------------------------


def classifier(folder: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A causal language model as a sequence classifier whose head is zero, in float32 on the CPU.

    Notes
    -----
    Plain transformers scores the last token that is not padding. Where padding and EOS are the
    same token it would skip the EOS: then the model names no padding token, and plain
    transformers scores one text at a time.
    """
    architecture = load.config(folder)
    architecture.num_labels = 1
    if architecture.pad_token_id == tokenizer.eos_token_id:
        architecture.pad_token_id = None
    auto, cpu = AutoModelForSequenceClassification, torch.device("cpu")
    model = load.whole(auto, folder, "float32", cpu, shape=architecture, new=("score.weight",))
    nn.init.zeros_(score_of(model, folder).weight)
    return model


def assembled(
    architecture: PretrainedConfig, weights: Mapping[str, Tensor], dtype: str, folder: Path
) -> PreTrainedModel:
    """A sequence classifier made of its weights."""
    return load.assembled(AutoModelForSequenceClassification, architecture, weights, dtype, folder)


def save(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, card: str
) -> None:
    """Write a sequence-classification folder."""
    lm_save.whole(folder, model, tokenizer, f"# Reward model\n{card}\n")
