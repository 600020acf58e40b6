"""The run folder: what says that a piece is whole, and what happens when bytes change."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alt_hpc import process
from alt_hpc.config.schema import Config, Data, Policy, Sample
from alt_hpc.config.sources import Source
from alt_hpc.control import status
from alt_hpc.data import draws, texts
from alt_hpc.domains import tldr
from alt_hpc.errors import InputError
from alt_hpc.graph import Piece
from alt_hpc.methods.words import Settings as Words
from alt_hpc.plan import Job
from alt_hpc.rewards.model import Settings as Reward
from alt_hpc.run import attempt, files, manifests, rows
from alt_hpc.run.files import append_line, link, read_lines, write_atomically
from alt_hpc.run.folder import RunFolder
from alt_hpc.run.journal import Intent, Submit, Submitted
from alt_hpc.run.manifests import PieceDamaged
from alt_hpc.training.settings import PolicyTraining

SAMPLE = Piece(1, "sample", 1)


def make_config(path: Path, **more: Any) -> Config:
    values: dict[str, Any] = {
        "run": str(path),
        "policy": Policy(model="policy"),
        "reward": Reward(model="judge"),
        "data": Data(prompts=Source(path="rows")),
        "sample": Sample(prompts=12, group=2),
    }
    return Config(**{**values, **more})


def sharded(config: Config, shards: int) -> Config:
    """The same with so many shards of sampling."""
    sample = config.cluster.sample.model_copy(update={"shards": shards})
    cluster = config.cluster.model_copy(update={"sample": sample})
    return config.model_copy(update={"cluster": cluster})


def make_run(path: Path, **more: Any) -> RunFolder:
    """A frozen run whose first iteration has begun; shards of two groups."""
    config = sharded(make_config(path, **more), 3)
    folder = RunFolder.create(config)
    if not folder.exists():
        for split, count in (("train", 5), ("valid", 3)):
            posts = [{"prompt": f"{split} {i} é\u2028\n"} for i in range(count)]
            rows.freeze(folder, f"prompts-{split}", posts)
    folder.freeze(config, {})
    draws.begin(folder, 0)
    draws.begin(folder, 1)
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setattr(manifests, "VISIBLE_WITHIN_S", 0.0)
    return make_run(tmp_path / "run")


def commit(
    run: RunFolder, piece: Piece = SAMPLE, count: int = 4, number: int = 1, took: float = 0.0
) -> Path:
    """Make a piece whole; returns its file."""
    work = attempt.begin(run, piece, number)
    work.started -= took
    file = work.folder / "rows.jsonl"
    file.write_text("".join(f'{{"row": {i}}}\n' for i in range(count)))
    work.commit([file.name], rows=count)
    return file


# ---------------------------------------------------------------------- manifests


def test_a_committed_piece_is_whole_and_says_what_it_is(run: RunFolder) -> None:
    assert run.manifests.get(SAMPLE) is None
    file = commit(run)
    folder, manifest = run.manifests.open(SAMPLE)
    assert folder / "rows.jsonl" == file
    assert (manifest.rows, manifest.attempt) == (4, 1)
    assert manifest.files["rows.jsonl"]["size"] == file.stat().st_size
    assert list(run.manifests.done()) == [SAMPLE]
    assert run.manifests.done()[SAMPLE].checksum == manifest.checksum


def test_the_error_of_the_first_rank_is_kept_and_no_end_is_taken_for_it(run: RunFolder) -> None:
    """Where one rank fails the others lose their connection."""
    one, other = (Piece(1, "train", 0), 1), (Piece(1, "train", 0), 2)
    attempt.tell_error(run, *one, ValueError("no such\nhead"))
    attempt.tell_error(run, *one, ConnectionError("closed by peer"))
    assert attempt.told(run, *one) == ("FAILED", "ValueError: no such head")
    attempt.tell(run, *other, attempt.FINAL, "diverged")
    attempt.tell_error(run, *other, ConnectionError("closed by peer"))
    assert attempt.told(run, *other) == ("FINAL", "diverged")


def test_an_attempt_without_manifest_does_not_count(run: RunFolder) -> None:
    work = attempt.begin(run, SAMPLE, 1)
    (work.folder / "rows.jsonl").write_text('{"row": 0}\n')
    assert run.manifests.done() == {}
    with pytest.raises(PieceDamaged, match="not whole"):
        run.manifests.open(SAMPLE)


def test_a_flipped_byte_is_found_by_the_reader_and_withdraws_the_piece(run: RunFolder) -> None:
    file = commit(run)
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert run.manifests.get(SAMPLE) is not None  # controllers look at sizes only
    with pytest.raises(PieceDamaged, match=r"rows\.jsonl"):
        run.manifests.open(SAMPLE)
    assert run.manifests.done() == {}  # the next controller has it made again
    commit(run, number=2)
    assert run.manifests.open(SAMPLE)[1].attempt == 2


@pytest.mark.parametrize("damage", ["truncated", "longer", "gone"])
def test_a_file_of_another_size_does_not_count(run: RunFolder, damage: str) -> None:
    file = commit(run)
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if damage == "truncated" else content + b"\n")
    assert run.manifests.get(SAMPLE) is None
    assert run.manifests.done() == {}


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"attempt": 1}', '{"files": {"a": 1}}'])
def test_a_manifest_that_is_damaged_does_not_count(run: RunFolder, text: str) -> None:
    commit(run)
    run.layout.manifest(SAMPLE).write_text(text)
    assert run.manifests.get(SAMPLE) is None
    assert run.manifests.done() == {}


def test_a_manifest_that_is_hidden_for_a_moment_is_waited_for(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an attribute cache of NFS hides what another node has just written."""
    commit(run)
    path = run.layout.manifest(SAMPLE)
    hidden = path.rename(path.with_suffix(".hidden"))
    monkeypatch.setattr(manifests, "VISIBLE_WITHIN_S", 20.0)
    showing = threading.Timer(0.5, hidden.rename, [path])
    showing.start()
    assert run.manifests.open(SAMPLE)[1].rows == 4


