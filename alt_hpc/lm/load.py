"""Load models and tokenizers: every weight from the folder, none made up."""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from alt_hpc.errors import InputError, said
from alt_hpc.lm import cpu, gpu
from alt_hpc.lm.fetch import weight_files
from alt_hpc.lm.tokens import Tokenizer

transformers.utils.logging.disable_progress_bar()  # jobs write to log files
transformers.utils.logging.set_verbosity_error()

_HERE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


@contextlib.contextmanager
def refusing(problem: str) -> Iterator[None]:
    """Whatever a broken folder makes transformers, torch or pickle raise is wrong input."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{problem} ({said(error)})") from error


def tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder; InputError where it has none."""
    with refusing(f"{folder}: no tokenizer can be loaded from here"):
        return transformers.AutoTokenizer.from_pretrained(folder, **_HERE)


def config(folder: Path) -> PretrainedConfig:
    """The `config.json` of a folder; InputError where it has none that transformers knows."""
    with refusing(f"{folder}/config.json: no model configuration"):
        found: PretrainedConfig = transformers.AutoConfig.from_pretrained(folder, **_HERE)
    return found


def policy(folder: Path, dtype: str, device: torch.device) -> PreTrainedModel:
    """The causal language model of a folder, see `whole`."""
    return whole(transformers.AutoModelForCausalLM, folder, dtype, device)


def whole(
    auto: Any,
    folder: Path,
    dtype: str,  # float32, bfloat16 or float16
    device: torch.device,
    *,
    shape: PretrainedConfig | None = None,  # else the folder's
    new: Collection[str] = (),
) -> PreTrainedModel:
    """A model of any `AutoModel...`, in evaluation mode; only `new` weights are not the folder's.

    InputError where configuration or weights are missing or of the wrong shape (transformers would
    fill those with random numbers). Attention is left to transformers: sdpa where the architecture
    has it (GPT-J has not).
    """
    given: dict[str, Any] = {"config": shape or config(folder), "dtype": getattr(torch, dtype)}
    file = weight_files(folder)[0]
    with refusing(f"{file}: the weights cannot be loaded"):
        model, info = auto.from_pretrained(folder, output_loading_info=True, **given, **_HERE)
    if missing := set(info["missing_keys"]) - set(new):
        raise InputError(f"{file}: the weight {min(missing)} is missing")
    return ready(model, device)


def ready(model: Any, device: torch.device) -> PreTrainedModel:
    """The model on its device, in evaluation mode, its weights not to be trained."""
    gpu.quicken(type(model))
    if device.type == "cpu":
        cpu.quicken()
    moved: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    return moved


def empty(shape: PretrainedConfig, auto: Any, dtype: str = "float32") -> PreTrainedModel:
    """The model of a config without memory for its weights."""
    kind = auto.__name__.removeprefix("AutoModelFor")
    problem = f"{shape.name_or_path}/config.json: no {kind} can be made of it"
    with refusing(problem), torch.device("meta"):
        model: PreTrainedModel = auto.from_config(shape, dtype=getattr(torch, dtype))
    return model


def shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights that a checkpoint must hold: a tied one may be absent."""
    tied = getattr(model, "all_tied_weights_keys", {})
    return {n: tuple(t.shape) for n, t in model.state_dict().items() if n not in tied}


def assembled(
    auto: Any, shape: PretrainedConfig, weights: Mapping[str, Tensor], dtype: str, folder: Path
) -> PreTrainedModel:
    """A model made of weights; InputError where one is missing, unknown or of the wrong shape."""
    model, exact = empty(shape, auto, dtype), getattr(torch, dtype)
    expected, tied = shapes(model), getattr(model, "all_tied_weights_keys", {})
    for name in expected.keys() ^ {name for name in weights if name not in tied}:
        problem = "missing" if name in expected else "unknown to this architecture"
        raise InputError(f"{folder}: the weight {name} is {problem}")
    for name, wanted in expected.items():
        if (given := tuple(weights[name].shape)) != wanted:
            raise InputError(f"{folder}: the weight {name} has shape {given}, not {wanted}")
    kept = {name: weights[name].detach().to("cpu", exact).contiguous() for name in expected}
    return type(model).from_pretrained(None, config=shape, state_dict=kept, dtype=exact)


def tensors(file: Path) -> dict[str, Tensor]:
    """All of a weight file by its names, memory-mapped; nothing but tensors is unpickled."""
    with refusing(f"{file}: the weights cannot be read"):
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise InputError(f"{file}: the weights cannot be read (not a mapping of names to tensors)")
    return state
