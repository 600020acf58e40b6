"""The plan as a pure function, and the graph of pieces beneath it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alt_hpc.config.schema import Cluster, Config, Data, Policy
from alt_hpc.config.sources import Source
from alt_hpc.graph import OWN, VALID, Graph, Piece, Shard, Sharding, cut
from alt_hpc.plan import (
    UNBEGUN,
    Dependency,
    Done,
    Job,
    Limits,
    Outcome,
    Plan,
    State,
    Submission,
    current_iteration,
    is_whole,
    plan,
    tries,
)
from alt_hpc.rewards.model import Settings as Reward

SIDE = ("evaluate", "measure", "report")  # on which no training depends


def make_config(iterations: int = 2, *, sft: bool = False, rm: bool = False, **more: Any) -> Config:
    return Config(
        run="runs/x",
        policy=Policy(model=None if sft else "policy", base="base"),
        reward=Reward(model=None if rm else "judge", base="base"),
        data=Data(prompts=Source(path="data")),
        iterations=iterations,
        **more,
    )


def shardings(iterations: int, sample: int = 3, evaluate: int = 2) -> dict[int, Sharding]:
    held_out = tuple(Shard(OWN, VALID, *rows) for rows in cut(8, 1, evaluate))
    whole = {k: Sharding(cut(12, 1, sample), held_out) for k in range(1, iterations + 1)}
    return {0: Sharding((), held_out), **whole}


def begun(config: Config, iterations: int, sample: int = 3, evaluate: int = 2) -> Graph:
    """The graph of a run whose iterations up to this one have begun."""
    return Graph(config, shardings(iterations, sample, evaluate))


def everything(state: State) -> list[Piece]:
    """All pieces of the iterations begun, inputs first."""
    order: dict[Piece, None] = {}

    def add(piece: Piece) -> None:
        for source in state.graph.sources(piece):
            add(source)
        order[piece] = None

    for k in sorted(state.graph.shardings):
        if k:
            add(Piece(k, "train"))
        add(Piece(k, "report"))
    return list(order)


def done(state: State, *which: Piece, attempt: int = 1) -> State:
    """These pieces whole, made from the inputs as they are."""
    found = dict(state.done)
    for piece in which:
        sources = state.graph.sources(piece)
        made_from = {s: found[s].checksum for s in sources if s in found}
        found[piece] = Done(f"{piece}#{attempt}", attempt, made_from)
    return replace(state, done=found)


def submitted(job: Job) -> Submission:
    return Submission(job.stage, job.iteration, job.attempt, job.shards, job.waits, job.pack)


def by_stage(todo: Plan) -> dict[str, Job]:
    """Jobs by iteration and stage, where there is one of each."""
    found = {f"{job.iteration} {job.stage}": job for job in todo.jobs}
    assert len(found) == len(todo.jobs)
    return found


# ---------------------------------------------------------------------- cutting rows into shards


@given(st.integers(0, 400), st.integers(1, 12), st.integers(1, 40))
def test_shards_hold_every_row_once_in_whole_groups_none_empty(
    rows: int, group: int, shards: int
) -> None:
    found = cut(rows, group, shards)
    assert [row for start, end in found for row in range(start, end)] == list(range(rows))
    assert all(start < end and start % group == 0 for start, end in found)
    groups = -(-rows // group)
    assert len(found) == min(shards, groups)
    sizes = [-(-(end - start) // group) for start, end in found]
    assert not sizes or max(sizes) - min(sizes) <= 1


# ---------------------------------------------------------------------- a whole iteration


def test_first_start_submits_the_whole_iteration_with_its_dependencies() -> None:
    config = make_config()
    state = State(begun(config, 1))
    todo = plan(state)
    jobs = by_stage(todo)
    assert list(jobs) == [
        "0 evaluate",
        "0 measure",
        "0 report",
        "1 sample",
        "1 score",
        "1 train",
        "1 evaluate",
        "1 measure",
        "1 report",
    ]
    assert jobs["1 sample"].shards == (0, 1, 2)
    assert jobs["1 sample"].after == ()
    assert jobs["1 score"].after == (Dependency("aftercorr", jobs["1 sample"].key),)
    assert set(jobs["1 train"].after) == {
        Dependency("afterok", jobs["1 sample"].key),
        Dependency("afterok", jobs["1 score"].key),
    }
    assert jobs["1 evaluate"].after == (Dependency("afterok", jobs["1 train"].key),)
    assert set(jobs["1 measure"].after) == {  # it reads what the starting policy has drawn too
        Dependency("aftercorr", jobs["1 evaluate"].key),
        Dependency("afterok", jobs["0 evaluate"].key),
    }
    assert Dependency("afterok", jobs["1 evaluate"].key) in jobs["1 report"].after
    # The next controller waits for sampling, scoring and training, not for evaluations.
    assert set(todo.wait_for) == {jobs[f"1 {s}"].key for s in ("sample", "score", "train")}


def test_what_the_run_makes_itself_comes_first() -> None:
    jobs = by_stage(plan(State(begun(make_config(sft=True, rm=True), 1))))
    sft, judge = jobs["0 sft"], jobs["0 reward-model"]
    assert sft.after == judge.after == ()
    assert jobs["1 sample"].after == (Dependency("afterok", sft.key),)
    assert set(jobs["1 score"].after) == {
        Dependency("aftercorr", jobs["1 sample"].key),
        Dependency("afterok", judge.key),
    }
    assert Dependency("afterok", sft.key) in jobs["1 train"].after


def test_the_last_controller_waits_for_evaluations_too() -> None:
    config = make_config(iterations=1)
    todo = plan(State(begun(config, 1)))
    assert set(todo.wait_for) == {job.key for job in todo.jobs}


def test_evaluation_overlaps_the_next_iteration() -> None:
    config = make_config(iterations=2)
    state = State(begun(config, 2))
    ready = [p for p in everything(state) if p.iteration <= 1 and p.stage != "report"]
    evaluations = [p for p in ready if p == Piece(1, "evaluate", 1)]
    state = done(state, *(p for p in ready if p not in evaluations))
    earlier = Submission("evaluate", 1, 1, (0, 1), job="77")
    flying = dict.fromkeys(evaluations, "77_1")
    state = replace(state, submissions=(earlier,), in_flight=flying)
    jobs = by_stage(plan(state))
    assert jobs["2 sample"].after == ()
    assert Dependency("afterok", "77_1") in jobs["1 report"].after


def test_evaluation_may_lag_by_keep_and_two_iterations() -> None:
    """As no policy is removed from disk before it was evaluated."""
    config = make_config(iterations=9, keep=1)
    for late, waited in ((2, True), (3, False)):
        state = State(begun(config, 5))
        ready = [p for p in everything(state) if p.iteration <= 4]
        lagging = [p for p in ready if p.stage in SIDE and p.iteration >= late]
        state = done(state, *(p for p in ready if p not in lagging))
        flying = {p: f"{p.iteration}9" for p in lagging}
        submissions = tuple(Submission(p.stage, p.iteration, 1, (p.shard,)) for p in lagging)
        state = replace(state, in_flight=flying, submissions=submissions)
        assert (f"{late}9" in plan(state).wait_for) == waited


def test_an_error_that_stays_ends_the_run_at_once_or_gives_a_side_stage_up() -> None:
    config = make_config(iterations=1)
    end = Outcome("FAILED", ("n1",), sentence="posts.jsonl:3: no text")
    for stage in ("sample", "evaluate"):
        state = State(begun(config, 1))
        job = Job(stage, 1, 1, (0,))
        piece = Piece(1, stage, 0)
        others = [p for p in everything(state) if p.stage not in (stage, "measure", "report")]
        others = [p for p in others if stage == "evaluate" or p.iteration == 0]
        state = done(state, *others)
        ends = {(job.key, piece): end}
        state = replace(state, submissions=(submitted(job),), outcomes=ends)
        todo = plan(state)
        if stage == "sample":
            assert todo.stop == "sample 1 shard 0: posts.jsonl:3: no text"
            continue
        assert todo.given_up == {piece: "evaluate 1 shard 0: posts.jsonl:3: no text"}
        made = {p for job in todo.jobs for p in job.pieces}
        assert piece not in made
        assert Piece(1, "report") not in made  # nor what would be made from it
        assert Piece(1, "evaluate", 1) in made


def test_where_slurm_leaves_dependants_waiting_the_next_controller_waits_for_no_dependant() -> None:
    config = make_config(iterations=1, cluster=Cluster(kill_invalid_dependencies=False))
    todo = plan(State(begun(config, 1)))
    assert set(todo.wait_for) == {job.key for job in todo.jobs if not job.after}


def test_a_time_limit_met_again_and_again_counts_only_without_progress() -> None:
    piece = Piece(1, "sample", 0)
    for state in ("STOPPED", "TIMEOUT"):
        more = [Outcome(state, (f"n{i}",), saved) for i, saved in enumerate((24, 44, 64))]
        assert tries(tried((0,), *more), piece).counted == 0
        assert tries(tried((0,), *more), piece).nodes == ()
        none = [Outcome(state, ("n1",), 0)] * 2
        assert tries(tried((0,), *none), piece).counted == 2
    assert tries(tried((0,), Outcome("TIMEOUT", ("n1",), 0)), piece).nodes == ("n1",)


def test_missing_shards_alone_are_submitted_again_and_pair_by_the_same_list() -> None:
    config = make_config(iterations=1)
    state = State(begun(config, 1, sample=5))
    whole = [Piece(1, s, i) for i in (0, 2) for s in ("sample", "score")] + [Piece(1, "sample", 4)]
    jobs = plan(done(state, *whole)).jobs
    samples = [job for job in jobs if job.stage == "sample"]
    assert [job.shards for job in samples] == [(1, 3)]
    scores = {job.shards: job.after for job in jobs if job.stage == "score"}
    assert scores == {(1, 3): (Dependency("aftercorr", samples[0].key),), (4,): ()}


def test_one_element_is_a_plain_job_and_waits_by_afterok() -> None:
    jobs = by_stage(plan(State(begun(make_config(iterations=1), 1, sample=1))))
    assert jobs["1 score"].after == (Dependency("afterok", jobs["1 sample"].key),)


def test_a_piece_made_again_with_other_bytes_unmakes_what_came_from_it() -> None:
    config = make_config(iterations=1)
    state = State(begun(config, 1))
    state = done(state, *everything(state))
    assert plan(state).finished
    same = done(state, Piece(1, "sample", 1))
    assert plan(same).finished  # the same bytes again
    other = done(state, Piece(1, "sample", 1), attempt=2)
    jobs = plan(other).jobs
    assert next(j for j in jobs if j.iteration).pieces == (Piece(1, "score", 1),)
    assert {j.stage for j in jobs} == {"score", "train", "report"}
    # Evaluations fall when the policy that is made again differs.
    again = done(other, Piece(1, "score", 1), Piece(1, "train"), attempt=2)
    assert ("evaluate", (0, 1)) in [(j.stage, j.shards) for j in plan(again).jobs]


def test_an_input_that_is_gone_does_not_unmake_what_came_from_it() -> None:
    config = make_config(iterations=1)
    state = State(begun(config, 1))
    state = done(state, *everything(state))
    gone = {p: d for p, d in state.done.items() if p != Piece(1, "train")}
    assert is_whole(replace(state, done=gone), Piece(1, "evaluate", 0))


# ---------------------------------------------------------------------- attempts


def test_an_exhausted_piece_stops_the_run_and_is_named() -> None:
    config = make_config(iterations=1, cluster=Cluster(max_attempts=2))
    state = State(begun(config, 1))
    good = [Piece(0, "evaluate", 0), Piece(0, "evaluate", 1), Piece(0, "report")]
    for attempt in (1, 2):
        todo = plan(state)
        assert todo.stop is None, attempt
        state = replace(state, submissions=(*state.submissions, *map(submitted, todo.jobs)))
        state = done(state, *good, Piece(1, "sample", 0), Piece(1, "score", 0))
        state = done(state, Piece(1, "sample", 2), Piece(1, "score", 2))
    todo = plan(state)
    assert todo.jobs == ()
    assert todo.stop is not None
    assert "sample 1 shard 1" in todo.stop
    assert "2 times" in todo.stop
    # A person submits again: earlier attempts no longer count.
    again = plan(replace(state, counted_from=len(state.submissions)))
    assert again.stop is None
    assert Job("sample", 1, 3, (1,)) in again.jobs  # and keep their numbers


def test_cancelled_because_its_input_failed_is_no_attempt() -> None:
    """Sampling fails twice; scoring and training, cancelled each time, have all their tries."""
    config = make_config(iterations=1, cluster=Cluster(max_attempts=3))
    state = State(begun(config, 1))
    zero = [p for p in everything(state) if p.iteration == 0]
    for _ in range(2):
        todo = plan(state)
        state = replace(state, submissions=(*state.submissions, *map(submitted, todo.jobs)))
        state = done(state, *zero)
    samples = [Piece(1, "sample", i) for i in range(3)]
    for attempt in (3, 4):
        todo = plan(state)
        assert todo.stop is None
        state = replace(state, submissions=(*state.submissions, *map(submitted, todo.jobs)))
        state = done(state, *(p for p in samples if p not in state.done), attempt=attempt)
    # Now scoring has failed by itself in submissions 3 and 4: one try is left, then none.
    todo = plan(state)
    assert todo.stop is None
    assert "score" in {job.stage for job in todo.jobs}
    state = replace(state, submissions=(*state.submissions, *map(submitted, todo.jobs)))
    stop = plan(state).stop
    assert stop is not None
    assert "score 1" in stop


# ---------------------------------------------------------------------- any state


@st.composite
def states(draw: st.DrawFn) -> tuple[Config, State, int]:
    """A run somewhere on its way: any pieces done or in flight, as any accidents may leave it."""
    config = make_config(
        draw(st.integers(1, 3)),
        sft=draw(st.booleans()),
        rm=draw(st.booleans()),
        cluster=Cluster(max_attempts=draw(st.sampled_from([1, 2, 50]))),
    )
    last = draw(st.integers(1, config.iterations))
    state = State(begun(config, last, draw(st.integers(1, 5)), draw(st.integers(1, 3))))
    everyone = everything(state)
    # Mostly a run from its beginning to some point, with holes.
    reached = draw(st.integers(0, len(everyone)))
    holes = draw(st.sets(st.sampled_from(everyone), max_size=4))
    state = done(state, *(p for p in everyone[:reached] if p not in holes))
    for piece in draw(st.lists(st.sampled_from(everyone), max_size=2)):
        if piece in state.done:
            state = done(state, piece, attempt=2)  # with other bytes
    if current_iteration(state) > last:  # the controller begins it before it plans
        more = shardings(last + 1, len(state.graph.shardings[1].sample))[last + 1]
        graph = Graph(config, {**state.graph.shardings, last + 1: more})
        state = replace(state, graph=graph)
        everyone = everything(state)
    submissions, in_flight = [], {}
    earlier = draw(st.integers(0, 2))
    for number in range(1, earlier + 1):
        for k, stage in sorted({(p.iteration, p.stage) for p in everyone}):
            members = [p for p in everyone if (p.iteration, p.stage) == (k, stage)]
            shards = draw(st.sets(st.sampled_from([p.shard for p in members])))
            if shards:
                pack = draw(st.integers(1, 3))
                submissions.append(Submission(stage, k, number, tuple(sorted(shards)), pack=pack))
    unfinished = [(p, s) for s in submissions for p in s.pieces if not is_whole(state, p)]
    if unfinished:
        for piece, submission in draw(st.lists(st.sampled_from(unfinished), max_size=6)):
            element = submission.element[piece]
            mates = submission.elements[element]
            in_flight |= dict.fromkeys(mates, f"9{submissions.index(submission)}_{element}")
    state = replace(state, submissions=tuple(submissions), in_flight=in_flight)
    return config, state, draw(st.integers(1, 4))


@settings(max_examples=150)
@given(states())
def test_a_plan_of_any_state(case: tuple[Config, State, int]) -> None:
    config, state, max_array = case
    todo = plan(state, Limits(max_array))
    everyone = everything(state)
    whole = {p for p in everyone if is_whole(state, p)}
    results = {p for p in everyone if p.stage in ("train", "report")}
    given_up = set(todo.given_up)
    for piece in everyone:  # sources first: what is made from what was given up
        given_up |= {piece} if given_up & set(state.graph.sources(piece)) - whole else set()
    assert not any(p.stage in ("sample", "score", "train", "sft") for p in todo.given_up)
    if todo.finished:
        assert todo.jobs == ()
        assert results <= whole | given_up
        assert max(state.graph.shardings) == config.iterations
        return
    if todo.stop:
        assert todo.jobs == ()
        named = [p for p in everyone if str(p) in todo.stop]
        assert any(p not in whole and p not in state.in_flight for p in named)
        return
    making: dict[Piece, Job] = {}
    used = {s.key for s in state.submissions}
    for job in todo.jobs:
        assert job.key not in used  # a recorded attempt is never taken for another
        used.add(job.key)
        assert 1 <= len(job.elements) <= max_array
        assert [p for element in job.elements for p in element] == list(job.pieces)
        assert len(set(job.shards)) == len(job.shards)
        after = {d.target: d.kind for d in job.after}
        for piece in job.pieces:
            assert piece not in whole
            assert piece not in state.in_flight
            assert piece not in making  # nor twice in one plan
            for source in state.graph.sources(piece):
                if source in making:
                    other = making[source]
                    assert other.key in after
                    assert job.waits[source] == other.attempt
                    if after[other.key] == "aftercorr":
                        mates = {"score": "sample", "measure": "evaluate"}
                        assert other.stage == mates[job.stage]
                        assert (job.shards, job.pack) == (other.shards, other.pack)
                elif source in state.in_flight:
                    assert after[state.in_flight[source]] == "afterok"
                else:
                    assert source in whole
        making.update(dict.fromkeys(job.pieces, job))
    # Nothing beyond the iteration that is up next, and nothing of it left out.
    trained = 0
    while Piece(trained + 1, "train") in whole:
        trained += 1
    horizon = min(trained + 1, config.iterations)
    assert all(p.iteration <= horizon for p in making)
    due = {p for p in results - whole - given_up if p.iteration <= horizon}
    assert due <= set(making) | set(state.in_flight)
    # The next controller waits for something, and for all work of the iteration itself.
    assert todo.wait_for
    expected = {j.key for j in todo.jobs if j.stage not in SIDE}
    expected |= {i for p, i in state.in_flight.items() if p.stage not in SIDE}
    assert expected <= set(todo.wait_for)


@pytest.mark.parametrize("room", [None, 1, 5])
@pytest.mark.parametrize("max_array", [1, 3, 1000])
def test_carrying_out_the_plans_finishes_any_run(max_array: int, room: int | None) -> None:
    """Play the controller with a cluster on which every third element fails."""
    config = make_config(3, sft=True, rm=True, cluster=Cluster(max_attempts=30))
    state = State(begun(config, 1, sample=4))
    made: list[Piece] = []
    count = 0
    for _ in range(200):
        todo = plan(state, Limits(max_array, room))
        assert todo.stop is None
        assert room is None or sum(len(job.elements) for job in todo.jobs) <= room
        if todo.finished:
            break
        ended: dict[str, set[int]] = {}
        for job in todo.jobs:
            state = replace(state, submissions=(*state.submissions, submitted(job)))
            good = set()
            for i, element in enumerate(job.elements):
                kinds = {d.target: d.kind for d in job.after}
                upstream = [
                    (i in ended[t]) if kind == "aftercorr" else len(ended[t]) == sizes(todo, t)
                    for t, kind in kinds.items()
                ]
                if not all(upstream):
                    continue
                for piece in element:
                    count += 1
                    if not count % 3:
                        break  # takes the rest of its element along
                    for source in state.graph.sources(piece):
                        assert is_whole(state, source), (piece, source)
                    state = done(state, piece, attempt=job.attempt)
                    made.append(piece)
                else:
                    good.add(i)
            ended[job.key] = good
        trained = [p.iteration for p in state.done if p.stage == "train"]
        horizon = min(max(trained, default=0) + 1, config.iterations)
        state = replace(state, graph=begun(config, horizon, sample=4))
    else:
        raise AssertionError("not finished after 200 controllers")
    assert len(made) == len(set(made)) == len(everything(state))


# ---------------------------------------------------------------------- how tries ended


def tried(shards: tuple[int, ...], *ends: Outcome | None) -> State:
    """Sample shards of iteration 1, submitted once for each end of theirs; None: forgotten."""
    jobs = [Job("sample", 1, n, shards) for n in range(1, len(ends) + 1)]
    outcomes = {
        (job.key, piece): end
        for job, end in zip(jobs, ends, strict=True)
        if end
        for piece in job.pieces
    }
    graph = begun(make_config(), 1)
    return State(graph, submissions=tuple(map(submitted, jobs)), outcomes=outcomes)


def test_preemption_and_a_dead_node_do_not_count_while_more_and_more_is_safe() -> None:
    failed, unknown = Outcome("FAILED", ("n1",)), None
    piece = Piece(1, "sample", 0)
    preempted = [Outcome("PREEMPTED", ("n1",), saved) for saved in (0, 2, 7)]
    dead = [Outcome("NODE_FAIL", ("n2",), 3)] * 4
    assert tries(tried((0,), *preempted), piece).counted == 0
    assert tries(tried((0,), *dead), piece).counted == 3  # only the first left more than before
    assert tries(tried((0,), failed, unknown, *preempted), piece).counted == 3


def test_a_retry_keeps_away_from_the_nodes_on_which_that_shard_failed() -> None:
    state = tried((0,), Outcome("FAILED", ("n1",)), Outcome("TIMEOUT", ("n3",)))
    jobs = {job.shards: job for job in plan(state).jobs if job.stage == "sample"}
    assert jobs[(0,)].exclude == ("n3", "n1")
    assert jobs[(1, 2)].exclude == ()


def test_the_stop_sentence_names_piece_end_and_node() -> None:
    state = tried((0,), *[Outcome("OUT_OF_MEMORY", ("n2",))] * 3)
    stop = plan(state).stop
    assert stop is not None
    assert "sample 1 shard 0 failed 3 times" in stop
    assert stop.endswith("last OUT_OF_MEMORY on n2")
    state = tried((0,), *[Outcome("FAILED", ("n2",), error="ValueError: no such head")] * 3)
    assert str(plan(state).stop).endswith("last FAILED on n2: ValueError: no such head")


def test_where_there_is_room_for_few_the_first_are_submitted_and_no_other() -> None:
    todo = plan(State(begun(make_config(), 1)), Limits(room=7))
    assert [(job.stage, job.shards) for job in todo.jobs] == [
        ("evaluate", (0, 1)),
        ("measure", (0, 1)),
        ("report", (0,)),
        ("sample", (0, 1)),
    ]
    assert todo.wait_for == ("1:sample:1",)
    none = plan(State(begun(make_config(), 1)), Limits(room=0))
    assert (none.jobs, none.wait_for, none.stop, none.finished) == ((), (), None, False)


def test_a_machine_without_a_queue_waits_for_what_a_later_try_still_makes() -> None:
    """A try that was left behind has made the training whole, and the next one goes on at it."""
    state = State(begun(make_config(), 1))
    train = Piece(1, "train")
    state = done(state, *(p for p in everything(state) if p < train and p.stage not in SIDE), train)
    again = Submission("train", 1, 2, (0,), {}, 1)
    state = replace(state, submissions=(again,), in_flight={train: "7"})
    jobs = plan(state, Limits(only_ready=True)).jobs
    assert all(job.after == () for job in jobs)
    assert (1, "evaluate") not in {(job.iteration, job.stage) for job in jobs}
    ready = plan(replace(state, in_flight={}), Limits(only_ready=True)).jobs
    assert (1, "evaluate") in {(job.iteration, job.stage) for job in ready}


def test_arrays_that_would_be_too_long_have_several_shards_an_element() -> None:
    todo = plan(State(begun(make_config(), 1, sample=8)), Limits(array=3))
    jobs = {job.stage: job for job in todo.jobs if job.iteration == 1}
    for stage in ("sample", "score"):
        shards = [[piece.shard for piece in element] for element in jobs[stage].elements]
        assert shards == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert Dependency("aftercorr", jobs["sample"].key) in jobs["score"].after
    cut_short = plan(State(begun(make_config(), 1, sample=8)), Limits(array=3, room=7))
    assert cut_short.jobs[-1].shards == (0, 1, 2, 3, 4, 5)


def test_a_shard_that_its_task_never_came_to_has_all_its_tries() -> None:
    failed, unbegun = Outcome("FAILED", ("n1",)), Outcome(UNBEGUN, ("n1",))
    piece = Piece(1, "sample", 0)
    state = tried((0,), failed, unbegun, unbegun, failed)
    assert tries(state, piece).counted == 2
    assert tries(tried((0,), unbegun), piece).nodes == ()


def test_a_score_that_never_ran_does_not_count_for_any_shard_of_its_element() -> None:
    config = make_config()
    sample = Job("sample", 1, 1, (0, 1), pack=2)
    score = Job("score", 1, 1, (0, 1), dict.fromkeys(sample.pieces, 1), pack=2)
    state = State(begun(config, 1), submissions=(submitted(sample), submitted(score)))
    state = done(state, Piece(1, "sample", 0))  # then the task died: no shard 1
    assert tries(state, Piece(1, "sample", 1)).counted == 1
    assert [tries(state, piece).counted for piece in score.pieces] == [0, 0]


def test_an_unpaired_score_array_cancelled_for_one_sample_does_not_count() -> None:
    """Slurm cancels all of it, though the samples of some of its shards are good."""
    config = make_config()
    sample = Job("sample", 1, 1, (0, 1, 2))
    score = Job("score", 1, 1, (0, 1), dict.fromkeys(sample.pieces, 1))
    state = State(begun(config, 1), submissions=(submitted(sample), submitted(score)))
    state = done(state, Piece(1, "sample", 0), Piece(1, "sample", 1))
    first = Piece(1, "score", 0)
    ends = {"cancelled": Outcome("CANCELLED"), "failed": Outcome("FAILED", ("n1",))}
    counted = {
        how: tries(replace(state, outcomes={(score.key, first): end}), first).counted
        for how, end in ends.items()
    }
    assert counted == {"cancelled": 0, "failed": 1}


def test_a_chain_submitted_at_once_goes_to_its_last_iteration() -> None:
    config = make_config(3)
    todo = plan(State(begun(config, 3)), horizon=3)
    keys = {f"{job.iteration} {job.stage}": job for job in todo.jobs}
    assert Dependency("afterok", keys["2 train"].key) in keys["3 sample"].after
    assert set(todo.wait_for) == {job.key for job in todo.jobs}


def sizes(todo: Plan, key: str) -> int:
    return next(len(job.elements) for job in todo.jobs if job.key == key)