def test_a_policy_is_removed_once_and_what_is_not_there_is_left_alone(run: RunFolder) -> None:
    train = Piece(1, "train")
    run.manifests.remove_policy(train)
    assert run.manifests.get(train) is None
    policy = attempt.begin(run, train, 1)
    (policy.folder / "policy").mkdir()
    (policy.folder / "policy" / "weights").write_text("w")
    policy.commit(["policy/weights"], rows=1)
    for _ in range(2):
        run.manifests.remove_policy(train)
        found = run.manifests.get(train)
        assert found is not None
        assert found.removed
        assert not (policy.folder / "policy").exists()


def test_a_manifest_of_another_config_does_not_count(run: RunFolder, tmp_path: Path) -> None:
    commit(run)
    other = make_run(tmp_path / "other", seed=1)
    for piece in (SAMPLE, Piece(1, "sample", 0)):  # another config; other rows
        target = (other if piece == SAMPLE else run).layout.piece(piece)
        target.mkdir(parents=True)
        for name in ("manifest.json", "attempt-1"):
            (target / name).symlink_to(run.layout.piece(SAMPLE) / name)
    assert other.manifests.get(SAMPLE) is None
    assert run.manifests.get(Piece(1, "sample", 0)) is None
    assert run.manifests.get(SAMPLE) is not None


def test_checksum_depends_on_bytes_and_not_on_the_attempt(run: RunFolder) -> None:
    checksums = []
    for number, count in ((1, 4), (2, 4), (3, 5)):
        commit(run, count=count, number=number)
        checksums.append(run.manifests.done()[SAMPLE].checksum)
    assert checksums[0] == checksums[1] != checksums[2]


def test_two_starts_of_one_attempt_get_folders_of_their_own(run: RunFolder) -> None:
    first, second = attempt.begin(run, SAMPLE, 1), attempt.begin(run, SAMPLE, 1)
    assert first.folder != second.folder
    for work, text in ((first, "first"), (second, "second")):
        (work.folder / "a").write_text(text)
        work.commit(["a"], rows=1)
    place, _ = run.manifests.open(SAMPLE)  # the last manifest counts
    assert (place / "a").read_text() == "second"


