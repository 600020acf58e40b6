"""Tests of sampling against plain forward passes of the same models."""

from __future__ import annotations

import functools
from itertools import chain
from unittest import mock

import numpy as np
import pytest
import tiny
import torch
from transformers import PreTrainedModel

from alt_hpc.errors import InputError
from alt_hpc.lm import decode, prefix, reading
from alt_hpc.lm.decode import Generation, generate
from alt_hpc.lm.reading import answers_logprobs, continuation_logprobs, logprobs, read

SHARED = sorted(prefix.SIDE_BY_SIDE)
PLAIN = ["sliding", "bloom"]
ENDS = set(range(40, 60))


def _prompts() -> list[list[int]]:
    """Prompts of mixed length, one of a single token, one given twice."""
    draw = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 256, (k,), generator=draw).tolist() for k in (5, 17, 1, 30)]
    return [*prompts, prompts[0]]


def _sample(
    model: PreTrainedModel,
    prompts: list[list[int]],
    n: int = 19,
    seeds: list[int] | None = None,
    top_p: float = 0.95,
) -> list[list[Generation]]:
    return generate(
        model,
        prompts,
        n,
        seeds or list(range(len(prompts))),
        temperature=0.9,
        top_p=top_p,
        max_new_tokens=12,
        eos=ENDS,
    )


@pytest.mark.parametrize("name", SHARED)
def test_logits_equal_plain_forward_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts, seen = tiny.model(name), _prompts(), []
    pick = decode._pick

    def spy(logits: torch.Tensor, *rest: object, **how: object) -> list[int]:
        seen.append(logits)
        return pick(logits, *rest, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(decode, "_pick", spy)
    rows = _sample(model, prompts)
    sequences = [(p, g.ids) for p, row in zip(prompts, rows, strict=True) for g in row]
    for t, logits in enumerate(seen):
        live = [(p, ids) for p, ids in sequences if len(ids) > t]
        assert len(logits) == len(live)  # finished sequences have left
        for row, (prompt, ids) in zip(logits, live, strict=True):
            with torch.no_grad():
                expected = model(torch.tensor([prompt + ids[:t]])).logits[0, -1]
            torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SHARED + PLAIN)
def test_greedy_equals_a_naive_loop(name: str) -> None:
    model, prompts = tiny.model(name), _prompts()
    rows = generate(
        model,
        prompts,
        1,
        [0] * len(prompts),
        temperature=0,
        top_p=1.0,
        max_new_tokens=10,
        eos=ENDS,
    )
    for prompt, (generation,) in zip(prompts, rows, strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 10 and not (len(ids) > len(prompt) and ids[-1] in ENDS):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert generation.ids == ids[len(prompt) :]


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_shape_ends_and_repeatability(name: str) -> None:
    model, prompts = tiny.model(name), _prompts()
    rows = _sample(model, prompts)
    assert rows == _sample(model, prompts)
    assert [len(row) for row in rows] == [19] * len(prompts)
    every = [g for row in rows for g in row]
    assert {g.ended for g in every} == {"eos", "limit"}
    for generation in every:
        assert all(token not in ENDS for token in generation.ids[:-1])
        assert (generation.ids[-1] in ENDS) == (generation.ended == "eos")
        assert generation.ended == "eos" or len(generation.ids) == 12


def test_a_prompts_samples_do_not_depend_on_its_neighbours() -> None:
    model, prompts = tiny.model("llama"), _prompts()
    together = _sample(model, prompts, seeds=[11, 12, 13, 14, 11])
    alone = [_sample(model, [p], seeds=[11 + i])[0] for i, p in enumerate(prompts[:4])]
    assert together[:4] == alone
    assert together[4] == together[0]  # the same prompt and seed
    assert together[4] != _sample(model, prompts)[4]  # another seed


def test_bfloat16_runs_and_repeats() -> None:
    model = tiny.model("llama").to(torch.bfloat16)
    assert _sample(model, _prompts()) == _sample(model, _prompts())


def test_logits_that_are_no_numbers_are_an_error() -> None:
    model = tiny.model("llama")
    model.get_output_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="not numbers"):
        _sample(model, [[1]])


