"""After a finished run: what may still be asked of it, and what was frozen with it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import here
import pytest
import tiny
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from alt_hpc import config as configs
from alt_hpc.__main__ import main
from alt_hpc.clusters.local import Local
from alt_hpc.control import start
from alt_hpc.control.chain import Chain
from alt_hpc.data import draws
from alt_hpc.errors import InputError
from alt_hpc.graph import Piece
from alt_hpc.report import results
from alt_hpc.run import models
from alt_hpc.run.folder import RunFolder
from alt_hpc.task import StageTask

Again = Callable[..., set[str]]


@pytest.fixture
def run(undisturbed: RunFolder, tmp_path: Path) -> RunFolder:
    """A finished run of two iterations, to be asked for more."""
    shutil.copytree(undisturbed.path, tmp_path / "run", symlinks=True)
    return RunFolder(tmp_path / "run")


@pytest.fixture
def again(run: RunFolder, tiny_config: Path) -> Again:
    """Runs the same config again with further settings; the jobs that it took."""
    return lambda *more: set(here.run(tiny_config, [f"run={run.path}", *more]))


def command(config: Path, place: Path, *settings: str) -> list[str]:
    """`alt-hpc run` with these settings."""
    chosen = [f"run={place}", *settings]
    return ["run", str(config), *(w for s in chosen for w in ("--set", s))]


def test_a_set_and_a_policy_are_added_and_nothing_else_is_made(
    run: RunFolder,
    again: Again,
    tiny_config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A set is evaluated at 0 and at the end, a policy of another making once, on every set."""
    (tmp_path / "more").mkdir()
    posts = [f"TITLE: more {i}\nPOST: of another kind\nTL;DR:" for i in range(5)]
    lines = "".join(json.dumps({"post": post}) + "\n" for post in posts)
    (tmp_path / "more/test.jsonl").write_text(lines)
    about = f"{{path: {tmp_path}/more, columns: {{prompt: post}}, prompts: 4}}"
    news = f"evaluate.sets.news={about}"
    before = {piece: run.manifests.get(piece) for piece in run.graph().pieces()}

    stages = ("evaluate", "measure", "report")
    assert again(news) == {f"{k}:{stage}:2" for k in (0, 2) for stage in stages}
    fresh = RunFolder(run.path)
    for piece, manifest in before.items():  # whole as they were, but for those two reports
        if piece not in (Piece(0, "report"), Piece(2, "report")):
            assert fresh.manifests.get(piece) == manifest
    rows = results.picked(results.evaluated(fresh, 2), "best", "news")
    assert [row["prompt"] for row in rows] == posts[:4]
    assert "news, 4 held-out posts" in fresh.layout.table.read_text()

    other = tiny.folder(tmp_path / "other", "gpt2")
    ppo = f"evaluate.policies.ppo={{model: {other}, ask: 'Please: {{prompt}}'}}"
    assert again(news, ppo) == {f"0:{stage}:3" for stage in stages}
    fresh = RunFolder(run.path)
    answers = [row for row in results.evaluated(fresh, 0) if row["policy"] == "ppo"]
    assert [row["set"] for row in answers] == ["valid"] * 6 + ["news"] * 4
    assert {row["variant"] for row in answers} == {"asked"}
    assert all(row["perplexity"] is None or row["perplexity"] > 1 for row in answers)
    assert fresh.layout.table.read_text().count("|       ppo |") == 2
    assert again(news, ppo) == set()
    capsys.readouterr()

    assert main(command(tiny_config, run.path, news, ppo, "sample.prompts=13")) == 2
    assert "another sample.prompts; what decides content is frozen" in capsys.readouterr().err


def test_another_measure_makes_measures_and_reports_again(
    run: RunFolder, again: Again, tmp_path: Path
) -> None:
    judge = tiny.folder(
        tmp_path / "judge", "gpt2", AutoModelForSequenceClassification, num_labels=1
    )
    before = {k: results.evaluated(run, k) for k in (0, 1, 2)}
    made = again(f"measure.reward.model={judge}")
    assert made == {f"{k}:{stage}:2" for k in (0, 1, 2) for stage in ("measure", "report")}
    for k, rows in before.items():
        now = results.evaluated(RunFolder(run.path), k)
        assert [row["text"] for row in now] == [row["text"] for row in rows]
        assert [row["perplexity"] for row in now] == [row["perplexity"] for row in rows]
        assert [row["reward"] for row in now] != [row["reward"] for row in rows]