def test_a_removed_policy_still_counts(run: RunFolder) -> None:
    train = Piece(1, "train")
    work = attempt.begin(run, train, 1)
    (work.folder / "policy").mkdir()
    (work.folder / "policy/w").write_text("weights")
    work.commit(["policy/w"], rows=1)
    link(run.layout.policy(1), work.folder / "policy")
    assert (run.path / "policies/001/w").read_text() == "weights"
    before = run.manifests.done()[train].checksum
    run.manifests.remove_policy(train)
    assert not (work.folder / "policy").exists()
    assert run.manifests.done()[train].checksum == before
    with pytest.raises(PieceDamaged, match="was removed"):
        run.manifests.open(train)
    assert run.manifests.done()[train].checksum == before


# ---------------------------------------------------------------------- writing


def test_write_atomically_leaves_the_old_text_where_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new" * 10000 + "\ud800")
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@given(st.integers(1, 40))
@settings(max_examples=15, deadline=None)
def test_a_torn_journal_line_costs_that_line_only(tmp_path_factory: Any, left: int) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    for number in (1, 2):
        append_line(path, {"number": number, "text": "é" * 8})
    whole = path.read_bytes()
    line = whole.split(b"\n")[0] + b"\n"
    path.write_bytes(whole + line[: min(left, len(line) - 2)])  # the writer was killed
    append_line(path, {"number": 3})
    assert [row["number"] for row in read_lines(path)] == [1, 2, 3]


def test_submissions_are_read_back_from_the_journal(run: RunFolder) -> None:
    for entry in (
        Submit(who="me"),
        Intent.of(Job("sample", 1, 1, (0, 1))),
        Submitted(key="1:sample:1", job="7"),
        Submit(who="me"),
        Intent.of(Job("score", 1, 1, (1,), waits={SAMPLE: 1})),  # sbatch died: no id
    ):
        run.journal.record(entry)
    found, counted_from = RunFolder(run.path).journal.submissions()
    assert [(s.key, s.shards, s.job) for s in found] == [
        ("1:sample:1", (0, 1), "7"),
        ("1:score:1", (1,), None),
    ]
    assert found[1].waits == {SAMPLE: 1}
    assert counted_from == 1


# ---------------------------------------------------------------------- data and draws


def test_frozen_rows_come_back_one_by_one(run: RunFolder) -> None:
    posts = [f"train {i} é\u2028\n" for i in range(5)]
    assert [r["prompt"] for r in rows.frozen(run, "prompts-train")] == posts
    assert [r["prompt"] for r in rows.frozen(run, "prompts-train", [3, 0, 3])] == [
        posts[i] for i in (3, 0, 3)
    ]


@pytest.mark.parametrize("damage", ["flipped", "truncated", "gone"])
def test_frozen_data_that_was_changed_is_refused(run: RunFolder, damage: str) -> None:
    path = run.path / "data/prompts-train.jsonl"
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[:-5] if damage == "truncated" else b"x" + content[1:])
    with pytest.raises(InputError, match=r"prompts-train\.jsonl.* changed"):
        rows.frozen(run, "prompts-train", [0])


def test_summaries_that_begin_with_tldr_give_it_to_their_prompt(tmp_path: Path) -> None:
    """As on the hub in CarperAI/openai_summarize_comparisons; rows like ours stay as they are."""
    post = "SUBREDDIT: r/x\nTITLE: t\nPOST: p"
    posts = [
        {"prompt": post, "chosen": "TL;DR: good", "rejected": "TL;DR: bad"},
        {"prompt": post + "\nTL;DR:", "chosen": " good", "rejected": " bad TL;DR: x"},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in posts))
    names = ("prompt", "chosen", "rejected")
    found = texts.read(Source(path=str(tmp_path)), "train", names, "data.comparisons")
    first, second = map(tldr.Settings().example, found)
    assert first == {"prompt": post + "\nTL;DR:", "chosen": " good", "rejected": " bad"}
    assert second == posts[1]


def test_a_draw_is_a_function_of_seed_and_iteration(run: RunFolder, tmp_path: Path) -> None:
    draws.begin(run, 2)
    same = make_run(tmp_path / "same")
    other = make_run(tmp_path / "other", seed=1)
    assert same.draw(1)["rows"] == run.draw(1)["rows"]
    assert other.draw(1)["rows"] != run.draw(1)["rows"]
    assert run.draw(2)["rows"] != run.draw(1)["rows"]
    assert run.draw(0)["rows"] == []


