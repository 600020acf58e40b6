"""The losses against plain computations over whole logits, on four architectures."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
)

from alt_hpc.errors import InputError
from alt_hpc.lm.blocks import train_top
from alt_hpc.stages.optimise import set_dropout
from alt_hpc.training.examples import Example, FeaturePair, Pair, Siblings, move
from alt_hpc.training.losses import alt_loss, feature_loss, pair_loss, sft_loss
from alt_hpc.training.reference import share_trunk

COMMON: dict[str, Any] = {
    "vocab_size": 61, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "num_labels": 1
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, **COMMON,
    ),
    "gptj": GPTJConfig(n_embd=24, n_layer=3, n_head=4, rotary_dim=4, n_positions=32, **COMMON),
    "neox": GPTNeoXConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, **COMMON
    ),
    "gpt2": GPT2Config(n_embd=24, n_layer=3, n_head=4, n_positions=32, **COMMON),
}  # fmt: skip
TEXTS = [[5, 9, 33, 60, 7, 1], [8, 2, 3], [44, 45, 46, 47, 48, 49, 50, 51, 1], [11, 12, 13, 1]]
EXAMPLES = [Example(ids, start) for ids, start in zip(TEXTS, (2, 1, 7, 3), strict=True)]
PAIRS = [Pair(TEXTS[0], TEXTS[1]), Pair(TEXTS[3], TEXTS[2])]


def _model(name: str, seed: int = 0, auto: Any = AutoModelForCausalLM) -> Any:
    torch.manual_seed(seed)
    model = auto.from_config(copy.deepcopy(CONFIGS[name]), dtype=torch.float32).eval()
    for parameter in model.parameters():  # the usual 0.02 would make all logits nearly equal
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    named = model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def _assert_same(model: nn.Module, ours: Tensor, plain: Tensor) -> None:
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    gradients, expected = _gradients(model, ours), _gradients(model, plain)
    assert gradients.keys() == expected.keys() != set()
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-5, atol=2e-5, msg=name)


def _plain(model: Any, reference: Any, examples: list[Example]) -> dict[str, Tensor]:
    """Sums of CE, H and KL from whole logits, one sequence at a time."""
    sums = {"ce": torch.zeros(()), "entropy": torch.zeros(()), "kl": torch.zeros(())}
    for example in examples:
        ids = torch.tensor([example.ids])
        logits = model(ids).logits[0, example.start - 1 : -1]
        p, log_p = logits.softmax(-1), logits.log_softmax(-1)
        log_q = reference(ids).logits[0, example.start - 1 : -1].log_softmax(-1).detach()
        targets = ids[0, example.start :]
        sums["ce"] = sums["ce"] + functional.cross_entropy(logits, targets, reduction="sum")
        sums["entropy"] = sums["entropy"] - (p * log_p).sum()
        sums["kl"] = sums["kl"] + (log_q.exp() * (log_q - log_p)).sum()
    return sums


@pytest.mark.parametrize("chunk", [512, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_alt_loss(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alt_hpc.training.examples.CHUNK", chunk)
    model, reference = _model(name), _model(name, seed=1)
    batch = Example.batch(EXAMPLES, most=9)
    assert batch.chunks == -(-9 // chunk)
    loss, parts = alt_loss(model, batch, entropy=0.06, kl=0.05, reference=reference)
    plain = _plain(model, reference, EXAMPLES)
    expected = plain["ce"] - 0.06 * plain["entropy"] + 0.05 * plain["kl"]
    for part, value in plain.items():
        torch.testing.assert_close(parts[part], value.detach(), rtol=1e-5, atol=1e-5)
        assert not parts[part].requires_grad
    _assert_same(model, loss, expected)
    assert all(parameter.grad is None for parameter in reference.parameters())


ANSWERS = [[5, 6, 1], [7], [8, 9, 10, 11, 1]]
FAMILIES = [Siblings([20, 21, 22, 23], ANSWERS), Siblings([30, 31], ANSWERS[1:])]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_siblings_are_as_sequences_apart(name: str, together: bool) -> None:
    model, reference = _model(name), _model(name, seed=1)
    families = [Siblings(f.prompt, f.answers, together) for f in FAMILIES]
    apart = [Example([*f.prompt, *a], len(f.prompt)) for f in FAMILIES for a in f.answers]
    batch = Siblings.batch(families, most=15)
    loss, parts = alt_loss(model, batch, kl=0.5, reference=reference)
    expected, plain = alt_loss(model, Example.batch(apart, most=15), kl=0.5, reference=reference)
    for part, value in plain.items():
        torch.testing.assert_close(parts[part], value, rtol=1e-5, atol=1e-5)
    _assert_same(model, loss, expected)
    assert sum(f.weight for f in families) == sum(e.weight for e in apart) == 15
    assert FAMILIES[0].tokens == 4 + 9


TAILED = [
    Siblings([20, 21, 22, 23], ANSWERS, tails=[[40, 41], [42], [40, 41, 42]]),
    Siblings([30, 31], ANSWERS[1:], tails=[[43], [44, 45]]),
]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_answers_behind_ends_of_their_own_are_as_sequences_apart(name: str, together: bool) -> None:
    """Feedback behind the prompt: all answers share one prompt, each has its own end of it."""
    model, reference = _model(name), _model(name, seed=1)
    families = [replace(family, together=together) for family in TAILED]
    apart = [
        Example([*f.prompt, *tail, *answer], len(f.prompt) + len(tail))
        for f in TAILED
        for tail, answer in zip(f.tails or [], f.answers, strict=True)
    ]
    loss, parts = alt_loss(model, Siblings.batch(families, most=15), kl=0.5, reference=reference)
    expected, plain = alt_loss(model, Example.batch(apart, most=15), kl=0.5, reference=reference)
    for part, value in plain.items():
        torch.testing.assert_close(parts[part], value, rtol=1e-5, atol=1e-5)
    _assert_same(model, loss, expected)
    assert sum(f.weight for f in families) == sum(e.weight for e in apart) == 15
    assert TAILED[0].tokens == 4 + 9 + 6
    assert [one.prompt for one in TAILED[0].alone()] == [e.prompt for e in apart[:3]]


@pytest.mark.parametrize("kind", ["apart", "together", "one by one"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_reference_that_reads_another_prompt_and_knows_fewer_tokens(name: str, kind: str) -> None:
    """Quark's: the reference reads the plain prompt, KL is over the old vocabulary alone."""
    model, reference, old = _model(name), _model(name, seed=1), 50
    plain = [[40, 41], [42, 43, 44, 45, 46, 47]]
    families = [
        Siblings(f.prompt, f.answers, kind == "together", p)
        for f, p in zip(FAMILIES, plain, strict=True)
    ]
    sums = {"ce": torch.zeros(()), "entropy": torch.zeros(()), "kl": torch.zeros(())}
    for family in families:
        assert family.plain is not None
        for answer in family.answers:
            ours = torch.tensor([[*family.prompt, *answer]])
            logits = model(ours).logits[0, len(family.prompt) - 1 : -1]
            theirs = torch.tensor([[*family.plain, *answer]])
            other = reference(theirs).logits[0, len(family.plain) - 1 : -1, :old].detach()
            p, log_p = logits.softmax(-1), logits.log_softmax(-1)
            log_q, log_old = other.log_softmax(-1), logits[:, :old].log_softmax(-1)
            targets = torch.tensor(answer)
            sums["ce"] = sums["ce"] + functional.cross_entropy(logits, targets, reduction="sum")
            sums["entropy"] = sums["entropy"] - (p * log_p).sum()
            sums["kl"] = sums["kl"] + (log_q.exp() * (log_q - log_old)).sum()
    if kind == "apart":
        examples = [example for family in families for example in family.alone()]
        batch = Example.batch(examples, most=15)
    else:
        batch = Siblings.batch(families, most=15)
    batch = move(batch, torch.device("cpu"))
    loss, parts = alt_loss(model, batch, kl=0.5, reference=reference, vocabulary=old)
    for part, value in sums.items():
        torch.testing.assert_close(parts[part], value.detach(), rtol=1e-5, atol=1e-5)
    _assert_same(model, loss, sums["ce"] - 0.06 * sums["entropy"] + 0.5 * sums["kl"])


