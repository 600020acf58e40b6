"""What judges said, read from the pieces of a run: win rates and accuracy, as figures and words."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alt_hpc.errors import blaming
from alt_hpc.graph import ASKED, BEST, COMPARISONS, JUDGE, OVER, OWN, START, WIN_RATES
from alt_hpc.judges import compare
from alt_hpc.report import winrates
from alt_hpc.run import code
from alt_hpc.run import rows as rows_of
from alt_hpc.run.folder import RunFolder
from alt_hpc.settings import digest

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Judged:
    """What a report over several runs wants to know of a run's judge."""

    who: str = ""  # the judge's model
    key: str = ""  # the same for judges that are asked alike
    cannot: str = ""  # why it cannot judge
    # Pair -> (set, row) of a post -> 1 where the first one wins, 0 where it loses, else one half.
    wins: Mapping[str, Mapping[tuple[str, int], float]] = field(default_factory=dict)


def names(pair: str) -> tuple[str, str]:
    """The two rows that a pair compares."""
    a, _, b = pair.partition(OVER)
    return a, b


def row_of(run: RunFolder, name: str, k: int) -> tuple[int, str, str]:
    """Where the answers of a row stand that a pair names: iteration, policy, variant."""
    if name == START:
        return 0, OWN, "plain"
    if name != BEST:
        return 0, name, ASKED
    return k, OWN, "best" if "best" in run.config().method.asked(k) else "plain"


def template(run: RunFolder) -> str:
    """What the judge is asked: a file of the user's as the run keeps it, or ours.

    InputError where it is no text, or lacks a placeholder.
    """
    judging = run.config().judge
    assert judging is not None
    if judging.prompt is None:
        return compare.PROMPT
    with blaming(f"{JUDGE}.prompt"):
        text = code.user_file(run, judging.prompt).text(judging.prompt)
        compare.check(text)
    return text


def figures(run: RunFolder, k: int) -> dict[str, Any]:
    """Win rates of an iteration's pairs, with the judge's accuracy, and sentences (`lines`)."""
    pieces = dict.fromkeys([*run.graph().humans(), *run.graph().of(k, JUDGE)])
    rows = [row for piece in pieces for row in rows_of.of_piece(run, piece)]
    humans = [row for row in rows if row["pair"] == COMPARISONS]
    found: dict[str, Any] = {"iteration": k, "judge": _accuracy(humans), "pairs": {}}
    found["lines"] = [_accuracy_said(run, found["judge"])] if humans and not k else []
    pairs: dict[str, Rows] = {}
    for row in rows:
        if row["pair"] != COMPARISONS:
            pairs.setdefault(row["pair"], []).append(row)
    for pair, its in pairs.items():
        found["pairs"][pair] = one = winrates.win_rate(_verdicts(its))
        found["lines"] += _win_rate_said(pair, k, one, found["judge"])
    return found


def known(run: RunFolder) -> dict[int, dict[str, Any]]:
    """The figures of all iterations that were judged, in order."""
    pieces = [
        piece for k in sorted(run.graph().shardings) for piece in run.graph().of(k, WIN_RATES)
    ]
    made = {piece.iteration: run.manifests.get(piece) for piece in pieces}
    return {k: dict(manifest.facts) for k, manifest in made.items() if manifest}


def lines(run: RunFolder) -> list[str]:
    """The sentences of all iterations that were judged."""
    return [line for found in known(run).values() for line in found["lines"]]


def of(run: RunFolder, last: int) -> Judged:
    """What was judged after the last iteration, and before training."""
    judging, found, wins = run.config().judge, known(run), dict[str, dict[tuple[str, int], float]]()
    if judging is None or not found:
        return Judged()
    get, graph = run.manifests.get, run.graph()
    whole = [k for k in sorted({0, last} & {*found}) if all(map(get, graph.of(k, JUDGE)))]
    for k in whole:
        rows = [row for row in rows_of.of_stage(run, k, JUDGE) if row["pair"] != COMPARISONS]
        for row, verdict in zip(rows, _verdicts(rows), strict=True):
            wins.setdefault(row["pair"], {})[row["set"], row["row"]] = verdict.outcome
    judge = next(iter(found.values()))["judge"]
    key = digest([judging.content, template(run)])
    return Judged(judging.judge.model, key, _cannot(judge), wins)


