"""What judges said, read from the pieces of a run: win rates and accuracy, as figures and words."""

from collections.abc import Iterable, Sequence
from typing import Any

from alt_hpc.graph import ASKED, BEST, COMPARISONS, JUDGE, OVER, OWN, START, WIN_RATES, Piece
from alt_hpc.report import winrates
from alt_hpc.run import rows as rows_of
from alt_hpc.run.folder import RunFolder

Rows = list[dict[str, Any]]


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


def lines(run: RunFolder) -> list[str]:
    """The sentences of all iterations that were judged."""
    pieces = [Piece(k, WIN_RATES) for k in sorted(run.graph().shardings)]
    there = [piece for piece in pieces if piece in run.graph().of(piece.iteration, WIN_RATES)]
    found = filter(None, map(run.manifests.get, there))
    return [line for manifest in found for line in manifest.facts["lines"]]


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
    if judge and judge["cannot"]:
        low, high = (f"{100 * end:.1f}" for end in judge["judge"]["interval"])
        rule = f"{judge['length']['rate']:.1%}"
        return [f"{of}: cannot judge this (right on {low} to {high} %; the longer one {rule})"]
    how = [f"{it['posts']} posts"]
    if it["agreement"] is not None:
        how += [f"orders agree {it['agreement']:.2f}", f"position bias {it['bias']:+.2f}"]
    how += [f"{it['unread']} of {it['asked']} not read"] if it["unread"] else []
    how += [] if judge else ["the judge's own accuracy is not known"]
    equal = "the length alone tells the verdicts"
    if it["controlled"] is not None:
        equal = f"{it['controlled']:.2f}{_within(it['controlled_interval'])} at equal length"
    return [f"{of}: {it['rate']:.2f}{_within(it['interval'])}; {equal}; {', '.join(how)}"]


def _within(interval: Sequence[float] | None) -> str:
    return f" (95 % over posts {interval[0]:.2f} to {interval[1]:.2f})" if interval else ""
