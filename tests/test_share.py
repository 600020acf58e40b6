"""What runs share of their start: taken from another by checksum, made once, never made anew."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import here
import pytest
import tiny
import yaml
from test_faults import STUB, _cluster, interpreter, queue, settings

from alt_hpc import config as configs
from alt_hpc.__main__ import main
from alt_hpc.clusters.cluster import Request
from alt_hpc.control import start
from alt_hpc.control import step as steps
from alt_hpc.graph import STAGES, Piece
from alt_hpc.plan import Dependency
from alt_hpc.run import rows
from alt_hpc.run.files import sha256
from alt_hpc.run.folder import RunFolder
from alt_hpc.run.journal import Intent, Stepped, Submitted

METHOD = "method={{kind: {}, quantiles: 2, texts: [A, B]}}"
SAMPLED = {"1:sample:1", "1:score:1"}
SHARED = [(0, "evaluate"), (0, "measure"), (1, "sample"), (1, "score")]


class Begun(Exception):
    """All is made that comes before the first training."""


class UpToTraining(here.Here):
    """This process as a cluster, without reports and trainings."""

    def submit(self, request: Request, after: Sequence[Dependency]) -> str:
        if request.tasks[0].stage == "train":
            raise Begun
        if request.tasks[0].stage == "report":
            return "0"
        return super().submit(request, after)


def begin(config: Path, *chosen: str) -> tuple[RunFolder, set[str]]:
    """A run up to its first training, and the jobs that it took."""
    given = configs.load(config, [*chosen, "cluster.backend=local", "cluster.train={}"])
    folder, cluster = start.prepare(given), UpToTraining()
    with pytest.raises(Begun):
        steps.step(RunFolder(folder.path), cluster)
    return RunFolder(folder.path), set(cluster.made)


def of(run: RunFolder, shared: Sequence[tuple[int, str]] = SHARED) -> list[list[dict[str, Any]]]:
    return [list(rows.of_stage(run, k, stage)) for k, stage in shared]


@pytest.fixture(scope="module")
def words(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of ALT-RM that has come to its first training."""
    place = tmp_path_factory.mktemp("words") / "words"
    return begin(tiny_config, f"run={place}", METHOD.format("words"))[0]


def command(name: str, config: Path, *chosen: str) -> list[str]:
    return [name, str(config), *(word for one in chosen for word in ("--set", one))]


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    (said,) = capsys.readouterr().err.splitlines()
    return str(said)


# ---------------------------------------------------------------------- what is taken


@pytest.mark.parametrize("kind", ["none", "best", "shuffled", "unfiltered"])
def test_an_arm_gets_what_it_would_have_made_alone(
    kind: str, words: RunFolder, tiny_config: Path, tmp_path: Path
) -> None:
    """Whatever its own shards; labels are its own, its evaluation too where it asks otherwise."""
    one, three = "cluster.sample.shards=1", "method.per_quantile=3"
    chosen = [METHOD.format(kind), three, one]
    alone, made = begin(tiny_config, f"run={tmp_path}/alone", *chosen)
    assert made >= SAMPLED
    taker, made = begin(tiny_config, f"run={tmp_path}/run", f"from={words.path}", *chosen)
    asks_alike = kind in ("shuffled", "unfiltered")
    assert made == (set() if asks_alike else {"0:evaluate:1", "0:measure:1"})
    assert of(taker) == of(alone)
    assert taker.draw(1)["rows"] == alone.draw(1)["rows"]
    for shard in range(3):
        sample = taker.manifests.get(Piece(1, "sample", shard))
        assert sample is not None
        assert sample.facts["from"] == str(words.path)
        score = taker.manifests.get(Piece(1, "score", shard))
        assert score is not None
        assert score.inputs == {f"sample 1 shard {shard}": sample.checksum}


def test_another_quantile_has_other_labels_on_the_same_rewards(
    words: RunFolder, tiny_config: Path, tmp_path: Path
) -> None:
    chosen = "method={kind: words, quantiles: 2, texts: [A, B], pool: iteration}"
    taker, made = begin(tiny_config, f"run={tmp_path}/run", f"from={words.path}", chosen)
    assert made == set()
    mine, theirs = (list(rows.of_stage(run, 1, "score")) for run in (taker, words))
    assert [row["rewards"] for row in mine] == [row["rewards"] for row in theirs]
    assert {row["quantiles"] is None for row in mine} == {True}
    assert {row["quantiles"] is None for row in theirs} == {False}


