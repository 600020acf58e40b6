"""Rows and columns of evaluation: references, best of several, other policies, sets, ROUGE."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import here
import numpy as np
import pytest
import tiny
import torch
import yaml
from rouge_score.rouge_scorer import RougeScorer
from test_readme import example
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from alt_hpc.__main__ import main
from alt_hpc.lm import decode
from alt_hpc.report import results
from alt_hpc.run.folder import RunFolder
from alt_hpc.stages import evaluate, measure
from alt_hpc.stages.work import Work

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def others(tiny_place: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """README's example, with a policy of another tokenizer, as settings."""
    place = tmp_path_factory.mktemp("others")
    tiny.folder(place / "other", "gpt2", vocab_size=260)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: i for i, letter in enumerate(letters)} | {"th": 257, "er": 258, "<q>": 259}
    made = Tokenizer(BPE(vocab=words, merges=[("t", "h"), ("e", "r")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<q>"]})
    tokenizer.save_pretrained(place / "other")
    tiny.folder(place / "judge", "gpt2", AutoModelForSequenceClassification, num_labels=1)
    (place / "news").mkdir()
    articles = [{"article": f"Article {i}: the weather", "highlights": f"w {i}"} for i in range(20)]
    (place / "news/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in articles))
    text = example("my_rows.yaml")
    real = {"a/policy": "other", "folder": "news", "another/reward-model": "judge"}
    for name, folder in real.items():
        assert text.count(f"path/to/{name}") == 1
        text = text.replace(f"path/to/{name}", str(place / folder))
    text = text.replace("prompts: 100", "prompts: 8")
    given: dict[str, Any] = {"evaluate": {"group": 3, "max_new_tokens": 8, "drawn": {"posts": 0}}}
    for section, keys in yaml.safe_load(text).items():
        given.setdefault(section, {}).update(keys)
    return [f"{key}={json.dumps(value)}" for key, value in given.items()]


@pytest.fixture(scope="module")
def run(
    tiny_config: Path, others: list[str], tmp_path_factory: pytest.TempPathFactory
) -> RunFolder:
    """What `alt-hpc evaluate` makes with them."""
    place = tmp_path_factory.mktemp("evaluated") / "run"
    settings = [f"run={place}", "cluster.backend=local", *others]
    words = [word for setting in settings for word in ("--set", setting)]
    assert main(["evaluate", str(tiny_config), *words]) == 0
    return RunFolder(place)


def of(run: RunFolder, policy: str, name: str = "valid") -> Rows:
    """The greedy answers of a policy to a set, or those picked."""
    rows = [row for row in results.evaluated(run, 0) if row["policy"] == policy]
    wanted = "plain" if policy == "own" else "asked"
    return [row for row in rows if row["set"] == name and row["variant"] == wanted]


def test_evaluate_makes_rows_and_trains_nothing(run: RunFolder) -> None:
    assert {piece.stage for piece in run.manifests.done()} == {"evaluate", "measure", "report"}
    assert run.ended() == ("FINISHED", "the run is finished")
    for policy in ("own", "references", "ppo", "best_of_16", "best_of_16_ppo"):
        for name, count in (("valid", 6), ("news", 8)):
            assert [row["row"] for row in of(run, policy, name)] == list(range(count))
    table = run.layout.table.read_text()
    assert "valid, 6 held-out posts" in table
    assert "news, 8 held-out posts" in table
    for policy in ("references", "ppo", "best_of_16", "best_of_16_ppo"):
        assert table.count(f" {policy} |") == 2


def test_a_set_is_drawn_and_put_into_its_template(run: RunFolder) -> None:
    rows = of(run, "references", "news")
    numbers = [int(row["text"].removeprefix("w ")) for row in rows]
    assert numbers == sorted({*numbers}) != [*range(8)]
    for row, number in zip(rows, numbers, strict=True):
        assert row["prompt"] == f"POST: Article {number}: the weather\nTL;DR:"


def test_references_are_the_labels(run: RunFolder, tiny_place: Path) -> None:
    """Read by the starting policy as an answer would be: perplexity by transformers alone."""
    lines = (tiny_place / "data/valid.jsonl").read_text().splitlines()
    labels = [json.loads(line)["label"] for line in lines]
    rows = of(run, "references")
    assert [row["text"] for row in rows] == [label.strip() for label in labels]
    assert {row["rouge"] for row in rows} == {None}
    model = AutoModelForCausalLM.from_pretrained(tiny_place / "policy")
    tokenizer = AutoTokenizer.from_pretrained(tiny_place / "policy")
    for row in rows:
        prompt, answer = (tokenizer.encode(t) for t in (row["prompt"], f" {row['text']}"))
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(answer))
        assert row["length"] == len(answer)
        assert row["perplexity"] == pytest.approx(math.exp(float(losses)), rel=1e-3)


def test_a_policy_with_another_tokenizer_is_read_by_the_start(run: RunFolder) -> None:
    """It was asked by its own tokenizer; the start's tokens, which count, are bytes."""
    for row in of(run, "ppo"):
        assert row["length"] == (len(f" {row['text']}".encode()) if row["text"] else 0)


def test_best_of_is_what_the_reward_likes_best_of_what_sample_would_draw(
    run: RunFolder, tiny_place: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_place / "policy").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_place / "policy")
    judge = AutoModelForSequenceClassification.from_pretrained(tiny_place / "reward").eval()
    read = AutoTokenizer.from_pretrained(tiny_place / "reward")
    for row in of(run, "best_of_16"):
        # seed: of the run's seed, the iteration, the row and the first way of asking
        words = np.random.SeedSequence([3, 0, row["row"], 1]).generate_state(1, np.uint64)
        how: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "max_new_tokens": 8}
        ids, seed = tokenizer.encode(row["prompt"]), int(words[0] >> np.uint64(1))
        ((*made,),) = decode.generate(model, [ids], 16, [seed], eos=[tiny.EOS], **how)
        texts = [tokenizer.decode(g.ids, skip_special_tokens=True).strip() for g in made]
        rewards = []
        for text in texts:
            scored = [*read.encode(f"{row['prompt']} {text}"), tiny.EOS]
            with torch.no_grad():
                rewards.append(float(judge(torch.tensor([scored])).logits[0, 0]))
        assert row["text"] == texts[int(np.argmax(rewards))]
        assert row["reward"] == pytest.approx(max(rewards), rel=1e-4)
        assert (row["picked_by"], row["of"]) == ("reward", 16)


def test_further_rewards_and_rouge_are_columns(run: RunFolder, others: list[str]) -> None:
    (place,) = [s.split('"')[-2] for s in others if s.startswith("measure=")]
    judge = AutoModelForSequenceClassification.from_pretrained(place).eval()
    read = AutoTokenizer.from_pretrained(place)
    for row in of(run, "ppo"):
        scored = [*read.encode(f"{row['prompt']} {row['text']}"), tiny.EOS]
        with torch.no_grad():
            value = float(judge(torch.tensor([scored])).logits[0, 0])
        assert row["further"] == {"second": pytest.approx(value, rel=1e-4)}
        assert row["rouge"].keys() == {"rouge1", "rouge2", "rougeL"}


def test_rouge_is_its_authors() -> None:
    """Lin 2004, section 3.1: of two candidates with the same bigrams, the order of words tells."""
    known = (("police kill the gunman", 3 / 4, 1 / 3), ("the gunman kill police", 2 / 4, 1 / 3))
    for text, longest, bigrams in known:
        answer = {"policy": "own", "variant": "best", "text": text}
        found = measure._rouge(answer, "police killed the gunman")
        assert found is not None
        assert found["rougeL"] == pytest.approx(longest)
        assert found["rouge2"] == pytest.approx(bigrams)
        assert found["rouge1"] == pytest.approx(3 / 4)
    assert measure._rouge({"policy": "own", "variant": "best", "text": "a"}, None) is None
    assert RougeScorer(["rouge1"]).score("a b", "")["rouge1"].fmeasure == 0


def test_other_shards_and_a_killed_shard_give_the_same_rows(
    run: RunFolder,
    tiny_config: Path,
    others: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed while it picks the best: what was sampled is kept, and nothing is sampled again."""
    again = ["iterations=0", *others, f"run={tmp_path}/run", "cluster.evaluate.shards=2"]
    real, begun = Work.scorer, list[Any]()

    def scorer(*given: Any) -> Any:
        begun.append(given)
        if len(begun) == 1:
            raise RuntimeError("killed")
        return real(*given)

    monkeypatch.setattr(Work, "scorer", scorer)
    with pytest.raises(RuntimeError, match="killed"):
        here.run(tiny_config, again)
    sampled = list[Any]()
    real_asked = evaluate._answered

    def answered(work: Any, *given: Any) -> Any:
        before = work.attempt.run.layout.kept(work.piece)
        sampled.append((work.piece, bool(before)))
        return real_asked(work, *given)

    monkeypatch.setattr(evaluate, "_answered", answered)
    here.run(tiny_config, again)
    assert sum(kept for _, kept in sampled) == 1
    assert results.evaluated(RunFolder(tmp_path / "run"), 0) == results.evaluated(run, 0)


def test_every_word_is_asked(undisturbed: RunFolder, tiny_config: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed.path, tmp_path / "run", symlinks=True)
    here.run(tiny_config, [f"run={tmp_path}/run", "evaluate.every_word=true"])
    run = RunFolder(tmp_path / "run")
    before, after = (results.evaluated(one, 2) for one in (undisturbed, run))
    asked = list(dict.fromkeys(row["variant"] for row in after if "drawn" not in row["variant"]))
    assert asked == ["plain", "best", "quantile 1", "quantile 2", "quantile 3", "worst"]
    kept = [row for row in after if not row["variant"].startswith("quantile")]
    for was, now in zip(before, kept, strict=True):  # more answers were read at once
        assert now["ids"] == was["ids"]
        assert now["reward"] == pytest.approx(was["reward"], rel=1e-5)
        assert (now["word"] or 0) == pytest.approx(was["word"] or 0, rel=1e-4, abs=1e-4)
    words = [results.asked(run, variant) for variant in asked]
    assert words == ["(plain)", "Excellent.", "Good.", "Mediocre.", "Bad.", "Horrible."]


def test_a_run_that_has_been_trained_is_given_more_rows(
    undisturbed: RunFolder, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At 0 and at its end; one that trains still is left alone, as it would end early."""
    shutil.copytree(undisturbed.path, tmp_path / "run", symlinks=True)
    more = ["cluster.backend=local", f"run={tmp_path}/run", "evaluate.references=true"]
    words = [word for setting in more for word in ("--set", setting)]
    assert main(["evaluate", str(tiny_config), *words]) == 0
    run = RunFolder(tmp_path / "run")
    assert len(of(run, "references")) == 6
    assert run.config().iterations == 2
    (tmp_path / "run/FINISHED").unlink()
    shutil.rmtree(tmp_path / "run/iterations/002/train")
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["iterations"] == 2
    assert main(["evaluate", str(tiny_config), *words]) == 2
    assert "trains still" in capsys.readouterr().err


def test_what_is_not_there_is_not_trained(
    tiny_config: Path, tiny_place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = f"policy={{base: {tiny_place}/policy}}"
    words = ["--set", f"run={tmp_path}/run", "--set", base, "--set", "sft={}"]
    assert main(["evaluate", str(tiny_config), *words]) == 2
    assert "sft has not made it, and this trains nothing" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