def test_greedy_gives_one_generation() -> None:
    with pytest.raises(ValueError, match="one generation"):
        generate(
            tiny.model("gpt2"), [[1]], 2, [0], temperature=0, top_p=1, max_new_tokens=2, eos=[]
        )


@pytest.mark.parametrize("name", SHARED)
def test_prompts_begun_at_once_get_the_same_answers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU; in more than one batch."""
    model, prompts = tiny.model(name), _prompts()
    expected = _sample(model, prompts)
    monkeypatch.setattr(prefix, "TOGETHER", 34)
    monkeypatch.setattr(prefix, "several", lambda model: True)
    with mock.patch.object(prefix, "_prefilled", wraps=prefix._prefilled) as begun:
        assert _sample(model, prompts) == expected
    assert [len(call.args[1]) for call in begun.call_args_list] == [2, 1, 1, 1]


# --- choosing a token -------------------------------------------------------------------------


def _set(probabilities: list[float], top_p: float, top: int) -> list[int]:
    """Ids that a fine grid of uniforms reaches, in the order of the inverse CDF."""
    uniforms = torch.arange(1000) / 1000
    rows = torch.tensor([probabilities]).expand(1000, -1)
    return list(dict.fromkeys(decode._draw(rows, uniforms, top_p, top).tolist()))


@pytest.mark.parametrize("top", [2, 3, 5])
def test_top_p_set(top: int) -> None:
    probabilities = [0.1, 0.3, 0.1, 0.4, 0.1]
    assert _set(probabilities, 0.35, top) == [3]
    assert _set(probabilities, 0.65, top) == [3, 1]
    assert _set(probabilities, 0.75, top) == [3, 1, 0]  # of the tied ones the smallest id
    assert _set(probabilities, 0.85, top) == [3, 1, 0, 2]
    assert _set(probabilities, 1.0, top) == [3, 1, 0, 2, 4]


@pytest.mark.parametrize("top", [4, 16, 40])
def test_the_top_p_set_is_the_smallest_that_reaches_it(top: int) -> None:
    """Just above the mass of k tokens it takes k + 1; just below, k: a hair wider is seen."""
    rng = np.random.default_rng(top)
    for _ in range(40):
        probabilities = rng.dirichlet(np.full(40, 0.3))
        mass = np.cumsum(np.sort(probabilities)[::-1])
        k = int(rng.integers(1, 12))
        if mass[k] - mass[k - 1] < 1e-3:
            continue
        row = torch.tensor(probabilities, dtype=torch.float32)[None]
        ends = torch.tensor([1 - 1e-6])  # the last token of the set
        for top_p, size in ((mass[k - 1] - 2e-4, k), (mass[k - 1] + 2e-4, k + 1)):
            last = decode._draw(row, ends, float(top_p), top)
            assert int(last) == int(np.argsort(-probabilities)[size - 1])


def test_frequencies_follow_the_probabilities() -> None:
    probabilities = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).expand(20000, -1)
    uniforms = torch.rand(20000, generator=torch.Generator().manual_seed(5))
    tokens = decode._draw(probabilities, uniforms, 0.8, 4)
    shares = torch.bincount(tokens, minlength=4) / 20000
    expected = torch.tensor([0.5, 0.2, 0.2, 0.0]) / 0.9
    torch.testing.assert_close(shares, expected, atol=0.01, rtol=0)


def test_looking_at_few_tokens_changes_nothing() -> None:
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(64, 5000, generator=draw).bfloat16().float()  # many ties
    logits[::2] *= 4  # some rows need more than `top` tokens, some do not
    uniforms = torch.rand(64, generator=draw)
    probabilities = torch.softmax(logits, -1)
    few = decode._draw(probabilities, uniforms, 0.9, 256)
    assert torch.equal(few, decode._draw(probabilities, uniforms, 0.9, 5000))


# --- log-probabilities ------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHARED + PLAIN)
@pytest.mark.parametrize("length", [1, 20])
def test_continuation_logprobs(name: str, length: int) -> None:
    model, prompt = tiny.model(name), list(range(100, 100 + length))
    continuations = [[5, 6, 7], [], [8], [5, 6, 7, 9, 10, 11], *[[i, 3] for i in range(9)]]
    found = continuation_logprobs(model, prompt, continuations)
    for ids, values in zip(continuations, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, length - 1 : -1]
        expected = torch.log_softmax(logits, -1)[range(len(ids)), ids]
        torch.testing.assert_close(torch.tensor(values), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj", "sliding", "bloom"])
def test_a_prompt_that_begins_like_the_one_before_it_is_answered_as_alone(name: str) -> None:
    """Plain, for the best, for the worst: of the second and third only their ends are computed."""
    model, post = tiny.model(name), [int(i) for i in np.random.default_rng(0).integers(3, 200, 90)]
    prompts = [post, [*post, 9, 8, 7], [*post[:80], 5, 6], post[:70]]
    settings = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 12, "eos": [tiny.EOS]}
    together = generate(model, prompts, 1, [0] * 4, **settings)
    assert together == [generate(model, [ids], 1, [0], **settings)[0] for ids in prompts]


@pytest.mark.parametrize("shared", [0, 80])
def test_answers_are_as_probable_behind_each_prompt_as_alone(shared: int) -> None:
    """Whether or not the prompts begin alike, an answer that is empty among them."""
    model, post = (
        tiny.model("llama"),
        [int(i) for i in np.random.default_rng(1).integers(3, 200, 80)],
    )
    prompts = [[*post[:shared], 7, 8], [*post[:shared], 9]]
    answers = [[20, 21, 22], [], [23]]
    (found,) = answers_logprobs(model, [(prompts, answers)])
    for prompt, mine in zip(prompts, found, strict=True):
        for answer, value in zip(answers, mine, strict=True):
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
            log_p = logits.log_softmax(-1)[range(len(answer)), answer].sum()
            assert value == pytest.approx(log_p.item(), abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj"])
def test_prompts_that_are_read_together_are_read_as_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: prompts of other lengths, an empty one, empty answers, one that is too wide."""
    model = tiny.model(name)
    texts = [
        ([5, 6, 7], [[8, 9], [10]]),
        ([11], [[12, 13, 14]]),
        ([15] * 20, [[16], [17, 18]]),
        ([19, 20], [[21]]),
    ]
    alone = [[states.tolist() for states in one] for one in read(model.base_model, texts, 64)]
    asked = [*texts, ([22, 23], [[], [24]])]
    each = list(logprobs(model, asked))
    both = [([[1, 2], [3]], [[4, 5], []]), ([], []), ([[6]], [[7]])]
    sums = list(answers_logprobs(model, both))
    assert [len(one) for one in sums] == [2, 0, 1]
    monkeypatch.setattr(reading, "several", lambda model: True)
    monkeypatch.setattr(reading, "WIDE", 22)
    sizes, real = list[int](), reading._together
    monkeypatch.setattr(
        reading, "_together", lambda trunk, some: sizes.append(len(some)) or real(trunk, some)
    )
    with torch.no_grad():
        together = [[one.tolist() for one in some] for some in read(model.base_model, texts, 64)]
    assert sizes == [2, 1]  # the third is too wide: it is read by itself
    for mine, theirs in zip(together, alone, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)
    for mine, theirs in zip(logprobs(model, asked), each, strict=True):
        assert [len(one) for one in mine] == [len(one) for one in theirs]
        np.testing.assert_allclose([*chain(*mine)], [*chain(*theirs)], atol=1e-4)
    for mine, theirs in zip(answers_logprobs(model, both), sums, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)


@pytest.mark.parametrize(
    ("limit", "value", "sizes"),
    [("TOGETHER", 9, [2, 1]), ("SEEN", 33, [2, 1]), ("TOGETHER", 7, [1, 1, 1])],
)
def test_no_more_is_read_together_than_the_memory_holds(
    limit: str, value: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of 4, 4 and 5 tokens: at most 9 or 7 (padding too), or 33 pairs of tokens."""
    monkeypatch.setattr(reading, "several", lambda model: True)
    monkeypatch.setattr(reading, limit, value)
    texts = [([1, 2, 3], [[4]]), ([1, 2], [[3], [4]]), ([1, 2, 3, 4], [[5]])]
    fits = functools.partial(reading._fits, tiny.model("llama"))
    assert [len(some) for some in prefix.batches(texts, fits)] == sizes
