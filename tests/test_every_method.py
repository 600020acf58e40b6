"""Every method, whole, with tiny models: undisturbed, and killed; what the controls share."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import throwaway
import tiny
import torch
import transformers
from test_faults import interpreter, queue, settings

from alt_hpc import config as configs
from alt_hpc.__main__ import main
from alt_hpc.control import start
from alt_hpc.errors import InputError
from alt_hpc.graph import Piece
from alt_hpc.lm import vocabulary
from alt_hpc.methods import METHODS
from alt_hpc.methods.quark import Settings as Quark
from alt_hpc.methods.words import Settings as Words
from alt_hpc.run import rows
from alt_hpc.run.files import read_lines
from alt_hpc.run.folder import RunFolder
from alt_hpc.run.layout import METRICS_FILE
from alt_hpc.training.examples import Siblings
from alt_hpc.training.losses import alt_loss

FULL = pytest.mark.faults
CONTROLS = ("none", "best", "shuffled", "unfiltered")
RUNS = {  # what is set of the tiny config
    "words": ["iterations=1", "method={quantiles: 2, texts: [A, B]}"],
    "quark": ["method={kind: quark, quantiles: 3}", "sample.temperature=2.0", "sample.top_p=1.0"],
    **{
        kind: ["iterations=1", f"method={{kind: {kind}, quantiles: 2, texts: [A, B]}}"]
        for kind in CONTROLS
    },
    "history": ["method.history=1", "sample.prompts=16"],
    "quark-pool": ["method={kind: quark, quantiles: 3, pool: iteration, history: 9}"],
}
Made = Callable[[str], RunFolder]


@pytest.fixture(scope="module", autouse=True)
def ends(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Of the policy that the controls begin with every eighth token ends a text."""
    folder = tmp_path_factory.mktemp("ends") / "policy"
    place = tiny.folder(folder, "tied", eos_token_id=list(range(1, 257, 8)))
    for kind in ("words", *CONTROLS):
        RUNS[kind].append(f"policy.model={place}")
    padded = tiny.folder(tmp_path_factory.mktemp("padded") / "policy", "tied", vocab_size=300)
    RUNS["quark"].append(f"policy.model={padded}")