def points(figures: dict[str, Any]) -> dict[str, float | None]:
    """The numbers of an iteration that are drawn as curves.

    No win rate where the judge cannot judge. Its position bias and accuracy are always there.
    """
    judge, found = figures["judge"] or {}, dict[str, float | None]()
    for name in ("judge", "length", "reward_model"):
        if name in judge:
            found[f"judge/accuracy_{name}"] = judge[name]["rate"]
    for pair, its in figures["pairs"].items():
        names = ("rate", "controlled") if not judge.get("cannot") else ()
        found |= {f"win-rate {pair}/{n}": its[n] for n in (*names, "agreement", "bias")}
    return found


def _verdicts(rows: Iterable[dict[str, Any]]) -> list[winrates.Verdict]:
    return [winrates.Verdict(r["first"], r["second"], r["longer"], r["post"]) for r in rows]


def _accuracy(humans: Rows) -> dict[str, Any] | None:
    """How often judge, length rule and reward model agree with people, on the same pairs."""
    if not humans:
        return None
    posts = [row["post"] for row in humans]
    found: dict[str, Any] = winrates.win_rate(_verdicts(humans))
    right = {"judge": [verdict.outcome for verdict in _verdicts(humans)]}
    right["length"] = [row["longest"] for row in humans]
    rewards = [row["rewards"] for row in humans]
    if all(two and None not in two for two in rewards):
        right["reward_model"] = [0.5 + 0.5 * ((a > b) - (a < b)) for a, b in rewards]
    by = {name: winrates.accuracy(values, posts) for name, values in right.items()}
    cannot = winrates.cannot_judge(by["judge"]["interval"], by["length"]["rate"])
    return {**by, "bias": found["bias"], "unread": found["unread"], "cannot": cannot}


def _accuracy_said(run: RunFolder, it: dict[str, Any]) -> str:
    judging = run.config().judge
    assert judging is not None
    own, length, reward = it["judge"], it["length"], it.get("reward_model")
    others = f"the longer one {length['rate']:.1%}"
    others += f", the reward model {reward['rate']:.1%}" if reward else ""
    low, high = (f"{100 * end:.1f}" for end in own["interval"])
    others += f"; {it['unread']} of {2 * own['pairs']} not read" if it["unread"] else ""
    return (
        f"judge {judging.judge.model}: right on {own['rate']:.1%} of {own['pairs']} held-out"
        f" comparisons (95 % over posts {low} to {high} %; {others})"
    )


def _win_rate_said(
    pair: str, k: int, it: dict[str, Any], judge: dict[str, Any] | None
) -> list[str]:
    """The sentence of a pair: no win rate where the judge is no better than the length rule."""
    after = f" after iteration {k}" if BEST in names(pair) else ""
    of = f"win rate of {pair}{after}"
    if cannot := _cannot(judge):
        return [f"{of}: {cannot}"]
    how = [f"{it['posts']} posts"]
    if it["agreement"] is not None:
        how += [f"orders agree {it['agreement']:.2f}", f"position bias {it['bias']:+.2f}"]
    how += [f"{it['unread']} of {it['asked']} not read"] if it["unread"] else []
    how += [] if judge else ["the judge's own accuracy is not known"]
    equal = "the length alone tells the verdicts"
    if it["controlled"] is not None:
        equal = f"{it['controlled']:.2f}{_within(it['controlled_interval'])} at equal length"
    return [f"{of}: {it['rate']:.2f}{_within(it['interval'])}; {equal}; {', '.join(how)}"]


def _cannot(judge: dict[str, Any] | None) -> str:
    """Why there is no win rate; empty where there is one."""
    if not judge or not judge["cannot"]:
        return ""
    low, high = (f"{100 * end:.1f}" for end in judge["judge"]["interval"])
    rule = f"{judge['length']['rate']:.1%}"
    return f"cannot judge this (right on {low} to {high} %; the longer one {rule})"


def _within(interval: Sequence[float] | None) -> str:
    return f" (95 % over posts {interval[0]:.2f} to {interval[1]:.2f})" if interval else ""
