"""Whole runs on one machine: sharding changes nothing, the shipped configs run, real posts too."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from alt_hpc import config as configs
from alt_hpc import interrupt
from alt_hpc.__main__ import main
from alt_hpc.control import start
from alt_hpc.data import draws
from alt_hpc.graph import Piece
from alt_hpc.methods import Label
from alt_hpc.report import curves
from alt_hpc.run import attempt, rows
from alt_hpc.run.folder import RunFolder
from alt_hpc.run.journal import Intent
from alt_hpc.task import StageTask

ROOT = Path(__file__).parent.parent


def _sampled(config: Path, place: Path, shards: int, *more: str) -> tuple[list[Any], list[Any]]:
    """Samples and scores of iteration 1, in this process."""
    count = f"={{shards: {shards}}}"
    overrides = [f"run={place}", f"cluster.sample{count}", f"cluster.score{count}", *more]
    folder = start.prepare(configs.load(config, [*overrides, "sample.prompts=16"]))
    draws.begin(folder, 1)
    assert len(folder.graph().shardings[1].sample) == shards
    for stage in ("sample", "score"):
        for shard in range(shards):
            StageTask(str(place), stage, 1, (shard,), 1).make()
    return list(rows.of_stage(folder, 1, "sample")), list(rows.of_stage(folder, 1, "score"))


def test_samples_and_rewards_are_the_same_bytes_whatever_the_sharding(
    tiny_config: Path, tmp_path: Path
) -> None:
    one = _sampled(tiny_config, tmp_path / "1", 1)
    assert [row["row"] for row in one[0]] == list(range(16))
    draw = RunFolder(tmp_path / "1").draw(1)["rows"]
    assert len(set(draw)) < len(draw), "the draw should hold duplicates"
    for shards in (3, 8):
        assert _sampled(tiny_config, tmp_path / str(shards), shards) == one


def test_a_score_row_says_what_was_decided_and_no_more(tiny_config: Path, tmp_path: Path) -> None:
    """With one pool for the iteration nothing is, before all of it is scored."""
    _, decided = _sampled(tiny_config, tmp_path / "prompt", 1)
    _, pool = _sampled(tiny_config, tmp_path / "pool", 1, "method.pool=iteration")
    assert [row["rewards"] for row in pool] == [row["rewards"] for row in decided]
    assert {(row["quantiles"], row["feedback"]) for row in pool} == {(None, None)}
    assert all(len(row["feedback"]) == len(row["rewards"]) for row in decided)
    labels = list(RunFolder(tmp_path / "pool").config().method.labels(pool))
    best = [
        r for row, label in zip(pool, labels, strict=True) for r, q in _both(row, label) if not q
    ]
    rest = [r for row, label in zip(pool, labels, strict=True) for r, q in _both(row, label) if q]
    assert min(best) >= max(rest)


def _both(row: dict[str, Any], label: Label) -> list[tuple[float, int | None]]:
    return list(zip(row["rewards"], label.quantiles, strict=True))


def test_conditioning_survives_awkward_prompts(tiny_config: Path, tmp_path: Path) -> None:
    """Every prompt there contains `input: `, `Excellent.` and `TL;DR:`; the raw text is kept."""
    samples, _ = _sampled(tiny_config, tmp_path / "run", 1)
    config = configs.load(tiny_config)
    lines = (Path(config.data.prompts.path) / "train.jsonl").read_text().splitlines()
    posts = [json.loads(line)["prompt"] for line in lines]
    assert all("input: Excellent. TL;DR:" in row["prompt"] for row in samples)
    assert {row["prompt"] for row in samples} <= set(posts)


def test_the_papers_config_runs_with_only_models_and_sizes_made_tiny(
    tiny_place: Path, tmp_path: Path
) -> None:
    import tiny

    policy = tiny.folder(tmp_path / "gptj", "gptj")
    reward = tmp_path / "carperai"
    reward.mkdir()
    trunk = tiny.model("gptj", transformers.AutoModel)
    weights = {f"transformer.{name}": tensor for name, tensor in trunk.state_dict().items()}
    weights["v_head.weight"] = torch.randn(1, trunk.config.hidden_size)
    torch.save(weights, reward / "pytorch_model.bin")
    sizes = [
        f"run={tmp_path}/run",
        f"policy.model={policy}",
        f"policy.tokenizer={policy}",
        "policy.max_length=512",
        f"reward.model={reward}",
        f"reward.base={policy}",
        f"reward.tokenizer={policy}",
        f"data.prompts.path={tiny_place}/data",
        f"train.deepspeed={ROOT}/configs/deepspeed/zero2-offload.json",
        "iterations=1",
        "threads=1",
        "sample.prompts=6",
        "sample.generations=10",
        "sample.max_new_tokens=8",
        "evaluate.prompts=4",
        "evaluate.test_prompts=2",
        "evaluate.drawn={posts: 2, answers: 2}",
        "evaluate.max_new_tokens=8",
        "cluster.backend=local",
        "cluster.slots=2",
        "cluster.sample.shards=2",
        "cluster.evaluate.shards=1",
    ]
    arguments = [a for size in sizes for a in ("--set", size)]
    assert main(["run", str(ROOT / "configs" / "tldr_gptj.yaml"), *arguments]) == 0
    folder = RunFolder(tmp_path / "run")
    trained = folder.manifests.get(Piece(1, "train"))
    assert trained is not None
    assert trained.rows == 6 * 5 * 2
    model = transformers.AutoModelForCausalLM.from_pretrained(folder.path / "policies" / "001")
    before = transformers.AutoModelForCausalLM.from_pretrained(policy)
    changed = {
        name.split(".")[2] if ".h." in name else name
        for (name, a), b in zip(model.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(a.half(), b.half())  # it exports float16
    }
    final = {f"transformer.ln_f.{part}" for part in ("weight", "bias")}
    trained = {"2", "lm_head.weight", "transformer.wte.weight"}  # as the authors: METHOD, Frozen
    assert trained <= changed <= trained | {"lm_head.bias"} | final
    assert "| " in folder.layout.table.read_text()
    assert folder.layout.curves.stat().st_size > 10_000


def test_real_posts_one_iteration_of_the_smollm2_config(
    real_data: Path, smollm2: Path, tmp_path: Path
) -> None:
    """SFT, reward model and ALT-RM with the real SmolLM2 on real posts, cut down to minutes."""
    sizes = [
        f"run={tmp_path}/run",
        f"policy.base={smollm2}",
        f"reward.base={smollm2}",
        f"data.prompts.path={real_data}/tldr",
        "data.prompts.limit=16",
        f"data.comparisons.path={real_data}/comparisons",
        "data.comparisons.valid=valid",
        "data.comparisons.limit=16",
        "data.comparisons.valid_limit=16",
        f"train.deepspeed={ROOT}/configs/deepspeed/zero2.json",
        f"sft.deepspeed={ROOT}/configs/deepspeed/zero2.json",
        f"reward_model.deepspeed={ROOT}/configs/deepspeed/zero2.json",
        "reward_model.head_only=true",
        "reward_model.global_batch=16",
        "sft.global_batch=8",
        "sft.micro_batch=4",
        "train.global_batch=8",
        "train.micro_batch=4",
        "train.epochs=1",
        "train.kl=0.05",
        "iterations=1",
        "threads=1",
        "sample.prompts=4",
        "sample.group=2",
        "sample.generations=6",
        "sample.max_new_tokens=16",
        "evaluate.prompts=4",
        "evaluate.test_prompts=null",
        "evaluate.max_new_tokens=16",
        "cluster.backend=local",
        "cluster.slots=2",
        "cluster.sample.shards=2",
    ]
    arguments = [a for size in sizes for a in ("--set", size)]
    assert main(["run", str(ROOT / "configs" / "tldr_smollm2.yaml"), *arguments]) == 0
    folder = RunFolder(tmp_path / "run")
    report = json.loads((folder.manifests.open(Piece(1, "report"))[0] / "report.json").read_text())
    measures = report["evaluation"]["valid"]["best"]
    assert measures["rows"] == 4
    assert all(measures[name] is not None for name in ("reward", "perplexity", "length"))
    reward = folder.manifests.get(Piece(0, "reward-model"))
    assert reward is not None
    assert 0 <= reward.facts["accuracy"] <= 1
    trained = folder.manifests.get(Piece(1, "train"))
    assert trained is not None
    assert trained.rows == 4 * 6  # two of the best quantile of each prompt, one of the others
    logs = "".join(p.read_text() for p in folder.path.glob("jobs/1-train-1/*log.out"))
    assert "computed whole" not in logs  # the reference's trunk is the policy's
    curves = (folder.manifests.open(Piece(1, "train"))[0] / "metrics.jsonl").read_text()
    assert all(json.loads(line)["parts"]["kl"] >= 0 for line in curves.splitlines())


def test_every_end_of_a_model_counts_from_sampling_to_the_export(
    tiny_place: Path, tiny_config: Path, tmp_path: Path
) -> None:
    """generation_config.json of a chat model names several."""
    policy, ends = tmp_path / "policy", [*range(64), 256]
    shutil.copytree(tiny_place / "policy", policy)
    file = policy / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": ends}))
    chosen = [f"run={tmp_path}/run", f"policy.model={policy}", "cluster.train={}"]
    folder = start.prepare(configs.load(tiny_config, [*chosen, "cluster.sample.shards=1"]))
    for k in (0, 1):
        draws.begin(folder, k)
    for stage, k in (("evaluate", 0), ("measure", 0), ("sample", 1), ("score", 1)):
        StageTask(str(folder.path), stage, k, (0,), 1).make()
    answers = [g for row in rows.of_stage(folder, 1, "sample") for g in row["generations"]]
    answers += list(rows.of_stage(folder, 0, "evaluate"))
    for one in answers:
        assert not set(one["ids"][:-1]) & set(ends)
        assert one["ended"] == ("eos" if one["ids"][-1] in ends else "limit")
    assert {one["ids"][-1] for one in answers if one["ended"] == "eos"} - {256} != set()
    two = (rows.of_stage(folder, 0, stage) for stage in ("evaluate", "measure"))
    for answer, measures in zip(*two, strict=True):
        assert measures["length"] == len([i for i in answer["ids"] if i not in ends])
    command = [sys.executable, "-m", "alt_hpc", "stage", "train", str(folder.path)]
    subprocess.run([*command, "--iteration", "1"], check=True, timeout=300, capture_output=True)
    exported = transformers.GenerationConfig.from_pretrained(folder.path / "policies/001")
    assert exported.eos_token_id == ends


@pytest.mark.parametrize(
    ("stage", "problem"),
    [
        (["train", "--iteration", "1"], "is not whole"),
        (["evaluate", "--iteration", "1"], "is not whole"),
        (["sample", "--iteration", "1", "--shard", "9"], "no such piece"),
        (["sample", "--iteration", "7"], "no such piece"),
        (["train", "--iteration", "0"], "no such piece"),
        (["sft"], "no such piece"),
    ],
)
def test_a_stage_run_by_hand_says_in_one_sentence_what_is_missing(
    tiny_config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    stage: list[str],
    problem: str,
) -> None:
    folder = start.prepare(configs.load(tiny_config, [f"run={tmp_path}/run"]))
    draws.begin(folder, 0)
    draws.begin(folder, 1)
    assert main(["stage", stage[0], str(folder.path), *stage[1:]]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert problem in said


def test_curves_run_through_all_iterations_without_doubled_points(undisturbed: RunFolder) -> None:
    """One curve a quantity: training steps counted through, evaluations by iteration."""
    training = _scalars(undisturbed.layout.tensorboard / "train")
    trained = [undisturbed.manifests.get(Piece(k, "train")) for k in (1, 2)]
    steps = sum(m.facts["steps"] for m in trained if m is not None)
    for name in ("loss", "ce", "entropy", "lr", "grad_norm", "tokens_per_s"):
        assert [step for step, _ in training[f"train/{name}"]] == list(range(1, steps + 1))
    iterations = _scalars(undisturbed.layout.tensorboard / "iterations")
    for name in ("reward", "perplexity", "length"):
        assert [step for step, _ in iterations[f"valid-best/{name}"]] == [0, 1, 2]
    assert "stages/sample_straggling" in iterations
    best = undisturbed.manifests.get(Piece(2, "report"))
    assert best is not None
    told = best.facts["report"]["evaluation"]["valid"]["best"]["reward"]
    assert iterations["valid-best/reward"][2][1] == pytest.approx(told, rel=1e-6)


def test_a_report_made_again_replaces_its_points(undisturbed: RunFolder, tmp_path: Path) -> None:
    folder = _copy(undisturbed, tmp_path)
    folder.manifests.withdraw(Piece(1, "report"))
    StageTask(str(folder.path), "report", 1, (0,), 2).make()
    points = _scalars(folder.layout.tensorboard / "iterations")["valid-best/reward"]
    assert [step for step, _ in points] == [0, 1, 2]


def test_a_report_killed_before_its_end_leaves_nothing_out(
    undisturbed: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, report = _copy(undisturbed, tmp_path), Piece(2, "report")
    folder.manifests.withdraw(report)
    for file in (folder.layout.table, folder.layout.curves):
        file.unlink()
    told = folder.manifests.get(Piece(1, "report"))
    monkeypatch.setattr(curves, "draw", _killed)
    with pytest.raises(KeyboardInterrupt):
        StageTask(str(folder.path), "report", 2, (0,), 2).make()
    monkeypatch.undo()
    assert folder.manifests.get(report) is None
    StageTask(str(folder.path), "report", 2, (0,), 3).make()
    assert folder.layout.table.read_text() == undisturbed.layout.table.read_text()
    assert folder.layout.curves.is_file()
    assert folder.manifests.get(Piece(1, "report")) == told
    points = _scalars(folder.layout.tensorboard / "iterations")["valid-best/reward"]
    assert [step for step, _ in points] == [0, 1, 2]


def test_an_evaluation_asked_to_stop_goes_on_where_it_was(
    undisturbed: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, piece = _copy(undisturbed, tmp_path), Piece(1, "evaluate")
    expected = list(rows.of_piece(folder, piece))
    folder.manifests.withdraw(piece)
    posts = {row["row"] for row in expected}
    groups = -(-len(posts) // folder.config().evaluate.group)
    saved = []
    for number in range(1, groups):  # each is asked to stop after one more group
        asked = iter([False, True])
        monkeypatch.setattr(interrupt, "asked", lambda asked=asked: next(asked))
        with pytest.raises(SystemExit):
            StageTask(str(folder.path), "evaluate", 1, (0,), number + 1).make()
        saved.append(attempt.saved(folder, piece))
    assert saved == list(range(1, groups))
    monkeypatch.undo()
    StageTask(str(folder.path), "evaluate", 1, (0,), 99).make()
    assert list(rows.of_piece(folder, piece)) == expected


def test_feedback_behind_the_prompt_from_sampling_to_the_table(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Words are diagnosed on one set of answers; the export says where its feedback stands."""
    place, policy = tmp_path / "run", tmp_path / "policy"
    shutil.copytree(tiny_config.parent / "policy", policy)
    ends = json.dumps({"eos_token_id": list(range(0, 257, 3))})  # so that answers come to an end
    (policy / "generation_config.json").write_text(ends)
    overrides = [
        f"run={place}",
        f"policy={{model: {policy}, dtype: float32}}",
        "cluster.train={nodes: 1, tasks_per_node: 2}",
        "cluster.evaluate.shards=2",
        r'domain.template="{body}\n{feedback} {last_line}"',
        "method={quantiles: 3, texts: [Good., Fair., Bad.], per_quantile: 2, trained: [0, 2]}",
        "train={epochs: 1, global_batch: 8, micro_batch: 4, precision: float32, lr: 1e-3}",
        "evaluate.drawn={posts: 5, answers: 4}",
        "data.prompts={path: " + str(tiny_config.parent / "data") + "}",
    ]
    assert start.run(configs.load(tiny_config, overrides)) == 0
    folder = RunFolder(place)
    said = capsys.readouterr().out
    assert "ALT-RM (behind); valid" in said
    assert "reward of 'Good.' minus 'Bad.' after iteration 2: " in said
    made = folder.manifests.get(Piece(1, "train"))
    assert made is not None
    assert made.rows <= 12 * 4  # two of the best and two of the worst third of six
    answers, measured = (list(rows.of_stage(folder, 2, s)) for s in ("evaluate", "measure"))
    drawn = [row for row in answers if row["variant"].startswith("drawn ")]
    assert [row["row"] for row in drawn] == [row for row in range(5) for _ in range(4)]
    assert {row["variant"] for row in drawn} == {"drawn best", "drawn worst"}
    fixed = [row["fixed"] for row in measured if row["fixed"]]
    assert [len(words) for words in fixed] == [4] * 5
    for k in (0, 1, 2):
        place_of = folder.manifests.open(Piece(k, "report"))[0]
        words = json.loads((place_of / "report.json").read_text())["words"]["fixed"]
        (log,) = (place / "jobs" / f"{k}-report-1").glob("*_log.out")
        share = f"{words['share']:.2f} ±{words['share_error']:.2f}"
        last = f"words: {share} of pairs in order (0.50: not learned)"
        assert log.read_text().splitlines()[-1] == last
        assert share in folder.layout.table.read_text()
    assert "words-fixed/share" in _scalars(folder.layout.tensorboard / "iterations")
    card = (place / "policies" / "002" / "README.md").read_text()
    assert "ALT-RM (behind)" in card
    assert r"\nGood. TL;DR:" in card