def _as_policy(name: str, reference: Any) -> Any:
    """A policy whose top block alone has been trained, from the reference's weights."""
    policy = copy.deepcopy(reference)
    set_dropout(policy, 0.0)
    train_top(policy, 0.4, embeddings=False)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return policy


@pytest.mark.parametrize("name", CONFIGS)
def test_a_reference_that_goes_on_from_the_policys_trunk(name: str) -> None:
    whole = _model(name)
    policy, shared = _as_policy(name, whole), copy.deepcopy(whole)
    batch = Example.batch(EXAMPLES, most=9)
    expected, plain = alt_loss(policy, batch, kl=0.5, reference=whole)
    gradients = _gradients(policy, expected)
    assert share_trunk(policy, shared) == 2
    for _ in range(2):  # nothing of an earlier batch is left
        other = Example.batch(EXAMPLES[:2], most=9)
        alt_loss(policy, other, kl=0.5, reference=shared)
        loss, parts = alt_loss(policy, batch, kl=0.5, reference=shared)
    assert plain["kl"] > 0.01
    for part, value in plain.items():
        torch.testing.assert_close(parts[part], value, rtol=1e-6, atol=1e-6)
    for key, gradient in _gradients(policy, loss).items():
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-6, atol=1e-6, msg=key)
    low = getattr(shared.base_model, TRUNKS[name][0])[0]
    assert all(parameter.is_meta for parameter in low.parameters())  # its memory is free


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda policy: policy.requires_grad_(True), "every block is trained"),
        (lambda policy: train_top(policy, 0.4, embeddings=True), "embeddings are trained"),
        (lambda policy: setattr(policy.transformer.h[0].attn.attn_dropout, "p", 0.1), "drops out"),
        (lambda policy: policy.transformer.h[1].ln_1.weight.data.add_(0.1), "h.1.ln_1.weight"),
    ],
)
def test_a_trunk_that_is_not_the_references_is_not_shared(
    change: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    reference = _model("gpt2")
    policy = _as_policy("gpt2", reference)
    change(policy)
    assert share_trunk(policy, reference) == 0
    assert why in caplog.text
    alt_loss(policy, Example.batch(EXAMPLES, most=9), kl=0.5, reference=reference)


@pytest.mark.parametrize("name", CONFIGS)
def test_sft_loss(name: str) -> None:
    model = _model(name)
    loss, parts = sft_loss(model, Example.batch(EXAMPLES, most=9))
    assert list(parts) == ["ce", "entropy"]
    _assert_same(model, loss, _plain(model, model, EXAMPLES)["ce"])


@pytest.mark.parametrize("name", CONFIGS)
def test_pair_loss(name: str) -> None:
    model = _model(name, auto=AutoModelForSequenceClassification)
    # transformers looks for the last token that is not padding: none of ours may be its pad id
    pairs = [Pair([3 + i % 50 for i in p.chosen], [3 + i % 50 for i in p.rejected]) for p in PAIRS]
    loss, parts = pair_loss(model, Pair.batch(pairs, most=2))
    chosen = torch.cat([model(torch.tensor([pair.chosen])).logits[0] for pair in pairs])
    rejected = torch.cat([model(torch.tensor([pair.rejected])).logits[0] for pair in pairs])
    assert int(parts["accuracy"]) == int((chosen > rejected).sum())
    _assert_same(model, loss, -functional.logsigmoid(chosen - rejected).sum())


def test_feature_loss() -> None:
    torch.manual_seed(0)
    head, features = nn.Linear(7, 1, bias=False), torch.randn(5, 2, 7)
    pairs = [FeaturePair(pair) for pair in features]
    loss, parts = feature_loss(head, FeaturePair.batch(pairs, most=5))
    difference = head(features[:, 0] - features[:, 1])
    assert int(parts["accuracy"]) == int((difference > 0).sum())
    _assert_same(head, loss, -functional.logsigmoid(difference).sum())


@pytest.mark.parametrize(
    ("make", "loss", "example"),
    [
        (partial(_model, "llama"), sft_loss, EXAMPLES[0]),
        (
            partial(_model, "llama", auto=AutoModelForSequenceClassification),
            pair_loss,
            Pair([3, 4], [5]),
        ),
        (partial(_model, "llama"), sft_loss, FAMILIES[0]),
        (partial(_model, "llama"), sft_loss, Siblings([20, 21], ANSWERS, together=False)),
        (lambda: nn.Linear(7, 1, bias=False), feature_loss, FeaturePair(torch.ones(2, 7))),
    ],
)
def test_empty_example_teaches_nothing(make: Any, loss: Any, example: Any) -> None:
    """A rank without examples computes the same graph, with gradients that are there and 0."""
    model, empty = make(), example.empty()
    assert empty.weight == 0
    value, parts = loss(model, type(empty).batch([empty], most=1000))
    assert value.item() == 0
    assert all(part.item() == 0 for part in parts.values())
    gradients = _gradients(model, value)
    assert gradients
    assert not any(gradient.any() for gradient in gradients.values())


def test_weights_count_loss_tokens() -> None:
    assert [example.weight for example in EXAMPLES] == [4, 2, 2, 1]
    assert EXAMPLES[0].tokens == 6
    assert (PAIRS[0].weight, PAIRS[0].tokens) == (1, 9)


def test_kl_needs_a_reference() -> None:
    with pytest.raises(InputError, match="reference"):
        alt_loss(_model("gpt2"), Example.batch(EXAMPLES, most=9), kl=0.05)


def test_logits_changed_after_the_head_are_refused() -> None:
    model = _model("llama")
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(InputError, match="final_logit_softcapping"):
        sft_loss(model, Example.batch(EXAMPLES, most=9))


# --- Freezing -------------------------------------------------------------------------------------

TRUNKS = {
    "llama": ("layers", "norm.", "embed_tokens."),
    "gptj": ("h", "ln_f.", "wte."),
    "neox": ("layers", "final_layer_norm.", "embed_in."),
    "gpt2": ("h", "ln_f.", "wte."),
}


def _trained(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", CONFIGS)
def test_default_freezes_low_blocks_and_embeddings(name: str) -> None:
    model = _model(name)
    train_top(model, 0.7, embeddings=False)
    blocks, norm, embeddings = TRUNKS[name]
    prefix = model.base_model_prefix + "."
    trained = _trained(model)
    assert not any(key.startswith(f"{prefix}{blocks}.0.") for key in trained)
    assert any(key.startswith(f"{prefix}{blocks}.1.") for key in trained)
    assert any(key.startswith(f"{prefix}{blocks}.2.") for key in trained)
    assert f"{prefix}{norm}weight" in trained
    assert f"{prefix}{embeddings}weight" not in trained
    head = model.get_output_embeddings().weight
    assert head.requires_grad == (name != "gpt2")  # tied: frozen with the embeddings


@pytest.mark.parametrize("name", CONFIGS)
def test_frozen_blocks_store_no_graph(name: str) -> None:
    model = _model(name).train()
    train_top(model, 0.3, embeddings=False)
    needs: list[bool] = []
    for block in getattr(model.base_model, TRUNKS[name][0]):
        block.register_forward_hook(
            lambda module, inputs, output: needs.append(
                (output[0] if isinstance(output, tuple) else output).requires_grad
            )
        )
    sft_loss(model, Example.batch(EXAMPLES, most=9))
    assert needs == [False, False, True]


@pytest.mark.parametrize("name", CONFIGS)
def test_embeddings_and_head_on_request(name: str) -> None:
    model = _model(name)
    train_top(model, 0.1, embeddings=True)  # at least one block
    blocks = TRUNKS[name][0]
    prefix = model.base_model_prefix + "."
    frozen = {key for key, _ in model.named_parameters()} - _trained(model)
    assert frozen
    assert all(key.startswith((f"{prefix}{blocks}.0.", f"{prefix}{blocks}.1.")) for key in frozen)


def test_share_of_one_trains_every_block() -> None:
    model = _model("llama")
    train_top(model, 1.0, embeddings=True)
    assert _trained(model) == {name for name, _ in model.named_parameters()}


def test_share_that_binary_numbers_miss() -> None:
    config = GPT2Config(n_embd=4, n_layer=100, n_head=1, n_positions=8, **COMMON)
    model = GPT2LMHeadModel(config)
    train_top(model, 0.29, embeddings=False)  # 0.29 * 100 == 28.999999999999996
    first = [next(block.parameters()).requires_grad for block in model.transformer.h]
    assert first == [False] * 71 + [True] * 29


def test_freezing_needs_blocks() -> None:
    model = _model("llama")
    model.config.num_hidden_layers = 5
    with pytest.raises(InputError, match="5 transformer blocks"):
        train_top(model, 0.3, embeddings=False)