@pytest.mark.parametrize(
    ("chosen", "why"),
    {
        "seed=4": "sample 1 (another seed there)",
        "sample.temperature=0.5": "sample 1 (another sample.temperature there)",
        "reward.max_length=500": "score 1 (another reward.max_length there)",
        "method.kind=quark": "sample 1 (another domain.template",
        "data.prompts.limit=20": "sample 1 (another data.prompts.limit there)",
    }.items(),
)
def test_what_does_not_fit_is_made_anew_and_said(
    chosen: str,
    why: str,
    words: RunFolder,
    tiny_config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [METHOD.format("words")] if "quark" not in chosen else ["train.share_prompts=false"]
    given += [f"run={tmp_path}/run", f"from={words.path}", chosen]
    run = start.prepare(configs.load(tiny_config, given))
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("from ")]
    assert why in said
    assert run.manifests.get(Piece(1, "score", 0)) is None
    assert (run.manifests.get(Piece(1, "sample", 0)) is not None) == ("reward" in chosen)


def test_the_plan_shows_only_what_will_be_submitted_and_writes_nothing(
    words: RunFolder, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [f"run={tmp_path}/run", f"from={words.path}", METHOD.format("none")]
    local = ["cluster.backend=local", "cluster.train={}"]
    assert main(command("plan", tiny_config, *chosen, *local)) == 0
    shown = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    keys = [line.split()[0].strip("{}") for line in shown.splitlines() if line.startswith("{")]
    assert set(keys) >= {"0:evaluate:1", "1:train:1"}
    assert not {"1:sample:1", "1:score:1"} & set(keys)
    taker, _ = begin(tiny_config, *chosen)
    assert [intent.key for intent in taker.journal.of(Intent)] == keys[
        : keys.index("1:train:1") + 1
    ]


def test_what_was_taken_is_the_runs_own(
    words: RunFolder, tiny_config: Path, tmp_path: Path
) -> None:
    """The other run may go; the key may too."""
    shutil.copytree(words.path, tmp_path / "other", symlinks=True)
    chosen = [f"run={tmp_path}/run", METHOD.format("best")]
    first, _ = begin(tiny_config, *chosen, f"from={tmp_path}/other")
    before = of(first)
    shutil.rmtree(tmp_path / "other")
    for more in ([f"from={tmp_path}/other"], []):
        start.prepare(configs.load(tiny_config, [*chosen, "cluster.train={}", *more]))
        assert of(RunFolder(first.path)) == before


# ---------------------------------------------------------------------- wrong input


def not_a_run(place: Path, _: RunFolder) -> list[str]:
    return [f"from={place}"]


def another_format(place: Path, words: RunFolder) -> list[str]:
    run = copied(place, words)
    run.layout.run.write_text(json.dumps(json.loads(run.layout.run.read_text()) | {"format": 5}))
    return [f"from={run.path}"]


def not_whole(place: Path, words: RunFolder) -> list[str]:
    run = copied(place, words)
    run.manifests.withdraw(Piece(1, "score", 2))
    return [f"from={run.path}"]


def damaged(place: Path, words: RunFolder) -> list[str]:
    run = copied(place, words)
    folder, _ = run.manifests.open(Piece(1, "sample", 1))
    text = (folder / "samples.jsonl").read_text()
    (folder / "samples.jsonl").write_text(text.replace("POST", "PAST"))
    return [f"from={run.path}"]


def itself(place: Path, _: RunFolder) -> list[str]:
    return [f"from={place}/run"]


def another_training(place: Path, words: RunFolder) -> list[str]:
    base = words.config().policy.model
    trained = [f"policy={{base: {base}, dtype: float32}}", "sft={epochs: 2}"]
    other = [*trained, f"run={place}/other", "sft.epochs=1"]
    start.prepare(configs.load(words.path.parent / "config.yaml", other))
    return [*trained, f"from={place}/other"]


def training_not_whole(place: Path, words: RunFolder) -> list[str]:
    return [*another_training(place, words), "sft.epochs=1"]


def no_training(place: Path, words: RunFolder) -> list[str]:
    base = words.config().policy.model
    return [f"policy={{base: {base}, dtype: float32}}", "sft={}", f"from={words.path}"]


def another_model(place: Path, words: RunFolder) -> list[str]:
    model = tiny.folder(place / "model", "tied")
    chosen = [f"policy.model={model}", f"run={place}/other"]
    start.prepare(configs.load(words.path.parent / "config.yaml", chosen))
    shutil.rmtree(model)
    tiny.folder(model, "llama")
    return [f"policy.model={model}", f"from={place}/other"]


def copied(place: Path, run: RunFolder) -> RunFolder:
    shutil.copytree(run.path, place / "other", symlinks=True)
    return RunFolder(place / "other")


WRONG: list[tuple[Callable[[Path, RunFolder], list[str]], str]] = [
    (not_a_run, "not a run folder (run.json is missing)"),
    (another_format, "other/run.json: of format 5, but this version reads format 7"),
    (not_whole, "other: score 1 shard 2 is not whole there: submit again when it is"),
    (damaged, "sample 1 shard 1 is not whole there: "),
    (itself, "is this run itself"),
    (another_training, "other: does not make this run's sft: another sft.epochs there"),
    (training_not_whole, "other: sft 0 shard 0 is not whole there"),
    (no_training, "does not make this run's sft: it is not made there"),
    (another_model, "model: had other bytes when "),
]


@pytest.mark.parametrize(
    ("spoil", "words_about_it"), WRONG, ids=lambda v: getattr(v, "__name__", "")
)
def test_a_start_that_cannot_be_taken(
    spoil: Callable[[Path, RunFolder], list[str]],
    words_about_it: str,
    words: RunFolder,
    tiny_config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One sentence with the field and where it stands; nothing has begun."""
    (words.path.parent / "config.yaml").write_text(tiny_config.read_text())
    *chosen, origin = sorted(spoil(tmp_path, words), key=lambda one: one.startswith("from="))
    path = tmp_path / "config.yaml"
    given = origin.removeprefix("from=")
    path.write_text(tiny_config.read_text().replace("\nseed: 3", f"\nfrom: {given}\nseed: 3"))
    line = path.read_text().splitlines().index(f"from: {given}") + 1
    capsys.readouterr()
    run = RunFolder(tmp_path / "run")
    told = command("run", path, f"run={run.path}", METHOD.format("words"), *chosen)
    assert main([*told, "--set", "cluster.train={}"]) == 2
    said = sentence(capsys)
    assert f"{path}:{line}: from: " in said
    assert words_about_it in said
    assert run.journal.of(Intent) == []


def test_wrong_input_in_the_last_of_several_configs(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named; none of them has begun."""
    wrong = tmp_path / "wrong.yaml"
    text = tiny_config.read_text().replace("/data,", "/gone,")
    wrong.write_text(text.replace(f"{tiny_config.parent}/run", f"{tmp_path}/wrong"))
    good = f"run={tmp_path}/run"
    mine = tmp_path / "good.yaml"
    mine.write_text(tiny_config.read_text().replace(f"{tiny_config.parent}/run", f"{tmp_path}/run"))
    assert main(["run", str(mine), str(wrong), "--seeds", "1,2"]) == 2
    assert "wrong.yaml:7: data.prompts.path: " in sentence(capsys)
    assert sorted(tmp_path.iterdir()) == [mine, wrong]

    assert main(["run", str(mine), str(tiny_config), "--set", good]) == 2
    assert f"run: {tmp_path}/run: is the run folder of another of these" in sentence(capsys)
    for seeds in ("1,,2", "1,1", "a", "-1"):
        assert main(["run", str(mine), f"--seeds={seeds}"]) == 2
        assert f"--seeds {seeds}: expected whole numbers" in sentence(capsys)
    assert sorted(tmp_path.iterdir()) == [mine, wrong]


# ---------------------------------------------------------------------- several configs and seeds


@pytest.fixture
def arms(tiny_config: Path, tmp_path: Path) -> list[str]:
    """Configs of two arms of one iteration that begin with a training; their stages are stubs."""
    found, python = yaml.safe_load(tiny_config.read_text()), interpreter(tmp_path, stubs=True)
    found["policy"]["base"], found["iterations"] = found["policy"].pop("model"), 1
    found["sft"] = {"epochs": 1, "global_batch": 8, "micro_batch": 8, "max_length": 96}
    alone = {stage.key: {"python": str(python)} for stage in STAGES.values()}
    found["cluster"] = alone | {"slots": 2, "sample": {"shards": 2, "python": str(python)}}
    made = []
    for kind in ("words", "none"):
        method = {"kind": kind, "quantiles": 2, "texts": ["A", "B"]}
        path = tmp_path / f"{kind}.yaml"
        path.write_text(yaml.safe_dump(found | {"run": f"{tmp_path}/{kind}", "method": method}))
        made.append(str(path))
    return made


def test_two_arms_of_two_seeds_by_one_command_that_is_killed_and_given_again(
    arms: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _twice(arms, tmp_path, "1,2")
    capsys.readouterr()
    runs = {f"{kind}{i}": tmp_path / f"{kind}-seed{i}" for kind in ("words", "none") for i in "12"}
    assert main(["status", *map(str, runs.values())]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*map(str, runs.values())]
    assert all("iteration 1 of 1 trained   -   FINISHED: " in line for line in lines)
    assert policy(tmp_path, "none-seed1") != policy(tmp_path, "none-seed2")


def test_an_arm_whose_start_is_not_made_stops_and_names_it(
    arms: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It does not make its own meanwhile; arms of another seed go on."""
    (tmp_path / "faults/sft-0-0").write_text("start wrong")  # of the first that comes to it
    assert main(["run", *arms, "--seeds", "1,2"]) == 1
    said = capsys.readouterr().err.splitlines()
    one, other = (RunFolder(tmp_path / f"{kind}-seed1") for kind in ("words", "none"))
    (why,) = [
        line for line in said if f"from: {one.path}: sft 0 shard 0 is not whole there" in line
    ]
    assert "a line on purpose" in why
    assert other.ended() == ("STOPPED", why)
    assert other.journal.of(Intent) == []
    for kind in ("words", "none"):
        ended = RunFolder(tmp_path / f"{kind}-seed2").ended()
        assert ended == ("FINISHED", "the run is finished")


@pytest.mark.faults
def test_real_arms_end_with_the_weights_that_each_would_have_alone(
    arms: list[str], tmp_path: Path
) -> None:
    for path in map(Path, arms):
        found = yaml.safe_load(path.read_text())
        found["cluster"] = {"slots": 2, "sample": {"shards": 2}}
        found["sft"]["precision"] = "float32"
        path.write_text(yaml.safe_dump(found))
    _twice(arms, tmp_path, "1")
    alone = ["run", arms[1], "--seeds", "1", "--set", f"run={tmp_path}/alone"]
    told = [sys.executable, "-m", "alt_hpc", *alone]
    assert subprocess.run(told, capture_output=True, timeout=400).returncode == 0
    assert of(RunFolder(tmp_path / "none-seed1")) == of(RunFolder(tmp_path / "alone-seed1"))
    for k in (0, 1):
        assert policy(tmp_path, "none-seed1", k) == policy(tmp_path, "alone-seed1", k)


def _twice(arms: list[str], place: Path, seeds: str) -> None:
    """Run arms; kill that while the second one trains; run them again to their ends."""
    told = [sys.executable, "-m", "alt_hpc", "run", *arms, "--seeds", seeds]
    log, second = place / "log", RunFolder(place / "none-seed1")
    with log.open("wb") as file:
        first = subprocess.Popen(told, stdout=file, stderr=file, start_new_session=True)
    deadline = time.monotonic() + 400
    while "1:train:1" not in [entry.key for entry in second.journal.of(Submitted)]:
        assert time.monotonic() < deadline, log.read_text()
        assert first.poll() is None, log.read_text()
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = subprocess.run(told, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    for seed in seeds.split(","):
        one, other = (RunFolder(place / f"{kind}-seed{seed}") for kind in ("words", "none"))
        assert not {i.stage for i in other.journal.of(Intent)} & {"sft", "sample", "score"}
        # Shards that are ready at other moments are planned one by one, none of them twice.
        tried = [(i.iteration, i.stage, n) for i in one.journal.of(Intent) for n in i.shards]
        assert len(set(tried)) == len(tried)
        taken = other.manifests.get(Piece(0, "sft"))
        assert taken is not None
        assert taken.facts["from"] == str(one.path)
        for piece in (Piece(0, "sft"), Piece(1, "sample", 1)):
            assert inodes(one, piece) == inodes(other, piece)
        assert one.ended() == other.ended() == ("FINISHED", "the run is finished")


def inodes(run: RunFolder, piece: Piece) -> dict[str, int]:
    """What tells that a piece's files are the same on disk, too."""
    folder, manifest = run.manifests.open(piece)
    return {name: (folder / name).stat().st_ino for name in manifest.files}


def policy(place: Path, run: str, iteration: int = 1) -> str:
    return sha256(place / run / f"policies/{iteration:03d}/model.safetensors")


@pytest.fixture
def stubs(tiny_config: Path, tmp_path: Path) -> Iterator[list[str]]:
    """Two arms on a throw-away Slurm cluster whose stages are stubs: their configs."""
    python = interpreter(tmp_path, stubs=True)
    found = []
    for name, rate in (("one", "1e-3"), ("other", "2e-3")):
        chosen = [f"run={tmp_path}/{name}", f"train.lr={rate}", "iterations=1", *STUB]
        config = configs.load(tiny_config, [*chosen, *settings(python)])
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(config.model_dump(mode="json", exclude_defaults=True)))
        found.append(str(path))
    for _ in _cluster(Path("/tmp") / f"alt-hpc-share-{os.getpid()}"):
        yield found


def test_on_slurm_an_arm_waits_for_the_start_that_another_makes(
    stubs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though a shard of that dies; where it is never made, both stop. Nothing polls."""
    (tmp_path / "faults/sample-1-0").write_text("group1 kill")
    assert main(["submit", *stubs, "--seeds", "1"]) == 0
    one, other = ended(tmp_path / "one-seed1", tmp_path / "other-seed1")
    assert one.ended() == other.ended() == ("FINISHED", "the run is finished")
    keys = [intent.key for intent in other.journal.of(Intent)]
    assert [key for key in keys if key.startswith("0:")] == ["0:report:1"]
    assert not SAMPLED & {*keys}
    assert "1:sample:2" in [i.key for i in one.journal.of(Intent)]
    assert len(other.journal.of(Stepped)) <= 6
    assert of(one, SHARED[2:]) == of(other, SHARED[2:])

    (tmp_path / "faults/sample-1-1").write_text("always start wrong")
    capsys.readouterr()
    assert main(["submit", *stubs, "--seeds", "2"]) == 0
    places = [str(tmp_path / f"{name}-seed2") for name in ("one", "other")]
    assert main(["status", *places]) == 0
    assert f"waits for {places[0]}" in capsys.readouterr().out
    one, other = ended(*map(Path, places))
    how, why = other.ended() or ("", "")
    assert how == "STOPPED"
    assert f"from: {one.path}: sample 1 shard 1 is not whole there: that run has ended" in why
    assert "a line on purpose" in why
    assert other.journal.of(Intent) == []


def ended(*places: Path) -> list[RunFolder]:
    deadline, runs = time.monotonic() + 240, [RunFolder(place) for place in places]
    while not all(run.ended() for run in runs) or queue():
        logs = [p.read_text() for r in runs for p in r.layout.controller_log.parent.glob("*.log")]
        assert time.monotonic() < deadline, "\n".join([*map(str, queue()), *logs])
        time.sleep(0.3)
    return [RunFolder(place) for place in places]


def test_runs_that_wait_for_their_turn_are_in_use(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So `alt-hpc status` does not say that nothing runs them; one that has ended is free."""
    used = list[list[bool]]()
    both = [configs.load(tiny_config, [f"run={tmp_path}/{name}"]) for name in "ab"]
    folders = [RunFolder(tmp_path / name) for name in "ab"]

    def turn(folder: RunFolder, accept_packages: bool) -> int:
        used.append([one.in_use() for one in folders])
        return 0

    monkeypatch.setattr(start, "_run", turn)
    assert start.run(*both) == 0
    assert used == [[True, True], [False, True]]
    assert not any(folder.in_use() for folder in folders)