@pytest.fixture(scope="module")
def made(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A run by its name in RUNS, undisturbed, made when it is first asked for."""
    place, found = tmp_path_factory.mktemp("methods"), dict[str, RunFolder]()

    def run(name: str) -> RunFolder:
        if name not in found:
            chosen = [f"run={place / name}", "cluster.backend=local", "cluster.train={}"]
            assert start.run(configs.load(tiny_config, [*chosen, *RUNS[name]])) == 0
            found[name] = RunFolder(place / name)
        return found[name]

    return run


def _policies(run: RunFolder) -> list[bytes]:
    ks = range(1, run.config().iterations + 1)
    return [(run.layout.policy(k) / "model.safetensors").read_bytes() for k in ks]


def _killed(tiny_config: Path, place: Path, name: str, how: str) -> RunFolder:
    """The run on a backend, its first sampling and its training killed once each."""
    python = interpreter(place, stubs=False)
    (place / "faults/train-1-0").write_text("step2-rank0 kill")
    chosen = [f"run={place}/run", "cluster.train={}", "train.checkpoint_minutes=0", *RUNS[name]]
    chosen += settings(python, ("train",))
    sets = [argument for one in chosen for argument in ("--set", one)]
    assert main([*how.split(), str(tiny_config), *sets]) == 0
    assert not (place / "faults/train-1-0").exists()
    run = RunFolder(place / "run")
    assert run.ended() == ("FINISHED", "the run is finished")
    assert run.manifests.open(Piece(1, "train"))[1].attempt == 2
    return run


@FULL  # the gate kills training and all else in test_faults, test_trainer and test_hosts
@pytest.mark.parametrize("name", RUNS)
def test_a_killed_local_run_ends_with_the_same_bytes(
    name: str, made: Made, tiny_config: Path, tmp_path: Path
) -> None:
    run = _killed(tiny_config, tmp_path, name, "run")
    assert _policies(run) == _policies(made(name))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    place = Path("/tmp") / f"alt-hpc-methods-{os.getpid()}"
    key, value = throwaway.start(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(key, value)
        yield
        throwaway.stop(place)


@pytest.mark.parametrize("name", [pytest.param(n, marks=FULL) for n in RUNS])
def test_a_killed_run_on_slurm_ends_with_the_same_bytes(
    name: str, made: Made, cluster: None, tiny_config: Path, tmp_path: Path
) -> None:
    run = _killed(tiny_config, tmp_path, name, "submit --wait")
    assert _policies(run) == _policies(made(name))
    assert queue() == []


# ------------------------------------------------------------------ controls


def _scored(run: RunFolder, k: int) -> list[tuple[Any, Any]]:
    both = (rows.of_stage(run, k, stage) for stage in ("sample", "score"))
    return [(sample["generations"], score["rewards"]) for sample, score in zip(*both, strict=True)]


def _rates(run: RunFolder) -> list[float]:
    folder, _ = run.manifests.open(Piece(1, "train"))
    return [row["lr"] for row in read_lines(folder / METRICS_FILE)]


@pytest.mark.parametrize("kind", CONTROLS)
def test_a_control_shares_all_but_what_it_says(kind: str, made: Made) -> None:
    words, control = made("words"), made(kind)
    assert control.draw(1)["rows"] == words.draw(1)["rows"]
    assert _scored(control, 1) == _scored(words, 1)
    theirs, ours = (run.manifests.open(Piece(1, "train"))[1] for run in (words, control))
    assert (ours.rows, ours.facts["steps"]) == (theirs.rows, theirs.facts["steps"])
    assert _rates(control) == _rates(words)
    assert _policies(control) != _policies(words)
    asked = {row["variant"] for row in rows.of_stage(control, 1, "evaluate")}
    assert ("best" in asked) == (kind in ("shuffled", "unfiltered"))
    assert f"Control: {kind};" in control.layout.table.read_text()


def test_what_each_control_trains_on() -> None:
    """Of 12 generations of three quantiles, the first of each unfinished."""
    label = Words(quantiles=3, texts=["a", "b", "c"]).label(
        {"rewards": [float(-i) for i in range(12)], "finished": []}
    )
    finished = [i % 4 > 0 for i in range(12)]
    assert label is not None

    def chosen(kind: str, seed: int) -> list[tuple[int, str | None]]:
        method = METHODS[kind].Settings(quantiles=3, texts=["a", "b", "c"], per_quantile=3)
        rng = np.random.default_rng(seed)
        return [(c.generation, c.feedback) for c in method.select(label, finished, rng)]

    unfinished = set[int]()
    dealt = list[bool]()
    for seed in range(50):
        words = chosen("words", seed)
        assert [i for i, _ in chosen("none", seed)] == [i for i, _ in words]
        assert {word for _, word in chosen("none", seed) + chosen("best", seed)} == {None}
        best = Counter(i for i, _ in chosen("best", seed))
        assert set(best) == {0, 1, 2, 3}, "quantile 0, all of it"
        assert sum(best.values()) == len(words) == 9
        assert max(best.values()) - min(best.values()) == 1
        shuffled = chosen("shuffled", seed)
        assert [i for i, _ in shuffled] == [i for i, _ in words]
        assert Counter(w for _, w in shuffled) == Counter(w for _, w in words)
        dealt += [a == b for (_, a), (_, b) in zip(shuffled, words, strict=True)]
        unfiltered = chosen("unfiltered", seed)
        assert all(word == label.feedback[i] for i, word in unfiltered)
        assert Counter(w for _, w in unfiltered) == {"a": 3, "b": 3, "c": 3}
        unfinished |= {i for i, _ in unfiltered if not finished[i]}
        assert all(finished[i] for i, _ in words)
    assert abs(np.mean(dealt) - 1 / 3) < 0.08, "words are dealt by chance"
    assert unfinished == {0, 4, 8}


# ------------------------------------------------------------------ history


def test_draws_of_earlier_iterations_are_put_in_order_and_trained_on_again(made: Made) -> None:
    """Against the rewards of all draws of a post, sorted here."""
    run = made("history")
    method, ks = run.config().method, (1, 2)
    scored = [row for k in ks for row in rows.of_stage(run, k, "score")]
    posts = [post for k in ks for post in run.draw(k)["rows"]]
    assert [row["post"] for row in scored] == posts
    assert len(set(posts)) < len(posts), "a post should be drawn again"
    assert {row["quantiles"] for row in scored} == {None}
    labels = list(method.labels(iter(scored)))
    for post in set(posts):
        mine = [i for i, one in enumerate(posts) if one == post]
        pool = [(r, i, n) for i in mine for n, r in enumerate(scored[i]["rewards"])]
        pool.sort(key=lambda one: (-one[0], one[1], one[2]))
        for rank, (_, i, n) in enumerate(pool):
            assert labels[i].quantiles[n] == rank * 5 // len(pool)
    first, second = (run.manifests.open(Piece(k, "train"))[1] for k in ks)
    assert first.rows < second.rows <= 2 * 16 * 10
    inputs = set(second.inputs)
    assert {"score 1 shard 0", "score 2 shard 0", "sample 1 shard 0"} <= inputs
    made_of = [run.manifests.open(Piece(k, "report"))[1].facts["report"]["quantiles"] for k in ks]
    assert [sum(part["num"] for part in report) for report in made_of] == [96.0, 96.0]


# ------------------------------------------------------------------ quark


def _prepared(name: str, **changes: Any) -> tuple[Any, Any]:
    model, tokenizer, method = tiny.model(name, **changes), tiny.tokenizer(), Quark()
    assert method.extend(tokenizer)
    assert not method.extend(tokenizer)
    method.prepare(model, tokenizer, 5)
    return model, tokenizer


@pytest.mark.parametrize("name", ["tied", "gptj", "gpt_neox", "qwen2"])
def test_new_rows_are_spread_as_the_others(name: str) -> None:
    """The vocabulary is first made as long as the tokenizer's: 257 of 300 rows stay."""
    before = tiny.model(name, vocab_size=300)
    old = before.get_input_embeddings().weight.detach().clone()
    many = 4000  # so that their mean and spread can be seen
    vocabulary.resize(before, 257, many, 5)
    rows_of = before.get_input_embeddings().weight.detach()
    assert rows_of.shape == (257 + many, 32)
    assert before.config.vocab_size == 257 + many
    assert torch.equal(rows_of[:257], old[:257])
    mean, spread = old[:257].mean(0), old[:257].std(0)
    assert ((rows_of[257:].mean(0) - mean).abs() < 5 * spread / many**0.5).all()
    assert (rows_of[257:].std(0) / spread - 1).abs().max() < 0.06
    assert before.get_output_embeddings().weight.shape == (257 + many, 32)
    model, _ = _prepared(name)
    again, _ = _prepared(name)
    weights = model.get_input_embeddings().weight
    assert torch.equal(weights, again.get_input_embeddings().weight)
    padded, _ = _prepared(name, vocab_size=262)  # as many rows without a use as there are tokens
    spare = tiny.model(name, vocab_size=262).get_input_embeddings().weight[257:]
    assert not torch.equal(padded.get_input_embeddings().weight[257:], spare)


@pytest.mark.parametrize("name", ["tied", "gptj"])
def test_quarks_loss_is_that_of_whole_logits(name: str) -> None:
    """CE and entropy over V + 5; KL over V with a reference that reads no token."""
    (policy, tokenizer), reference = _prepared(name), tiny.model(name, vocab_size=270)
    view, token = Quark().loss_view(tokenizer), Quark().silent(tokenizer, 262)[2]
    post, answers = tokenizer.encode("a post TL;DR:"), [[5, 9, 256], [77, 8]]
    batch = Siblings.batch([Siblings([token, *post], answers, True, post)], 5)
    against = {"reference": reference, "vocabulary": view.vocabulary}
    loss, _ = alt_loss(policy, batch, entropy=0.06, kl=0.05, **against)
    names = {n for n, _ in policy.named_parameters()}
    plain = torch.zeros(())
    for answer in answers:
        logits = policy(torch.tensor([[token, *post, *answer]])).logits[0, -len(answer) - 1 : -1]
        with torch.no_grad():
            theirs = reference(torch.tensor([[*post, *answer]])).logits[0, -len(answer) - 1 : -1]
        assert logits.shape[-1] == 257 + 5
        log_p = logits.log_softmax(-1)
        ce = -log_p[range(len(answer)), answer].sum()
        entropy = -(log_p.exp() * log_p).sum()
        log_q, mine = theirs[:, :257].log_softmax(-1), logits[:, :257].log_softmax(-1)
        plain = plain + ce - 0.06 * entropy + 0.05 * (log_q.exp() * (log_q - mine)).sum()
    torch.testing.assert_close(loss, plain, rtol=1e-4, atol=1e-4)
    ours = torch.autograd.grad(loss, list(policy.parameters()))
    expected = torch.autograd.grad(plain, list(policy.parameters()))
    assert len(names) == len(ours)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max() + 1))


