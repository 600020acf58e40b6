"""Get, load, check and save models: hub names and folders to whole Hugging Face folders."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from alt_hpc import hub
from alt_hpc.errors import InputError

transformers.utils.logging.disable_progress_bar()  # jobs write to log files
transformers.utils.logging.set_verbosity_error()

_HUB_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
_LIGHT_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
_ANCHOR = ":"  # see continuation_ids


# --- getting ----------------------------------------------------------------------------------


def fetch(name: str) -> Path:
    """The folder of a model, downloaded where needed.

    Parameters
    ----------
    name
        A folder that holds weights, or a hub name `organisation/model`. A hub name is looked for
        in the local Hugging Face cache, then on the hub.

    Raises
    ------
    InputError
        The folder holds no weights, or the model can be had nowhere.
    """
    return _fetch(name, whole=True)


def fetch_light(name: str) -> Path:
    """As `fetch`, where configuration and tokenizer are all that is wanted of a model."""
    return _fetch(name, whole=False)


def _fetch(name: str, *, whole: bool) -> Path:
    folder = Path(name)
    if folder.is_dir():
        _check_folder(folder, whole=whole)
        return folder
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(f"{name}: no such model folder")
    return _from_cache(name, whole=whole) or _from_hub(name, whole=whole)


def _check_folder(folder: Path, *, whole: bool) -> None:
    if whole:
        weight_files(folder)
    elif not any((folder / name).is_file() for name in _LIGHT_FILES):
        raise InputError(f"{folder}: neither a model configuration nor a tokenizer is here")


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights, sorted: safetensors, else pytorch_model*.bin.

    A safetensors index names its files; otherwise every file counts.

    Raises
    ------
    InputError
        There are none, or one that the index names is missing.
    """
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        indexes = sorted(folder.glob(pattern + ".index.json"))
        files = sorted(folder.glob(pattern))
        if indexes:
            files = [folder / name for name in _named(indexes[0])]
        for file in files:
            if not file.is_file():
                raise InputError(f"{file}: named by {indexes[0].name}, but missing")
        if files:
            return files
    raise InputError(f"{folder}: no model weights here (*.safetensors or pytorch_model*.bin)")


def _named(index: Path) -> list[str]:
    """The files that an index of weights names, sorted."""
    weights = _json(index).get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(n, str) for n in weights.values()):
        raise InputError(f"{index}: weight_map must say which file holds each weight")
    return sorted(set(weights.values()))


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value


def _from_cache(name: str, *, whole: bool) -> Path | None:
    """The folder of a model of the hub in the local cache, as its main branch was last seen."""
    try:
        folder = Path(snapshot_download(name, local_files_only=True))
        _check_folder(folder, whole=whole)
    except (LocalEntryNotFoundError, InputError):
        return None
    return folder


def _from_hub(name: str, *, whole: bool) -> Path:
    why = hub.unreachable()
    if why is None:
        try:
            return _snapshot(name, whole=whole)
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            why = _reason(error)
    raise InputError(
        f"{name}: no such folder, and neither in the local Hugging Face cache nor on the hub"
        f" ({why})"
    )


def _snapshot(name: str, *, whole: bool) -> Path:
    """Download a model's root files, and its weights in one format only."""
    wanted = list(_HUB_FILES)
    if whole:
        files = HfApi().list_repo_files(name)
        safe = any(file.endswith(".safetensors") and "/" not in file for file in files)
        wanted.append("*.safetensors" if safe else "pytorch_model*.bin")
    print(f"getting {name} from {constants.ENDPOINT}...", flush=True)
    folder = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns="*/*"))
    _check_folder(folder, whole=whole)
    return folder


# --- loading ----------------------------------------------------------------------------------


