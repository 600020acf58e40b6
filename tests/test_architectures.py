"""Architectures: the same numbers as plain transformers, or refused before anything is queued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as tf

from alt_hpc import config as configs
from alt_hpc.config import Config
from alt_hpc.control import checks
from alt_hpc.errors import InputError
from alt_hpc.lm import check, decode, load, reading, save, tokens
from alt_hpc.training import losses
from alt_hpc.training.examples import Example

_PLAIN: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
_FEW: dict[str, Any] = {
    k: v for k, v in _PLAIN.items() if k not in ("head_dim", "num_key_value_heads")
}
_GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_MIXED: dict[str, Any] = {
    **_PLAIN,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
_LOCAL: dict[str, Any] = {"attention_types": [[["global", "local"], 1]], "window_size": 8}
_OPT: dict[str, Any] = {**_FEW, "ffn_dim": 64, "word_embed_proj_dim": 32}

USED: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "phi", "phi3"], _PLAIN
    ),
    **dict.fromkeys(["stablelm", "olmo", "olmo2", "starcoder2", "smollm3", "glm4"], _PLAIN),
    **dict.fromkeys(["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"], _MIXED),
    "gpt_neox": _FEW,
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gptj": {**_GPT, "rotary_dim": 4},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, **_LOCAL},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "opt": _OPT,
    "falcon": _FEW,
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    "granite": {**_PLAIN, "logits_scaling": 1.0},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {  # and a word of the sentence
    "gemma2": (_PLAIN, "final_logit_softcapping"),
    "cohere": (_PLAIN, "logit_scale"),
    "cohere2": (_PLAIN, "logit_scale"),
    "granite": ({**_PLAIN, "logits_scaling": 8.0}, "logits_scaling"),
    "mamba": ({"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}, "cannot share"),
    "lfm2": (
        {**_FEW, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
        "share",
    ),
    "rwkv": ({"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32}, "share"),
    "biogpt": (_FEW, "cannot be tried"),
}
PROMPTS = [list(range(40, 60)), [5, 6, 7]]
NEW = 12


def made(place: Path, name: str, settings: dict[str, Any]) -> Path:
    """A tiny random model of an architecture, with a tokenizer."""
    ends = {"bos_token_id": tiny.EOS, "eos_token_id": tiny.EOS, "pad_token_id": None}
    config = tf.AutoConfig.for_model(name, **{"vocab_size": tiny.VOCABULARY, **ends, **settings})
    torch.manual_seed(7)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0 if weight.dim() > 1 else 1.0)
    model.save_pretrained(place)
    tiny.tokenizer().save_pretrained(place)
    return place


def asked(config: Path, place: Path) -> Config:
    """A config whose policy is a model."""
    settings = [f"policy.model={place}", "policy.max_length=200", "train.trained_blocks=0.5"]
    return configs.load(config, settings)


@pytest.mark.parametrize("name", USED)
def test_the_same_numbers_as_plain_transformers(
    name: str, tiny_config: Path, tmp_path: Path
) -> None:
    place = made(tmp_path / "policy", name, USED[name])
    checks.places(asked(tiny_config, place))
    model = load.policy(place, "float32", torch.device("cpu"))
    plain = tf.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()

    answers = decode.generate(
        model, PROMPTS, 1, [0, 0], temperature=0, top_p=1.0, max_new_tokens=NEW, eos=[tiny.EOS]
    )
    assert [one.ids for (one,) in answers] == [_greedy(plain, prompt) for prompt in PROMPTS]

    found = reading.continuation_logprobs(model, PROMPTS[0], [[1, 2, 3], [4]])
    for answer, ours in zip([[1, 2, 3], [4]], found, strict=True):
        assert ours == pytest.approx(_logprobs(plain, PROMPTS[0], answer), abs=1e-4)

    examples = [Example([*PROMPTS[0], 1, 2, 3], 20), Example([5, 6, 7, 8], 2)]
    loss, _ = losses.sft_loss(model, Example.batch(examples, 5))
    theirs = _logprobs(plain, PROMPTS[0], [1, 2, 3]) + _logprobs(plain, [5, 6], [7, 8])
    assert float(loss) == pytest.approx(-sum(theirs), abs=1e-3)

    exported = tmp_path / "export"
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    tokenizer = load.tokenizer(place)
    ends = tokens.all_ends(place, tokenizer)
    save.policy(exported, model.config, weights, tokenizer, "float32", "", ends)
    check.weights(exported)
    again = tf.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    with torch.no_grad():
        ids = torch.tensor([PROMPTS[0]])
        torch.testing.assert_close(again(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_submission(name: str, tiny_config: Path, tmp_path: Path) -> None:
    settings, word = REFUSED[name]
    place = made(tmp_path / "policy", name, settings)
    with pytest.raises(InputError, match=rf"policy\.model: .*{word}"):
        checks.places(asked(tiny_config, place))


@torch.no_grad()
def _greedy(model: Any, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + NEW and ids[-1:] != [tiny.EOS]:
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@torch.no_grad()
def _logprobs(model: Any, prompt: list[int], answer: list[int]) -> list[float]:
    logits = model(torch.tensor([prompt + answer]), use_cache=False).logits[0]
    found = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
    values: list[float] = found.gather(-1, torch.tensor(answer)[:, None])[:, 0].tolist()
    return values