def test_more_posts_are_added_to_those_there_and_policies_that_are_gone_are_left_out(
    run: RunFolder, again: Again
) -> None:
    """With a sentence each; nothing is trained again."""
    run.manifests.remove_policy(Piece(1, "train"))
    before = results.evaluated(run, 2)
    stages = ("evaluate", "measure", "report")
    test = "evaluate.test_prompts=2"
    assert again(test) == {f"{k}:{stage}:2" for k in (0, 2) for stage in stages}
    assert results.evaluated(RunFolder(run.path), 2)[: len(before)] == before
    assert not any(":train:" in key for key in again(test, "evaluate.max_new_tokens=6"))
    ended = RunFolder(run.path).ended()
    assert ended is not None
    assert "evaluate 1 shard 0 cannot be made: train 1 shard 0 was removed" in ended[1]


@pytest.fixture(scope="module")
def of_four(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two iterations that was evaluated on 4 of 6 posts."""
    place = tmp_path_factory.mktemp("four") / "run"
    here.run(tiny_config, [f"run={place}", "keep=2", "evaluate.prompts=4"])
    return place


def test_more_posts_with_more_iterations_train_nothing_again(
    of_four: Path, tiny_config: Path, tmp_path: Path
) -> None:
    """An old policy stays until the added posts are answered with it, though training is first."""
    run = RunFolder(shutil.copytree(of_four, tmp_path / "run", symlinks=True))
    more = [f"run={run.path}", "keep=1", "iterations=3", "evaluate.prompts=6", "cluster.train={}"]
    draws.begin(start.prepare(configs.load(tiny_config, more)), 3)
    for stage in ("sample", "score", "train"):
        shards = tuple(piece.shard for piece in RunFolder(run.path).graph().of(3, stage))
        here.make_apart(StageTask(str(run.path), stage, 3, shards, 1))
    made = set(here.run(tiny_config, more))
    assert not {key for key in made if ":train:" in key}
    assert not list(run.path.glob("iterations/*/train/*/withdrawn-*"))
    found = results.reports(RunFolder(run.path))
    counts = {k: one["evaluation"]["valid"]["plain"]["rows"] for k, one in found.items()}
    assert counts == dict.fromkeys(range(4), 6)


def test_a_report_of_what_is_there_where_a_policy_is_gone(
    of_four: Path, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(shutil.copytree(of_four, tmp_path / "run", symlinks=True))
    run.manifests.remove_policy(Piece(1, "train"))
    here.run(tiny_config, [f"run={run.path}", "keep=1", "evaluate.prompts=6"])
    assert results.whole(RunFolder(run.path)) == [0, 2]
    capsys.readouterr()
    assert main(["report", str(run.path), "--to", str(tmp_path / "to")]) == 0
    shown = capsys.readouterr().out
    assert "valid, 6 held-out posts" in shown
    assert "1 (4 posts)" in shown


def test_a_report_before_added_posts_are_made_says_so(
    of_four: Path, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(shutil.copytree(of_four, tmp_path / "run", symlinks=True))
    here.run(tiny_config, [f"run={run.path}", "keep=1", "evaluate.prompts=6"])
    (run.path / "iterations/000/measure/00001/manifest.json").unlink()  # as before it was made
    capsys.readouterr()
    assert main(["report", str(run.path)]) == 2
    why = "what was added to the evaluation of its start is not made yet"
    assert f"{run.path}: {why}\n" in capsys.readouterr().err
    assert main(["report", str(of_four), str(run.path), "--to", str(tmp_path / "to")]) == 0
    assert f"{run.path}: left out: {why}\n" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["run", "submit"])
def test_a_refused_command_changes_nothing(run: RunFolder, tiny_config: Path, command: str) -> None:
    """The run is at work in another process: neither its settings nor its data change."""

    def files() -> dict[str, str]:
        found = [p for p in run.path.rglob("*") if p.is_file() and p.name != "lock"]
        return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}

    before = files()
    config = configs.load(tiny_config, [f"run={run.path}", "evaluate.prompts=5"])
    ways = {
        "run": lambda: start.run(config),
        "submit": lambda: start.prepare_all([config], "slurm", start._not_here),
    }
    with run.only_one(), pytest.raises(InputError, match="is being run by another process"):
        ways[command]()
    assert files() == before


def test_a_controller_that_finds_new_settings_leaves_the_end_to_the_next(
    run: RunFolder, tiny_config: Path
) -> None:
    """A person has asked for more while it was at its last step."""
    run.reopen()
    old = RunFolder(run.path)
    assert old.config().iterations == 2
    start.prepare(configs.load(tiny_config, [f"run={run.path}", "iterations=3"]))
    Chain(old, Local(1))._step()  # type: ignore[arg-type]
    assert RunFolder(run.path).ended() is None


# ---------------------------------------------------------------------- models


def test_a_model_folder_that_was_overwritten_is_noticed(
    tiny_place: Path, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """When a run is submitted again, and by the tasks that read it."""
    policy, place = tmp_path / "policy", tmp_path / "run"
    shutil.copytree(tiny_place / "policy", policy)
    again = command(tiny_config, place, f"policy.model={policy}")
    folder = start.prepare(configs.load(tiny_config, again[3::2]))
    draws.begin(folder, 1)
    stage = ["stage", "sample", str(place), "--iteration", "1"]
    file = policy / "model.safetensors"
    whole = file.read_bytes()

    state = load_file(file)
    state["model.norm.weight"] = state["model.norm.weight"] * 2
    save_file(state, file, metadata={"format": "pt"})
    for words in (again, stage):
        with contextlib.suppress(SystemExit):
            assert main(words) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert f"{file}: has other bytes than when the run began" in said

    file.write_bytes(whole)  # the same bytes at another time
    (policy / "added_tokens.json").write_text("{}")
    assert main(again) == 2
    assert "added_tokens.json: was not there when the run began" in capsys.readouterr().err
    (policy / "added_tokens.json").unlink()
    assert main(stage) == 0


def hub_model(cache: Path, name: str, source: Path, commit: str) -> None:
    """A model in a Hugging Face cache, as the hub client writes it; its main branch is there."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "snapshots" / commit).mkdir(parents=True)
    (place / "blobs").mkdir(exist_ok=True)
    (place / "refs").mkdir(exist_ok=True)
    for file in source.iterdir():
        text = file.read_bytes()
        blob = hashlib.sha256(text).hexdigest()
        if file.suffix != ".safetensors":
            blob = hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()
        (place / "blobs" / blob).write_bytes(text)
        (place / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{blob}")
    (place / "refs/main").write_text(commit)


def test_a_branch_of_the_hub_that_moved_is_told_and_the_run_goes_on_with_its_own(
    tiny_place: Path,
    tiny_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub_model(tmp_path / "cache", "us/tiny", tiny_place / "policy", "a" * 40)
    settings = [f"run={tmp_path}/run", "policy.model=us/tiny"]
    run = start.prepare(configs.load(tiny_config, settings))
    frozen = json.loads(run.layout.models.read_text())["us/tiny"]
    assert frozen["revision"] == "a" * 40
    weights = hashlib.sha256((tiny_place / "policy/model.safetensors").read_bytes()).hexdigest()
    assert frozen["files"]["model.safetensors"]["checksum"] == weights

    hub_model(tmp_path / "cache", "us/tiny", tiny.folder(tmp_path / "other", "gpt2"), "b" * 40)
    start.prepare(configs.load(tiny_config, [*settings, "iterations=3"]))
    (said,) = capsys.readouterr().err.splitlines()
    assert f"policy.model: us/tiny has moved on to {'b' * 12}; the run goes on with" in said
    assert models.place(run, "us/tiny").name == "a" * 40

    blob = tmp_path / "cache/models--us--tiny/blobs" / weights
    blob.write_bytes(blob.read_bytes()[::-1])
    with pytest.raises(InputError, match=r"model\.safetensors: has other bytes"):
        start.prepare(configs.load(tiny_config, settings))


def test_a_run_of_another_format_is_refused_in_one_sentence(
    run: RunFolder, tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = json.loads(run.layout.run.read_text())
    del facts["format"]  # as the first version wrote it
    run.layout.run.write_text(json.dumps(facts))
    place = str(run.path)
    for words in (command(tiny_config, run.path), ["status", place], ["report", place]):
        assert main(words) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert "run.json: of format 1, but this version reads format 7" in said
