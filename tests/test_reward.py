"""Tests of scoring against one-by-one, unshared computations."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification

from alt_hpc.domains import tldr
from alt_hpc.errors import InputError
from alt_hpc.lm import check, load, save
from alt_hpc.rewards import Answers, heads
from alt_hpc.rewards.heads import RewardModel, Trunk, load_reward_model
from alt_hpc.rewards.model import Settings

CPU = torch.device("cpu")
PROMPT = "SUBREDDIT: r/a\nTITLE: b\nPOST: my dog ate my homework\nTL;DR:"
SUMMARIES = ["dog ate it", "", "dog", "dog ate it", "a much longer summary of what the dog ate"]
EOT = "<|endoftext|>"
TLDR = tldr.Settings()


def _load(folder: Path, settings: Settings | None = None, **named: Path) -> RewardModel:
    return load_reward_model(settings or Settings(), TLDR, 48, {"model": folder, **named}, CPU)


def _trunk(folder: Path) -> Trunk:
    words = heads.Text(folder, Settings(), TLDR, 48)
    return Trunk(load.whole(AutoModel, folder, "float32", CPU), words)


def _score(model: RewardModel, prompt: str, summaries: list[str]) -> tuple[list[float], bool]:
    """Rewards of a prompt's summaries; whether the prompt was shortened."""
    (scored,) = model.score([Answers(prompt, summaries)])
    return list(scored.rewards), scored.shortened


def _save(folder: Path, policy: Path, head: torch.Tensor) -> None:
    """A classifier made of a policy and a head."""
    model = heads.classifier(policy, tiny.tokenizer())
    assert not heads.score_of(model, policy).weight.any()
    heads.score_of(model, policy).weight.data.copy_(head)
    save.whole(folder, model, tiny.tokenizer(), "a card")


# --- sequence classification ------------------------------------------------------------------


def _classifier(path: Path, name: str) -> Path:
    return tiny.folder(path, name, AutoModelForSequenceClassification, num_labels=1)