def test_every_drawn_row_is_in_one_shard_also_where_prompts_are_drawn_twice(run: RunFolder) -> None:
    drawn = run.draw(1)["rows"]
    assert len(drawn) == 12
    assert len(set(drawn)) <= 5  # twelve out of five: with duplicates
    shards = run.graph().of(1, "sample")
    assert len(shards) == 3
    found = [p for shard in shards for p in draws.prompts(run, shard)]
    everything = [r["prompt"] for r in rows.frozen(run, "prompts-train")]
    assert found == [everything[i] for i in drawn]
    assert Counter(found) == Counter(everything[i] for i in drawn)


def test_without_replacement_no_row_is_drawn_twice(tmp_path: Path) -> None:
    sample = Sample(prompts=5, replacement=False, group=2)
    drawn = make_run(tmp_path / "run", sample=sample).draw(1)["rows"]
    assert sorted(drawn) == [0, 1, 2, 3, 4]


def test_an_iteration_that_has_begun_keeps_its_draw_and_sharding(run: RunFolder) -> None:
    before = run.draw(1), run.graph().shardings[1]
    config = sharded(run.config(), 6)
    again = RunFolder.create(config)
    again.freeze(config, {})
    draws.begin(again, 1)
    draws.begin(again, 2)
    assert (again.draw(1), again.graph().shardings[1]) == before
    assert len(again.graph().shardings[2].sample) == 6


# ---------------------------------------------------------------------- one folder, one run


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"seed": 3}, "seed"),
        ({"train": PolicyTraining(lr=1e-3)}, "train.lr"),
        ({"method": Words(per_quantile=3)}, "method.per_quantile"),
        ({"data": Data(prompts=Source(path="other"))}, "data.prompts.path"),
    ],
)
def test_a_folder_of_another_run_is_refused(
    run: RunFolder, more: dict[str, Any], named: str
) -> None:
    with pytest.raises(InputError, match=rf"another {named};"):
        RunFolder.create(make_config(run.path, **more))


def test_the_run_folder_is_mine_alone_and_another_folder_is_left_as_it_is(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert run.path.stat().st_mode & 0o777 == 0o700
    mine = tmp_path / "mine"
    mine.mkdir(mode=0o755)
    (mine / "thesis.tex").write_text("years")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        RunFolder.create(make_config(mine))
    assert mine.stat().st_mode & 0o777 == 0o755
    assert [p.name for p in mine.iterdir()] == ["thesis.tex"]


def test_abandoning_removes_only_what_freezing_wrote(tmp_path: Path) -> None:
    run = RunFolder.create(make_config(tmp_path / "run"))
    rows.freeze(run, "prompts-train", [{"prompt": "a"}])
    run.abandon()
    assert not run.path.exists()
    whole = make_run(tmp_path / "whole")
    whole.abandon()
    assert whole.exists()
    assert rows.is_frozen(whole, "prompts-train")
    mine = tmp_path / "mine"
    (mine / "data").mkdir(parents=True)
    (mine / "data/train.jsonl").write_text("years")
    RunFolder(mine).abandon()
    assert (mine / "data/train.jsonl").read_text() == "years"


def test_a_submission_that_was_killed_while_it_wrote_can_be_given_again(tmp_path: Path) -> None:
    left = [".run.json.12.abcd", ".models.json.12.abcd", ".probe-abc", "lock"]
    for name in left:
        (tmp_path / name).touch()
    assert make_run(tmp_path).exists()


def test_a_path_that_pythonpath_would_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="':' in its path"):
        RunFolder.create(make_config(tmp_path / "2026-11-27T10:30"))