def test_quarks_policies_have_their_tokens_and_never_write_them(made: Made) -> None:
    """Sampled at temperature 2; the export is an ordinary folder."""
    run = made("quark")
    assert run.config().domain.template == "{feedback}{prompt}"
    assert (run.config().train.kl, run.config().train.trains_embeddings) == (0.05, True)
    assert {row["variant"] for row in rows.of_stage(run, 0, "evaluate")} == {"plain", "drawn plain"}
    asked = {row["variant"] for row in rows.of_stage(run, 2, "evaluate")}
    assert {"plain", "best", "worst", "drawn best", "drawn worst"} == asked
    answers = [g["ids"] for k in (1, 2) for s, _ in _scored(run, k) for g in s]
    answers += [row["ids"] for row in rows.of_stage(run, 2, "evaluate")]
    assert max(max(ids) for ids in answers) < 257
    place = run.layout.policy(2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    model = transformers.AutoModelForCausalLM.from_pretrained(place)
    assert tokenizer.encode("_QUANTILE_TOKEN_0_A post") [0] == 257  # fmt: skip
    assert model.config.vocab_size == len(tokenizer) == 260
    text = tokenizer("_QUANTILE_TOKEN_0_A post\nTL;DR:", return_tensors="pt")
    out = model.generate(**text, do_sample=True, temperature=2.0, num_return_sequences=50,
                         max_new_tokens=20)  # fmt: skip
    assert int(out[:, text["input_ids"].shape[1] :].max()) < 257
    assert "_QUANTILE_TOKEN_0_" in (place / "README.md").read_text()
    words = run.manifests.open(Piece(2, "report"))[1].facts["report"]["words"]
    assert words["fixed"] is None or 0 <= words["fixed"]["share"] <= 1
    before, after = (transformers.AutoModelForCausalLM.from_pretrained(run.layout.policy(k))
                     .get_input_embeddings().weight[257:] for k in (1, 2))  # fmt: skip
    assert not torch.equal(before, after), "the tokens' embeddings are trained"


def test_the_cards_quark_config_is_as_the_card_has_it() -> None:
    root = Path(__file__).parent.parent / "configs"
    quark = configs.load(root / "tldr_gptj_quark.yaml")
    words = configs.load(root / "tldr_gptj.yaml")
    assert (quark.method.kind, quark.train.kl, quark.train.entropy) == ("quark", 0.05, 0.06)
    assert quark.method.levels[0] == "_QUANTILE_TOKEN_0_"
    theirs, ours = words.model_dump(), quark.model_dump()
    different = {key for key in ours if ours[key] != theirs[key]}
    assert different == {"run", "method", "domain", "train"}
    assert {k for k in ours["train"] if ours["train"][k] != theirs["train"][k]} == {"kl"}


def test_a_tokenizer_with_more_tokens_than_its_model_has_no_room(
    tiny_config: Path, tmp_path: Path
) -> None:
    policy = tiny.folder(tmp_path / "policy", "llama")
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(policy)
    chosen = [f"run={tmp_path}/run", "method.kind=quark", f"policy.model={policy}"]
    with pytest.raises(InputError, match="embeddings for 257 tokens, its tokenizer has 258"):
        start.prepare(configs.load(tiny_config, chosen))
    assert not (tmp_path / "run").exists()


def test_policies_and_settings_that_quark_cannot_have(tiny_config: Path, tmp_path: Path) -> None:
    """Its tokens are the tokenizer's last, as many as quantiles, trained, and in no prompt."""
    other = tiny.folder(tmp_path / "other", "llama", vocab_size=260)
    tokenizer = tiny.tokenizer()
    Quark(quantiles=3).extend(tokenizer)
    tokenizer.save_pretrained(other)
    mixed = tiny.folder(tmp_path / "mixed", "llama", vocab_size=300)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(mixed)
    (tmp_path / "data").mkdir()
    for split in ("train", "valid", "test"):
        row = {"prompt": "POST: a _QUANTILE_TOKEN_1_ TL;DR:", "label": "x"}
        (tmp_path / "data" / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    for changes, words in {
        ("train.train_embeddings=false",): "train.train_embeddings: method.kind: quark learns",
        (f"policy.model={other}",): "knows 3 quantile tokens, but there are 5 quantiles",
        (f"policy.model={mixed}", "method.quantiles=3"): "its last tokens cannot be the quantiles'",
        (f"data.prompts.path={tmp_path}/data",): "row 0 of prompts-train has _QUANTILE_TOKEN_1_",
    }.items():
        chosen = [f"run={tmp_path}/run", "method.kind=quark", "train.share_prompts=false"]
        with pytest.raises(InputError, match=words):
            start.prepare(configs.load(tiny_config, [*chosen, *changes]))
        assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="a draw may have no answer"):
        configs.load(tiny_config, ["method={kind: best, history: 1}"])
    with pytest.raises(InputError, match="a draw may have no answer"):
        configs.load(tiny_config, ["method={kind: best, pool: iteration}"])


@pytest.mark.parametrize("kind", ["words", *CONTROLS])
def test_families_are_the_same_whatever_the_words(kind: str) -> None:
    """So a control has the steps of ALT-RM also where a family shares one computed prompt."""
    given = {"rewards": [5.0, None, 3.0, 2.0, None, 1.0, 0.5, 0.25], "finished": [True] * 8}
    words = Words(quantiles=3, texts=["a", "b", "c"]).label(given)
    assert words is not None
    method = METHODS[kind].Settings(quantiles=3, texts=["a", "b", "c"], per_quantile=3)
    chosen = method.select(words, [True] * 8, np.random.default_rng(0))
    sizes = Counter((c.family, c.feedback) for c in chosen)
    assert sorted(sizes.values()) == [2, 2, 2]


def test_what_a_method_decides_of_other_sections_can_be_set_otherwise(tiny_config: Path) -> None:
    domain = "domain={kind: plain, template: '{prompt}{feedback}'}"
    config = configs.load(
        tiny_config, ["method.kind=quark", "train.kl=0.2", "train.share_prompts=false", domain]
    )
    assert (config.train.kl, config.domain.template) == (0.2, "{prompt}{feedback}")
    assert configs.load(tiny_config, []).train.kl == 0


def test_unknown_keys_of_a_method_name_the_nearest(tiny_config: Path) -> None:
    with pytest.raises(InputError, match="nearest valid key is 'quantiles'"):
        configs.load(tiny_config, ["method={kind: quark, quantile: 3}"])