@contextlib.contextmanager
def blaming_folder(problem: str) -> Iterator[None]:
    """Whatever a broken folder makes transformers, torch or pickle raise is wrong input."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{problem} ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    """What an error says, on one line; its name where it says nothing."""
    if isinstance(error, UnpicklingError):
        return "it holds more than tensors"
    return " ".join(str(error).split())[:300] or type(error).__name__


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; InputError where it has none."""
    with blaming_folder(f"{folder}: no tokenizer can be loaded from here"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    return tokenizer


def load_config(folder: Path) -> PretrainedConfig:
    """The `config.json` of a folder; InputError where it has none that transformers knows."""
    with blaming_folder(f"{folder}/config.json: no model configuration"):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    return config


def load_policy(folder: Path, dtype: str, device: torch.device) -> PreTrainedModel:
    """A causal language model in evaluation mode, every weight read from the folder.

    Parameters
    ----------
    dtype
        `float32`, `bfloat16` or `float16`.

    Raises
    ------
    InputError
        No configuration or weights, or weights missing or of the wrong shape (transformers
        would fill those with random numbers).
    """
    return load_whole(AutoModelForCausalLM, folder, dtype, device)


def load_whole(
    auto: Any,
    folder: Path,
    dtype: str,
    device: torch.device,
    *,
    config: PretrainedConfig | None = None,
    new: Collection[str] = (),
) -> PreTrainedModel:
    """As `load_policy`, for any of transformers' `AutoModel...` classes.

    With another config than the folder's, weights that the folder cannot have may be `new`.
    """
    config = config or load_config(folder)
    files = weight_files(folder)
    # Attention is left to transformers: sdpa where the architecture has it (GPT-J has not).
    with blaming_folder(f"{files[0]}: the weights cannot be loaded"):
        model, info = auto.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    missing = set(info["missing_keys"]) - set(new)
    if missing:
        raise InputError(f"{files[0]}: the weight {min(missing)} is missing")
    return ready(model, device)


def ready(model: Any, device: torch.device) -> PreTrainedModel:
    """The model on its device, in evaluation mode, its weights not to be trained."""
    moved: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    return moved


# --- checking ---------------------------------------------------------------------------------


def check_weights(folder: Path) -> None:
    """Raise InputError unless every weight of the architecture is there, whole and finite.

    The files are memory-mapped and read one tensor at a time. Tied weights may be absent, and
    the prefix of the base model too (`gpt2` on the hub is written without `transformer.`).
    """
    config = load_config(folder)
    files = weight_files(folder)
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for file in files:
        for name, tensor in _tensors(file):
            found[name] = (file, tuple(tensor.shape))
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise InputError(f"{file}: the weight {name} is not finite everywhere")
    model = empty(config, _architecture(config))
    if _is_converted(model):
        return  # the file's names differ from the model's: `load_policy` compares them
    for name, shape in _expected(model).items():
        _check_weight(name, shape, found, model, files[0])


def _check_weight(
    name: str,
    shape: tuple[int, ...],
    found: Mapping[str, tuple[Path, tuple[int, ...]]],
    model: PreTrainedModel,
    first: Path,
) -> None:
    short = name.removeprefix(model.base_model_prefix + ".")
    key = name if name in found else short
    if key not in found:
        raise InputError(f"{first}: the weight {name} is missing")
    file, given = found[key]
    if given != shape:
        raise InputError(f"{file}: the weight {name} has shape {given}, expected {shape}")


def _tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of everything in a weight file, mapped rather than read at once."""
    if file.suffix != ".safetensors":
        yield from sorted(load_pickled(file).items())
        return
    with (
        blaming_folder(f"{file}: the weights cannot be read"),
        safe_open(file, framework="pt") as source,
    ):
        for name in sorted(source.keys()):
            yield name, source.get_tensor(name)


def load_pickled(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.bin` file, memory-mapped; nothing else is unpickled."""
    with blaming_folder(f"{file}: the weights cannot be read"):
        state = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise InputError(f"{file}: the weights cannot be read (not a mapping of names to tensors)")
    return state


def empty(config: PretrainedConfig, auto: Any, dtype: str = "float32") -> PreTrainedModel:
    """The model of a config without memory for its weights."""
    kind = auto.__name__.removeprefix("AutoModelFor")
    with (
        blaming_folder(f"{config.name_or_path}/config.json: no {kind} can be made of it"),
        torch.device("meta"),
    ):
        model: PreTrainedModel = auto.from_config(config, dtype=getattr(torch, dtype))
    return model


def _architecture(config: PretrainedConfig) -> Any:
    """The `AutoModel...` class that a folder's config was written by."""
    written = (getattr(config, "architectures", None) or [""])[0]
    if written.endswith("ForSequenceClassification"):
        return AutoModelForSequenceClassification
    return AutoModelForCausalLM


def _expected(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights that a checkpoint must hold."""
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    state = model.state_dict()
    return {name: tuple(t.shape) for name, t in state.items() if name not in tied}


def _is_converted(model: PreTrainedModel) -> bool:
    """Whether transformers renames or merges this architecture's weights while loading."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return bool(get_model_conversion_mapping(model, add_legacy=False))


# --- saving -----------------------------------------------------------------------------------


def save_policy(
    folder: Path,
    config: PretrainedConfig,
    state_dict: Mapping[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    card: str,
    ends: Sequence[int],
    silent: Sequence[int] = (),
) -> None:
    """Write an ordinary Hugging Face folder; the same input gives the same bytes.

    Parameters
    ----------
    state_dict
        The weights of the causal language model; a tied one may be absent.
    dtype
        What they are stored as: `float32`, `bfloat16` or `float16`.
    card
        The text of README.md.
    ends, silent
        Token ids that end a generation, and those that are never generated.

    Raises
    ------
    InputError
        A weight is missing, unknown, or of the wrong shape.
    """
    config = type(config).from_dict(config.to_dict())
    model = assemble(AutoModelForCausalLM, config, state_dict, dtype, folder)
    model.generation_config = _generation_config(tokenizer, ends, silent)
    save_folder(folder, model, tokenizer, card)


def assemble(
    auto: Any,
    config: PretrainedConfig,
    state_dict: Mapping[str, torch.Tensor],
    dtype: str,
    folder: Path,
) -> PreTrainedModel:
    """A model made of given weights, without initialising others first."""
    model = empty(config, auto, dtype)
    expected = _expected(model)
    kept = {
        name: tensor.detach().to("cpu", getattr(torch, dtype)).contiguous()
        for name, tensor in state_dict.items()
        if name in expected
    }
    tied = getattr(model, "all_tied_weights_keys", {})
    for name in expected.keys() ^ (state_dict.keys() - tied.keys()):
        problem = "missing" if name in expected else "unknown to this architecture"
        raise InputError(f"{folder}: the weight {name} is {problem}")
    for name, tensor in kept.items():
        if tuple(tensor.shape) != expected[name]:
            shape = tuple(tensor.shape)
            raise InputError(f"{folder}: the weight {name} has shape {shape}, not {expected[name]}")
    made: PreTrainedModel = type(model).from_pretrained(
        None, config=config, state_dict=kept, dtype=getattr(torch, dtype)
    )
    return made


def save_folder(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, card: str
) -> None:
    """Write model, tokenizer and model card."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    for file in folder.glob("*.safetensors"):  # safetensors writes them for the owner alone
        shutil.copymode(folder / "README.md", file)


def _generation_config(
    tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], silent: Sequence[int]
) -> GenerationConfig:
    pad = tokenizer.pad_token_id
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else list(ends),
        pad_token_id=ends[0] if pad is None and ends else pad,
        suppress_tokens=list(silent) or None,
    )


# --- tokens -----------------------------------------------------------------------------------


def all_ends(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token that ends a generation of a folder's model, ascending.

    The tokenizer's, those of config.json, and those of generation_config.json (of chat models
    often several). Ids beyond the vocabulary are left out: small models inherit those of their
    big relatives.
    """
    config = load_config(folder)
    text = config.get_text_config()
    given = [tokenizer.eos_token_id, *(getattr(c, "eos_token_id", None) for c in (config, text))]
    if (folder / "generation_config.json").is_file():
        given.append(_json(folder / "generation_config.json").get("eos_token_id"))
    return _within_vocabulary(given, text.vocab_size)


def _within_vocabulary(given: Sequence[Any], size: int) -> tuple[int, ...]:
    ids = {i for ends in given for i in (ends if isinstance(ends, list) else [ends])}
    return tuple(sorted(i for i in ids if isinstance(i, int) and i < size))


def context_length(config: PretrainedConfig, unknown: int | None = None) -> int:
    """The most tokens that the model can read at once; where its config does not say, `unknown`.

    InputError where nothing says.
    """
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions"):
        length = getattr(text, name, None)
        if isinstance(length, int):
            return length
    if unknown is None:
        raise InputError(
            f"{config.name_or_path or config.model_type}: config.json names no context length"
            " (max_position_embeddings): set policy.max_length"
        )
    return unknown


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that begins a sequence: with BOS where the tokenizer adds one, no EOS."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer.encode("")[:1] == [bos]:
        return [bos, *ids]
    return ids


def continuation_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that goes on after another.

    Tokenised behind a colon, as prompts end in one: some tokenizers put a space in front of
    whatever begins a text.
    """
    anchor: list[int] = tokenizer.encode(_ANCHOR, add_special_tokens=False)
    ids: list[int] = tokenizer.encode(_ANCHOR + text, add_special_tokens=False)
    if ids[: len(anchor)] == anchor:
        return ids[len(anchor) :]
    return list(tokenizer.encode(text, add_special_tokens=False))  # the colon was merged


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], ends: Collection[int]) -> str:
    """The text of generated token ids, EOS and special tokens left out, stripped."""
    kept = [i for i in ids if i not in ends]
    return str(tokenizer.decode(kept, skip_special_tokens=True)).strip()
