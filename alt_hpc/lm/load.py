"""Load models and tokenizers: every weight from the folder, none made up."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from alt_hpc.errors import InputError, said
from alt_hpc.lm import cpu
from alt_hpc.lm.fetch import weight_files

transformers.utils.logging.disable_progress_bar()  # jobs write to log files
transformers.utils.logging.set_verbosity_error()

_HERE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


@contextlib.contextmanager
def blaming(problem: str) -> Iterator[None]:
    """Whatever a broken folder makes transformers, torch or pickle raise is wrong input."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{problem} ({said(error)})") from error


def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; InputError where it has none."""
    with blaming(f"{folder}: no tokenizer can be loaded from here"):
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **_HERE)
    return found


def config(folder: Path) -> PretrainedConfig:
    """The `config.json` of a folder; InputError where it has none that transformers knows."""
    with blaming(f"{folder}/config.json: no model configuration"):
        found: PretrainedConfig = AutoConfig.from_pretrained(folder, **_HERE)
    return found


def policy(folder: Path, dtype: str, device: torch.device) -> PreTrainedModel:
    """A causal language model in evaluation mode, every weight read from the folder.

    `dtype` is `float32`, `bfloat16` or `float16`. InputError where configuration or weights are
    missing or of the wrong shape (transformers would fill those with random numbers).
    """
    return whole(AutoModelForCausalLM, folder, dtype, device)


def whole(
    auto: Any,
    folder: Path,
    dtype: str,
    device: torch.device,
    *,
    shape: PretrainedConfig | None = None,
    new: Collection[str] = (),
) -> PreTrainedModel:
    """As `policy`, for any of transformers' `AutoModel...` classes.

    With another config than the folder's (`shape`), weights that the folder cannot have may be
    `new`. Attention is left to transformers: sdpa where the architecture has it (GPT-J has not).
    """
    shape = shape or config(folder)
    file = weight_files(folder)[0]
    with blaming(f"{file}: the weights cannot be loaded"):
        model, info = auto.from_pretrained(
            folder, config=shape, dtype=getattr(torch, dtype), output_loading_info=True, **_HERE
        )
    if missing := set(info["missing_keys"]) - set(new):
        raise InputError(f"{file}: the weight {min(missing)} is missing")
    return ready(model, device)


def ready(model: Any, device: torch.device) -> PreTrainedModel:
    """The model on its device, in evaluation mode, its weights not to be trained."""
    if device.type == "cpu":
        cpu.keep_freed_memory()
    moved: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    return moved


def empty(shape: PretrainedConfig, auto: Any, dtype: str = "float32") -> PreTrainedModel:
    """The model of a config without memory for its weights."""
    kind = auto.__name__.removeprefix("AutoModelFor")
    problem = f"{shape.name_or_path}/config.json: no {kind} can be made of it"
    with blaming(problem), torch.device("meta"):
        model: PreTrainedModel = auto.from_config(shape, dtype=getattr(torch, dtype))
    return model


def shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights that a checkpoint must hold: a tied one may be absent."""
    tied = getattr(model, "all_tied_weights_keys", {})
    return {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in tied}


def assembled(
    auto: Any, shape: PretrainedConfig, weights: Mapping[str, Tensor], dtype: str, folder: Path
) -> PreTrainedModel:
    """A model made of given weights, without initialising others first.

    InputError where a weight is missing, unknown or of the wrong shape.
    """
    model = empty(shape, auto, dtype)
    expected = shapes(model)
    tied = getattr(model, "all_tied_weights_keys", {})
    for name in expected.keys() ^ (weights.keys() - tied.keys()):
        problem = "missing" if name in expected else "unknown to this architecture"
        raise InputError(f"{folder}: the weight {name} is {problem}")
    for name, wanted in expected.items():
        given = tuple(weights[name].shape)
        if given != wanted:
            raise InputError(f"{folder}: the weight {name} has shape {given}, not {wanted}")
    exact = getattr(torch, dtype)
    kept = {name: weights[name].detach().to("cpu", exact).contiguous() for name in expected}
    made: PreTrainedModel = type(model).from_pretrained(
        None, config=shape, state_dict=kept, dtype=exact
    )
    return made


def pickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a `.bin` file, memory-mapped; nothing else is unpickled."""
    with blaming(f"{file}: the weights cannot be read"):
        state = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise InputError(f"{file}: the weights cannot be read (not a mapping of names to tensors)")
    return state
