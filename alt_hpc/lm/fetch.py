"""Get a model's folder: a local one, the Hugging Face cache's, or the hub's."""

import contextlib
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from alt_hpc.errors import InputError, said


def fetch(name: str, *, whole: bool = True) -> Path:
    """The folder of a model, downloaded where needed.

    `name` is a folder, or a hub name `organisation/model`, which is looked for in the local
    Hugging Face cache, then on the hub. Not `whole`: configuration and tokenizer are enough.
    InputError where the folder holds no weights, or the model can be had nowhere.
    """
    if found := here(name, whole=whole):
        return found
    if (why := unreachable()) is None:
        wanted = ["*.json", "*.txt", "*.model", "*.jinja"]
        try:
            if whole:  # the weights in one format only
                files = HfApi().list_repo_files(name)
                safe = any(file.endswith(".safetensors") and "/" not in file for file in files)
                wanted.append("*.safetensors" if safe else "pytorch_model*.bin")
            print(f"getting {name} from {constants.ENDPOINT}...", flush=True)
            got = snapshot_download(name, allow_patterns=wanted, ignore_patterns="*/*")
            return _checked(got, whole)
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            why = said(error)
    raise InputError(
        f"{name}: no such folder, and neither in the local Hugging Face cache nor on the hub"
        f" ({why})"
    )


def here(name: str, *, whole: bool = True) -> Path | None:
    """As `fetch`, of a model that is on this machine; None where it would have to be downloaded."""
    if Path(name).is_dir():
        return _checked(name, whole)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(f"{name}: no such model folder")
    with contextlib.suppress(LocalEntryNotFoundError, InputError):
        return _checked(snapshot_download(name, local_files_only=True), whole)
    return None


def _checked(place: str, whole: bool) -> Path:
    folder = Path(place)
    if whole:
        weight_files(folder)
    light = ("config.json", "tokenizer.json", "tokenizer_config.json")
    if not whole and not any((folder / name).is_file() for name in light):
        raise InputError(f"{folder}: neither a model configuration nor a tokenizer is here")
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The weight files, sorted; InputError where there are none, or one of an index is missing."""
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        files = sorted(folder.glob(pattern))  # without an index every file counts
        for index in sorted(folder.glob(pattern + ".index.json"))[:1]:
            weights = read_json(index).get("weight_map")
            if not isinstance(weights, dict) or not all(type(n) is str for n in weights.values()):
                raise InputError(f"{index}: weight_map must say which file holds each weight")
            files = [folder / name for name in sorted(set(weights.values()))]
            for file in files:
                if not file.is_file():
                    raise InputError(f"{file}: named by {index.name}, but missing")
        if files:
            return files
    raise InputError(f"{folder}: no model weights here (*.safetensors or pytorch_model*.bin)")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model's folder."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value


def unreachable() -> str | None:
    """Why the hub cannot be asked, or None. Without this a missing network costs minutes."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        with contextlib.suppress(urllib.error.HTTPError):  # it answered
            urllib.request.urlopen(request, timeout=5.0).close()
    except (OSError, ValueError) as error:
        return f"{constants.ENDPOINT} cannot be reached: {getattr(error, 'reason', error)}"
    return None


@contextlib.contextmanager
def not_asked() -> Iterator[None]:
    """Have `datasets` look in its cache only, instead of asking the hub again and again."""
    import datasets

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
