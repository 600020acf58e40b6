"""Score texts with a reward model: a prompt's generations together, their common beginning once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from alt_hpc import config, models, packed
from alt_hpc.errors import InputError
from alt_hpc.generate import read

CARPERAI_TEMPLATE = "<|startoftext|>{prompt} {summary}"
PLAIN_TEMPLATE = "{prompt} {summary}"

_HEAD = "v_head.weight"
_TRUNK = "transformer."
_IGNORED = (".attn.bias", ".attn.masked_bias")  # causal masks that old GPT-J files carry
_BUDGET = {"cpu": 640, "cuda": 16384}  # tokens read at once, behind the prompt; measured on CPUs


# --- the text ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """How prompt and summary become the token ids whose last one is scored.

    Attributes
    ----------
    before, between, after
        The template around `{prompt}` and `{summary}`. The token of `eos` ends the text: of what
        follows the prompt, the first one counts, also where a summary contains it.
    scores_eos
        Whether that EOS itself is scored (sequence classification) or the token before it
        (CarperAI).
    max_length, max_new_tokens
        A prompt is cut to the room that the template and a summary of max_new_tokens leave in
        max_length, whatever its summaries: all generations of a prompt see the same prompt.
    """

    tokenizer: PreTrainedTokenizerBase
    before: str
    between: str
    after: str
    eos: int
    scores_eos: bool
    max_length: int
    max_new_tokens: int

    def ids(self, prompt: str, summaries: list[str]) -> tuple[list[list[int]], bool]:
        """Token ids of each text, and whether the prompt was cut (see `models.fit_prompt`).

        Summaries are stripped. One that is longer than foreseen loses its end.
        """
        head, lost = models.fit_prompt(self.tokenizer, self.before, prompt, self.room)
        room = self.max_length - len(head)
        return [head + self._shortened(self._tail(s), room) for s in summaries], lost > 0

    @property
    def room(self) -> int:
        """Tokens that template and prompt may have, so that a summary still fits."""
        return self.max_length - len(self._tail("")) - self.max_new_tokens

    def _tail(self, summary: str) -> list[int]:
        text = self.between + summary.strip() + self.after
        ids = models.continuation_ids(self.tokenizer, text)
        if self.eos in ids:
            ids = ids[: ids.index(self.eos)]
        return [*ids, self.eos] if self.scores_eos else ids

    def _shortened(self, tail: list[int], room: int) -> list[int]:
        if len(tail) <= room:
            return tail
        return [*tail[: room - 1], self.eos] if self.scores_eos else tail[:room]


def _text(
    tokenizer: PreTrainedTokenizerBase,
    settings: config.RewardModel,
    template: str,
    max_new_tokens: int,
    *,
    scores_eos: bool,
) -> Text:
    template = settings.template or template
    if template.count("{prompt}") != 1 or template.count("{summary}") != 1:
        raise InputError(
            f"{template!r} must hold {{prompt}} and {{summary}} once", "reward_model.template"
        )
    before, _, rest = template.partition("{prompt}")
    between, mark, after = rest.partition("{summary}")
    if not mark:
        raise InputError(f"{template!r} has {{summary}} before {{prompt}}", "reward_model.template")
    eos = tokenizer.eos_token_id
    if eos is None:
        raise InputError(f"{tokenizer.name_or_path}: the reward model's tokenizer has no EOS token")
    text = Text(
        tokenizer, before, between, after, eos, scores_eos, settings.max_length, max_new_tokens
    )
    if text.room <= len(models.text_ids(tokenizer, before)):
        raise InputError(
            f"{settings.max_length} tokens leave no room for a post beside the template and"
            f" {max_new_tokens} new tokens",
            "reward_model.max_length",
        )
    return text


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
        for i, states in read(self.model, texts[0][:common], rests, budget):
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
    settings: config.RewardModel,
    device: torch.device,
    *,
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
    text = _text_of_kind(carperai is not None, home, settings, max_new_tokens)
    return RewardModel(Trunk(packed.pack(model), text), head.to(device, torch.float32))


def check_reward_model(
    folder: Path,
    settings: config.RewardModel,
    *,
    max_new_tokens: int,
    base: Path | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Raise InputError where `load_reward_model` would, or a weight is not finite.

    One tensor is in memory at a time.
    """
    carperai = _carperai_state(folder)
    if carperai is None:
        models.check_weights(folder)
        if models.load_config(folder).num_labels != 1:
            raise InputError(f"{folder}: not a reward model: expected one label")
    for name, tensor in (carperai or {}).items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{folder}: the weight {name} is not finite everywhere")
    home = _tokenizer_home(folder, base, tokenizer)
    _text_of_kind(carperai is not None, home, settings, max_new_tokens)
    _check_context(folder if carperai is None else base or folder, settings)


def check_base(
    folder: Path,
    settings: config.RewardModel,
    *,
    max_new_tokens: int,
    tokenizer: Path | None = None,
) -> None:
    """Raise InputError where a reward model cannot be made of this causal language model."""
    models.check_weights(folder)
    words = models.load_tokenizer(tokenizer or folder)
    _text(words, settings, PLAIN_TEMPLATE, max_new_tokens, scores_eos=True)
    _check_context(folder, settings)