def _copy(run: RunFolder, place: Path) -> RunFolder:
    """The same run in another folder, to be spoilt."""
    shutil.copytree(run.path, place / "run", symlinks=True)
    return RunFolder(place / "run")


def _killed(*_: Any) -> None:
    raise KeyboardInterrupt


def _scalars(place: Path) -> dict[str, list[tuple[int, float]]]:
    """Every curve of a TensorBoard folder, as TensorBoard itself reads it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(place)).Reload()
    names = found.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in found.Scalars(name)] for name in names}


def test_a_finished_run_stays_finished_and_its_checkpoint_is_an_ordinary_folder(
    undisturbed: RunFolder, tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = list(undisturbed.journal)
    config = undisturbed.config()
    assert start.run(config) == 0
    assert [e for e in list(undisturbed.journal)[len(before) :] if isinstance(e, Intent)] == []
    assert "'Excellent.' after iteration 2 minus plain 0" in capsys.readouterr().out
    policy = undisturbed.path / "policies" / "002"
    model = transformers.AutoModelForCausalLM.from_pretrained(policy)
    tokenizer = transformers.AutoTokenizer.from_pretrained(policy)
    ids = tokenizer("Excellent. input: " + "SUBREDDIT: r/x\nTL;DR:", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=4, do_sample=False)
    assert out.shape[1] > ids["input_ids"].shape[1]
    assert "Excellent. input: " in (policy / "README.md").read_text()
    more = start.run(config.model_copy(update={"iterations": 1}))
    assert more == 0