def _plain(folder: Path, text: str) -> float:
    """What plain transformers scores for one text."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        return float(model(torch.tensor([tiny.tokenizer().encode(text)])).logits[0, 0])


@pytest.mark.parametrize("name", ["llama", "gptj", "gpt_neox", "gpt2", "sliding", "bloom"])
def test_classifier_scores_as_plain_transformers_does(name: str, tmp_path: Path) -> None:
    folder = _classifier(tmp_path, name)
    rewards, cut = _score(_load(folder), PROMPT, SUMMARIES)
    expected = [_plain(folder, f"{PROMPT} {summary}{EOT}") for summary in SUMMARIES]
    assert rewards == pytest.approx(expected, abs=1e-5, rel=1e-5)
    assert not cut
    assert len(set(rewards)) == 4  # one summary is given twice
    assert _score(_load(folder), PROMPT, SUMMARIES)[0] == rewards


def test_scores_do_not_depend_on_company(tmp_path: Path) -> None:
    model = _load(_classifier(tmp_path, "llama"))
    many = [*SUMMARIES, *(f"{'word ' * i}end" for i in range(9)), *("x" * i for i in range(40))]
    together, _ = _score(model, PROMPT, many)
    alone = [_score(model, PROMPT, [summary])[0][0] for summary in many]
    assert together == pytest.approx(alone, abs=1e-5, rel=1e-5)
    assert _score(model, PROMPT, [])[0] == []


def test_summaries_are_stripped_and_the_first_eos_counts(tmp_path: Path) -> None:
    model = _load(_classifier(tmp_path, "llama"))
    rewards, _ = _score(model, PROMPT, ["dog", " dog\n", f"dog{EOT} and more", f"dog{EOT}"])
    assert rewards == pytest.approx([rewards[0]] * 4, abs=1e-6)


def test_eos_in_the_prompt_changes_no_position(tmp_path: Path) -> None:
    folder = _classifier(tmp_path, "llama")
    prompt = PROMPT.replace("homework", f"home{EOT}work")
    rewards, _ = _score(_load(folder), prompt, ["dog", "a cat"])
    expected = [_plain(folder, f"{prompt} {summary}{EOT}") for summary in ("dog", "a cat")]
    assert rewards == pytest.approx(expected, abs=1e-5, rel=1e-5)


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    folder = _classifier(tmp_path, "llama")
    settings = Settings(template="Post: {prompt} Summary: {summary} Good?")
    rewards, _ = _score(_load(folder, settings), PROMPT, ["dog"])
    expected = _plain(folder, f"Post: {PROMPT} Summary: dog Good?{EOT}")
    assert rewards == pytest.approx([expected], abs=1e-5)


@pytest.mark.parametrize(
    "template", ["{prompt}", "{summary} {prompt}", "{prompt}{prompt}{summary}"]
)
def test_impossible_templates(template: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.template"):
        _load(_classifier(tmp_path, "gpt2"), Settings(template=template))


def test_long_post_is_cut_once_for_its_group(tmp_path: Path) -> None:
    folder = _classifier(tmp_path, "llama")
    model = _load(folder, Settings(max_length=100))
    post = PROMPT.replace("homework", "homework " * 20)
    taken = len(f" {'x' * 48}") + 1  # the template, the longest summary, EOS
    left = TLDR.fit(tiny.tokenizer(), post, 100 - taken)[0]
    kept = str(tiny.tokenizer().decode(left))
    assert kept.endswith("\nTL;DR:")
    rewards, cut = _score(model, post, SUMMARIES)
    assert cut
    expected = [_plain(folder, f"{kept} {summary}{EOT}") for summary in SUMMARIES]
    assert rewards == pytest.approx(expected, abs=1e-5, rel=1e-5)
    texts, _ = model.trunk.text.ids(post, ["x" * 48, "y" * 200])
    assert [len(ids) for ids in texts] == [100, 100]
    assert [ids[-1] for ids in texts] == [tiny.EOS, tiny.EOS]


def test_rewards_that_are_no_numbers_are_returned(tmp_path: Path) -> None:
    folder = _classifier(tmp_path, "llama")
    model = _load(folder)
    model.head[0, 0] = float("nan")
    rewards, _ = _score(model, PROMPT, ["dog"])
    assert math.isnan(rewards[0])


def test_folders_that_are_no_reward_models(tmp_path: Path) -> None:
    several = tiny.folder(
        tmp_path / "several", "llama", AutoModelForSequenceClassification, num_labels=3
    )
    with pytest.raises(InputError, match="one label"):
        _load(several)
    policy = tiny.folder(tmp_path / "policy", "llama")
    with pytest.raises(InputError, match=r"score\.weight is missing"):
        _load(policy)
    with pytest.raises(InputError, match=r"config\.json"):
        _load(tmp_path)


# --- CarperAI's format ------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The GPT-J folder that gives architecture and tokenizer."""
    return tiny.folder(tmp_path / "base", "gptj")