def test_a_copy_of_read_only_folders_can_be_written_and_removed(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    for folder in (source / "inner", source):
        folder.chmod(0o555)
    files.copy_once(source, tmp_path / "copy")
    modes = [p.stat().st_mode & 0o700 for p in (tmp_path / "copy", tmp_path / "copy" / "inner")]
    assert modes == [0o700, 0o700]


def test_damaged_run_json_is_one_sentence(run: RunFolder) -> None:
    whole = run.layout.run.read_text()
    run.layout.run.write_text("{")
    with pytest.raises(InputError, match=r"run\.json: damaged"):
        RunFolder.create(make_config(run.path))
    run.layout.run.write_text(whole)
    (run.path / "config.json").write_text(json.dumps({"run": 1}))
    with pytest.raises(InputError, match=r"config\.json"):
        RunFolder(run.path).config()


# ---------------------------------------------------------------------- going on inside a shard


def make_rows(run: RunFolder, number: int, made: list[int], dies_at: int = -1) -> list[Any]:
    """An attempt at four groups of one row; `made` notes those it had to make."""
    work = attempt.begin(run, SAMPLE, number, {"policy": "abc"})

    def make(groups: Iterator[int]) -> Iterator[list[dict[str, Any]]]:
        for group in groups:
            if group == dies_at:
                raise RuntimeError("died")
            made.append(group)
            yield [{"row": 4 + group, "text": f"é\u2028 {group}"}]

    return work.resumable(range(4, 9), make, "rows")


def test_a_new_attempt_makes_only_the_groups_that_none_has_kept(run: RunFolder) -> None:
    made: list[int] = []
    with pytest.raises(RuntimeError, match="died"):
        make_rows(run, 1, made, dies_at=2)
    assert attempt.saved(run, SAMPLE) == 2
    found = make_rows(run, 2, made)
    assert made == [0, 1, 2, 3]
    assert [row["row"] for row in found] == [4, 5, 6, 7]


@given(byte=st.integers(0, 700), flip=st.booleans())
@settings(max_examples=200, deadline=None)
def test_what_is_kept_is_taken_only_whole(tmp_path_factory: Any, byte: int, flip: bool) -> None:
    """Whatever byte is flipped, or wherever the file is cut: the rows come out right."""
    run = make_run(tmp_path_factory.mktemp("kept") / "run")
    with pytest.raises(RuntimeError, match="died"):
        make_rows(run, 1, [], dies_at=3)
    (file,) = run.layout.piece(SAMPLE).glob("attempt-1/kept.jsonl")
    bytes_ = bytearray(file.read_bytes())
    at = byte % len(bytes_)
    if flip:
        bytes_[at] ^= 1
    file.write_bytes(bytes_ if flip else bytes_[:at])
    made: list[int] = []
    found = make_rows(run, 2, made)
    assert [row["text"] for row in found] == [f"é\u2028 {group}" for group in range(4)]


def test_rows_made_from_other_inputs_are_not_taken(run: RunFolder) -> None:
    with pytest.raises(RuntimeError, match="died"):
        make_rows(run, 1, [], dies_at=3)
    work, made = attempt.begin(run, SAMPLE, 2, {"policy": "other"}), []
    make = lambda groups: (made.append(group) or [{}] for group in groups)  # noqa: E731
    work.resumable(range(4, 9), make, "rows")
    assert made == [0, 1, 2, 3]


@pytest.mark.parametrize("hidden", ["the manifest", "the attempt", "the folder"])
def test_what_another_host_has_made_is_waited_for(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, hidden: str
) -> None:
    """A host that has looked before keeps for a while that there was nothing of the name."""
    commit(run)
    place = {
        "the manifest": run.layout.manifest(SAMPLE),
        "the attempt": run.layout.attempt(SAMPLE, 1),
        "the folder": run.layout.piece(SAMPLE),
    }[hidden]
    away = place.rename(run.path / "away")
    if hidden == "the folder":  # outside a job it means that there is none
        with pytest.raises(manifests.PieceDamaged, match="is not whole"):
            run.manifests.wait(SAMPLE)
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setattr(manifests, "VISIBLE_WITHIN_S", 60.0)
    monkeypatch.setattr(manifests.time, "sleep", lambda _: away.rename(place))
    assert run.manifests.wait(SAMPLE).attempt == 1
    place.rename(away)
    assert run.manifests.done([SAMPLE]) == {}
    assert run.manifests.look_again([SAMPLE]).keys() == {SAMPLE}


def test_what_was_withdrawn_is_not_waited_for(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(run)
    run.manifests.withdraw(SAMPLE)
    monkeypatch.setattr(manifests, "VISIBLE_WITHIN_S", 60.0)
    monkeypatch.setattr(manifests.time, "sleep", lambda _: pytest.fail("it waits"))
    assert run.manifests.look_again([SAMPLE]) == {}


def test_each_pass_over_the_rows_keeps_its_own(run: RunFolder) -> None:
    work = attempt.begin(run, SAMPLE, 1)
    for number in range(2):
        make = lambda groups, n=number: ([{"pass": n}] for _ in groups)  # noqa: E731
        found = work.resumable(range(4, 9), make, "rows", part=(number, 2))
        assert [row["pass"] for row in found] == [number] * 4
    told = attempt.shown(run, SAMPLE)
    assert told is not None
    assert (told["done"], told["total"], told["kept"]) == (8, 8, 0)
    again = attempt.begin(run, SAMPLE, 2)
    for number in range(2):  # two more rows: the rest was kept
        make = lambda groups, n=number: ([{"pass": n}] for _ in groups)  # noqa: E731
        again.resumable(range(4, 10), make, "rows", part=(number, 2))
    told = attempt.shown(run, SAMPLE)
    assert told is not None
    assert (told["done"], told["total"], told["kept"]) == (10, 10, 8)


def test_time_left_counts_neither_a_pause_nor_what_was_kept(run: RunFolder) -> None:
    """One shard was made a day ago; of another one half was kept, and a fourth is made since.

    The third one has not begun; then it is whole without having told anything.
    """
    now = 2e9

    def show(shard: int, done: int, started: float, at: float, kept: int = 0) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attempt.time, "time", lambda: at)
            piece = Piece(1, "sample", shard)
            run.layout.piece(piece).mkdir(parents=True, exist_ok=True)
            attempt.show(run, piece, done, 40, "samples", started, kept)

    show(0, 40, now - 86400, now - 86390)
    show(1, 30, now - 5, now, kept=20)

    def said() -> str:
        return " ".join(status.line(run, 1, "sample").split())

    # 50 of them in 15 s
    assert said() == "sample 1 shards 0/3 70/120 samples 3.33 samples/s about 0:15 left"
    commit(run, Piece(1, "sample", 2))
    assert said() == "sample 1 shards 1/3 70/80 samples 3.33 samples/s about 0:03 left"
    show(1, 40, now - 5, now + 2, kept=20)
    for shard in (0, 1):
        commit(run, Piece(1, "sample", shard))
    assert said() == "sample 1 shards 3/3 80/80 samples 3.53 samples/s took 0:17"


def test_a_shard_far_behind_the_others_is_told_with_its_node(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shard in (0, 2):
        commit(run, Piece(1, "sample", shard))
    attempt.begin(run, SAMPLE, 1)
    attempt.show(run, SAMPLE, 3, 8, "samples", started=time.time() - 5)
    with monkeypatch.context() as patch:
        now = time.time()
        for apart in (-90.0, 0.0, 90.0):  # the reader's clock, from that of the shard's host
            patch.setattr(attempt.time, "time", lambda apart=apart: now + apart)
            assert attempt.laggards(run, 1, "sample") == []
    attempt.show(run, SAMPLE, 3, 8, "samples", started=time.time() - 600)
    (line,) = attempt.laggards(run, 1, "sample")
    assert line.startswith(f"sample 1 shard 1 lags on {process.node()}: 600 s so far, 3/8")
    for shard in (0, 2):  # the others are far smaller
        attempt.show(run, Piece(1, "sample", shard), 1, 1, "samples", started=time.time() - 1)
        commit(run, Piece(1, "sample", shard), number=2, took=100.0)
    assert attempt.laggards(run, 1, "sample") == []


def test_a_folder_is_copied_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in between, or beside another who does the same."""
    source, target = tmp_path / "source", tmp_path / "run" / "package"
    (source / "__pycache__").mkdir(parents=True)
    for name in ("a.py", "b.py", "__pycache__/c.pyc"):
        (source / name).write_text(name)
    copy = files.shutil.copytree

    def killed(*arguments: Any, **how: Any) -> None:
        copy(*arguments, **how)
        raise KeyboardInterrupt

    def overtaken(*arguments: Any, **how: Any) -> None:
        copy(*arguments, **how)
        copy(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "copytree", killed)
        with pytest.raises(KeyboardInterrupt):
            files.copy_once(source, target, "__pycache__")
    assert list(target.parent.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "copytree", overtaken)
        files.copy_once(source, target, "__pycache__")
    files.copy_once(tmp_path, target)  # it is there: nothing is copied
    assert [path.name for path in target.parent.iterdir()] == ["package"]
    assert {path.name for path in target.iterdir()} == {"a.py", "b.py", "__pycache__"}