def _check_context(folder: Path, settings: config.RewardModel) -> None:
    context = models.context_length(models.load_config(folder), unknown=settings.max_length)
    if settings.max_length > context:
        raise InputError(
            f"{settings.max_length}, but {folder} reads {context} tokens", "reward_model.max_length"
        )


def _tokenizer_home(folder: Path, base: Path | None, tokenizer: Path | None) -> Path:
    own = folder if (folder / "tokenizer_config.json").is_file() else base
    return tokenizer or own or folder


def _text_of_kind(
    carperai: bool, home: Path, settings: config.RewardModel, max_new_tokens: int
) -> Text:
    template = CARPERAI_TEMPLATE if carperai else PLAIN_TEMPLATE
    tokenizer = models.load_tokenizer(home)
    return _text(tokenizer, settings, template, max_new_tokens, scores_eos=not carperai)


def load_trunk(
    folder: Path,
    settings: config.RewardModel,
    device: torch.device,
    *,
    max_new_tokens: int,
    tokenizer: Path | None = None,
) -> Trunk:
    """The trunk of a causal language model, reading what a sequence classifier made of it reads."""
    model = models.load_whole(AutoModel, folder, settings.dtype, device)
    words = models.load_tokenizer(tokenizer or folder)
    return Trunk(
        packed.pack(model), _text(words, settings, PLAIN_TEMPLATE, max_new_tokens, scores_eos=True)
    )


def _load_classifier(
    folder: Path, dtype: str, device: torch.device
) -> tuple[PreTrainedModel, Tensor]:
    model = models.load_whole(AutoModelForSequenceClassification, folder, dtype, device)
    head = getattr(getattr(model, "score", None), "weight", None)
    if head is None or head.shape[0] != 1:
        raise InputError(
            f"{folder}: not a reward model: expected a decoder with one label (score.weight of"
            " shape [1, hidden])"
        )
    return getattr(model, model.base_model_prefix), head


def _carperai_state(folder: Path) -> dict[str, Tensor] | None:
    """The state dict of a folder in CarperAI's format, memory-mapped; None for another folder."""
    for name in ("pytorch_model.bin", "model.safetensors"):
        file = folder / name
        if not file.is_file():
            continue
        if file.suffix == ".safetensors":
            with models.blaming_folder(f"{file}: the weights cannot be read"):
                state = load_file(file)
        else:
            state = models.load_pickled(file)
        if _HEAD in state:
            return state
    return None


def _load_carperai(
    folder: Path, state: dict[str, Tensor], base: Path | None, dtype: str, device: torch.device
) -> tuple[PreTrainedModel, Tensor]:
    if base is None and not (folder / "config.json").is_file():
        raise InputError(
            f"{folder}: CarperAI's format needs it, for its architecture", "reward_model.base"
        )
    architecture: PretrainedConfig = models.load_config(base or folder)
    weights = {
        name.removeprefix(_TRUNK): tensor
        for name, tensor in state.items()
        if name != _HEAD and not name.endswith(_IGNORED)
    }
    strange = [name for name in state if name != _HEAD and not name.startswith(_TRUNK)]
    if strange:
        raise InputError(f"{folder}: the weight {min(strange)} is unknown to CarperAI's format")
    model = models.assemble(AutoModel, architecture, weights, dtype, folder)
    head = state[_HEAD]
    if tuple(head.shape) != (1, architecture.hidden_size):
        raise InputError(
            f"{folder}: {_HEAD} has shape {tuple(head.shape)}, not (1, {architecture.hidden_size})"
        )
    return models.ready(model, device), head


# --- saving -----------------------------------------------------------------------------------


def save_sequence_classifier(
    folder: Path, trunk_folder: Path, head: Tensor, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write a causal language model's trunk with a value head as a sequence-classification folder.

    Parameters
    ----------
    head
        [1, hidden], as trained on `Trunk.hidden`.

    Notes
    -----
    Plain transformers scores the last token that is not padding. Where padding and EOS are the
    same token it would skip the EOS: then the folder names no padding token, and plain
    transformers scores one text at a time.
    """
    architecture = models.load_config(trunk_folder)
    trunk = models.load_whole(AutoModel, trunk_folder, "float32", torch.device("cpu"))
    architecture.num_labels = 1
    if architecture.pad_token_id == tokenizer.eos_token_id:
        architecture.pad_token_id = None
    prefix = models.empty(architecture, AutoModelForSequenceClassification).base_model_prefix + "."
    weights = {prefix + name: tensor for name, tensor in trunk.state_dict().items()}
    weights["score.weight"] = head
    model = models.assemble(
        AutoModelForSequenceClassification, architecture, weights, "float32", folder
    )
    card = f"# Reward model\nA value head on the last token of `{PLAIN_TEMPLATE}` + EOS.\n"
    models.save_folder(folder, model, tokenizer, card)