def _carperai_weights() -> dict[str, torch.Tensor]:
    trunk = tiny.model("gptj", AutoModel)
    weights = {f"transformer.{key}": value for key, value in trunk.state_dict().items()}
    weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    weights["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e9)
    weights["v_head.weight"] = torch.randn(1, 32, generator=torch.Generator().manual_seed(2))
    return weights


def _carperai(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


@torch.no_grad()
def _direct(text: str) -> float:
    """Value at the token before the first `<|endoftext|>` behind the prompt."""
    ids = tiny.tokenizer().encode(text)
    states = tiny.model("gptj", AutoModel)(torch.tensor([ids])).last_hidden_state[0]
    return float(states[ids.index(tiny.EOS) - 1] @ _carperai_weights()["v_head.weight"][0])


@pytest.mark.parametrize("format_", ["bin", "safetensors"])
def test_carperai_equals_the_direct_computation(format_: str, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rm"
    if format_ == "bin":
        _carperai(folder, _carperai_weights())
    else:
        folder.mkdir()
        save_file(_carperai_weights(), folder / "model.safetensors")
    rewards, _ = _score(_load(folder, base=base), PROMPT, [*SUMMARIES, f"cat{EOT} or dog"])
    texts = [f"<|startoftext|>{PROMPT} {summary}{EOT}" for summary in [*SUMMARIES, "cat"]]
    assert rewards == pytest.approx([_direct(text) for text in texts], abs=1e-4)


def test_carperai_in_half_precision(base: Path, tmp_path: Path) -> None:
    weights = {
        k: v.half() if v.is_floating_point() and v.dim() > 0 else v
        for k, v in _carperai_weights().items()
    }
    model = _load(_carperai(tmp_path / "rm", weights), Settings(dtype="bfloat16"), base=base)
    rewards, _ = _score(model, PROMPT, SUMMARIES)
    assert model.trunk.model.dtype == torch.bfloat16
    assert all(map(math.isfinite, rewards))


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("transformer.ln_f.weight", None, "ln_f.weight is missing"),
        ("transformer.more.weight", torch.zeros(2), "more.weight is unknown"),
        ("lm_head.weight", torch.zeros(2), "lm_head.weight is unknown"),
        ("transformer.ln_f.weight", torch.zeros(2), "ln_f.weight has shape"),
        ("v_head.weight", torch.zeros(1, 5), "v_head.weight has shape"),
    ],
)
def test_carperai_weights_that_do_not_fit(
    name: str, value: torch.Tensor | None, problem: str, base: Path, tmp_path: Path
) -> None:
    weights = _carperai_weights()
    if value is None:
        del weights[name]
    else:
        weights[name] = value
    with pytest.raises(InputError, match=problem):
        _load(_carperai(tmp_path / "rm", weights), base=base)


def test_a_checkpoint_is_checked_without_being_loaded(base: Path, tmp_path: Path) -> None:
    """Before anything is queued: a weight that is not finite, a model with several labels."""
    good = _carperai(tmp_path / "good", _carperai_weights())
    heads.check(Settings(model="x"), TLDR, 8, {"model": good, "base": base})
    weights = _carperai_weights()
    weights["v_head.weight"][0, 3] = float("nan")
    bad = _carperai(tmp_path / "bad", weights)
    with pytest.raises(InputError, match=r"v_head.weight is not finite"):
        heads.check(Settings(model="x"), TLDR, 8, {"model": bad, "base": base})
    auto = AutoModelForSequenceClassification
    tiny.folder(tmp_path / "two", "llama", auto, num_labels=2)
    with pytest.raises(InputError, match="expected one label"):
        heads.check(Settings(model="x"), TLDR, 8, {"model": tmp_path / "two"})
    heads.check(Settings(base="x"), TLDR, 8, {"base": base})  # what is to be trained has none


def test_carperai_needs_a_base(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.base"):
        _load(_carperai(tmp_path / "rm", _carperai_weights()))


# --- a value head of our own ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2", "gptj", "gpt_neox"])
@pytest.mark.parametrize("padding", [None, tiny.EOS])
def test_head_on_a_frozen_trunk(name: str, padding: int | None, tmp_path: Path) -> None:
    policy = tiny.folder(tmp_path / "policy", name, pad_token_id=padding)
    trunk = _trunk(policy)
    ((hidden, _),) = trunk.hidden([(PROMPT, SUMMARIES)])
    assert hidden.shape == (5, 32)
    assert hidden.dtype == torch.float32
    head = torch.randn(1, 32, generator=torch.Generator().manual_seed(3))
    folder = tmp_path / "rm"
    _save(folder, policy, head)
    check.weights(folder)
    rewards, _ = _score(_load(folder), PROMPT, SUMMARIES)
    assert rewards == pytest.approx((hidden @ head[0]).tolist(), abs=1e-5, rel=1e-5)
    plain = [_plain(folder, f"{PROMPT} {summary}{EOT}") for summary in SUMMARIES]
    assert rewards == pytest.approx(plain, abs=1e-5, rel=1e-5)


def test_features_can_train_a_head(tmp_path: Path) -> None:
    trunk = _trunk(tiny.folder(tmp_path, "llama"))
    ((hidden, _),) = trunk.hidden([(PROMPT, SUMMARIES)])
    head = torch.zeros(32, requires_grad=True)
    (hidden @ head).sum().backward()
    assert head.grad is not None


def test_saving_a_classifier_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    policy = tiny.folder(tmp_path / "policy", "llama")
    for name in ("a", "b"):
        _save(tmp_path / name, policy, torch.ones(1, 32))
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert load_file(tmp_path / "a" / "model.safetensors")["score.weight"].shape == (1, 32)
