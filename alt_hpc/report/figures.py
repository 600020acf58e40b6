"""The figures of a line of the table, pure: numbers by column, and these as cells of a table."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from alt_hpc.graph import OWN
from alt_hpc.report import intervals, measures
from alt_hpc.report.comparison import Line
from alt_hpc.report.effects import OVER, Effect
from alt_hpc.report.judged import names
from alt_hpc.report.results import Rows
from alt_hpc.report.runs import COSTS
from alt_hpc.report.tables import Cells, number

Figures = dict[str, float | None]
WON = "win rate over "  # begins the name of a column; the other row and the judge follow
PUBLISHED = ("reward", "perplexity", "length")
OF_RUNS = {"perplexity_median": "median", "length": "length", "truncated": "truncated"}
KINDS = {"every": "", "finished": "_finished", "level": "_level"}  # attributes of an Effect


class Column(NamedTuple):
    """A column of the table that is read: its head, and a line's cell."""

    head: str
    cell: Callable[[Figures], str]


def of(lines: Sequence[Line], rewards: Sequence[str]) -> list[Figures]:
    """The figures of a set's lines: means over runs of each run's own.

    distinct-n is of equally many words: of each post the first m words of every compared line's
    answers, m the fewest that any of them has.
    """
    fewest = dict[int, int]()
    for row in itertools.chain(*(run for line in lines if line.compared for run in line.runs)):
        count = len(row["text"].split())
        fewest[row["row"]] = min(fewest.get(row["row"], count), count)
    return [_figures(line, rewards, fewest) for line in lines]


def _figures(line: Line, rewards: Sequence[str], fewest: Mapping[int, int]) -> Figures:
    found: Figures = {"seeds": len(line.runs), "posts": len(line.runs[0])}
    for name in rewards:
        values = [
            {(r["set"], r["row"]): v for r in run if (v := measures.rewarded(r, name)) is not None}
            for run in line.runs
        ]
        found |= spread(name, intervals.mean(values))
    summaries = [measures.summarise(run) for run in line.runs]
    for name in ("perplexity", *OF_RUNS, *measures.ROUGES):
        found[name] = _mean([one[name] for one in summaries])
    for n in (1, 2, 3):
        each = [measures.distinct(_cut(run, fewest), n) for run in line.runs if line.compared]
        found[f"distinct_{n}"] = _mean(each)
    found |= _win_rates(line)
    runs = line.group.runs if line.of == OWN else ()
    for name in COSTS:
        found[name] = _mean([run.costs[name] for run in runs])
    return found | _published(line, found)


def _win_rates(line: Line) -> Figures:
    """How often the answers of a line win over those of another row, by that row and the judge."""
    found: Figures = {}
    pairs = [(pair, one.who) for one in line.judged for pair in one.wins]
    for pair, who in dict.fromkeys(pairs):
        wins = [one.wins.get(pair, {}) for one in line.judged if one.who == who]
        here = [{at: won for at, won in by.items() if at[0] == line.set} for by in wins]
        a, b = names(pair)
        if a == line.row and any(here):
            found |= spread(f"{WON}{b}, {who}", intervals.mean([by for by in here if by]))
    return found


def _cut(rows: Rows, fewest: Mapping[int, int]) -> list[str]:
    """Answers without the words that another line lacks."""
    return measures.words([r["text"] for r in rows], [fewest[r["row"]] for r in rows])


def _published(line: Line, found: Figures) -> Figures:
    about: Mapping[str, Any] = line.group.first.published or {}
    row = line.variant if line.of == OWN else line.of
    its = about["rows"].get(row, {}) if about.get("set") == line.set else {}
    more: Figures = {}
    for name in (name for name in PUBLISHED if its.get(name) is not None):
        own = found[name]
        more[f"published_{name}"] = its[name]
        more[f"difference_{name}"] = None if own is None else own - its[name]
    return more


def spread(name: str, estimate: intervals.Estimate) -> Figures:
    """An estimate as columns: its mean, and the ends of both of its intervals."""
    mean, half = estimate["mean"], estimate["seeds"]
    over = (None, None) if mean is None or half is None else (mean - half, mean + half)
    ends = (estimate["low"], estimate["high"], *over)
    names = (f"{name}_{of}_{end}" for of in ("posts", "seeds") for end in ("low", "high"))
    return {name: mean, **dict(zip(names, ends, strict=True))}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def cells(lines: Sequence[Line], figures: Sequence[Figures], rewards: Sequence[str]) -> Cells:
    """The table that is read: columns that no line fills are left out."""
    published = (line.group.first.published for line in lines)
    of = next((about["of"] for about in published if about), "")
    every = dict.fromkeys(name for its in figures for name in its if name.startswith(WON))
    won = [name for name in every if f"{name}_posts_low" in every]
    columns = [c for c in _columns(rewards, won, of) if _is_filled(c, figures)]
    head = [lines[0].set, *(column.head for column in columns)]
    rows = [
        [line.name + ("" if line.compared else " (not compared)"), *(c.cell(its) for c in columns)]
        for line, its in zip(lines, figures, strict=True)
    ]
    return [head, *rows]


def _is_filled(column: Column, figures: Sequence[Figures]) -> bool:
    return {column.cell(its) for its in figures} != {"-"}


def _columns(rewards: Sequence[str], won: Sequence[str], published: str) -> list[Column]:
    names = {"perplexity": "perplexity", **OF_RUNS}
    digits = {"perplexity": 2, "perplexity_median": 2, "length": 1}
    found = [_whole("seeds"), _whole("posts"), *map(_rewarded, rewards)]
    for name, head in names.items():
        found.append(_share(name) if name == "truncated" else _number(name, head, digits[name]))
    found += [_number(f"distinct_{n}", f"distinct-{n}", 3) for n in (1, 2, 3)]
    found += [_number(name, f"ROUGE-{name.removeprefix('rouge')}", 3) for name in measures.ROUGES]
    found += map(_rewarded, won)
    heads = ("# train", "tokens sampled", "scored", "trained")
    found += [_whole(name, head) for name, head in zip(COSTS, heads, strict=True)]
    for name in PUBLISHED:
        places = {"reward": 3, **digits}[name]
        found.append(_as_given(f"published_{name}", f"{name}, {published}"))
        found.append(_number(f"difference_{name}", "difference", places, signed=True))
    return found


def _number(name: str, head: str, digits: int, signed: bool = False) -> Column:
    def cell(its: Figures) -> str:
        value = its.get(name)
        return f"{value:+.{digits}f}" if signed and value is not None else number(value, digits)

    return Column(head, cell)


def _as_given(name: str, head: str) -> Column:
    return Column(head, lambda its: "-" if its.get(name) is None else f"{its[name]:g}")


def _whole(name: str, head: str = "") -> Column:
    return Column(head or name, lambda its: number(its.get(name), 0))


def _share(name: str) -> Column:
    def cell(its: Figures) -> str:
        return "-" if its[name] is None else f"{100 * (its[name] or 0):.0f} %"

    return Column(name, cell)


def _rewarded(name: str) -> Column:
    return Column(name, lambda its: within(its, name))


def within(its: Figures, name: str, signed: bool = False) -> str:
    """`16.633 ±0.448 ±0.770`: a mean, half its interval over posts, and that over seeds."""
    mean = its.get(name)
    if mean is None:
        return "-"
    said = [f"{mean:+.3f}" if signed else f"{mean:.3f}"]
    for of in ("posts", "seeds"):
        low, high = its[f"{name}_{of}_low"], its[f"{name}_{of}_high"]
        said += [] if low is None or high is None else [f"±{(high - low) / 2:.3f}"]
    return " ".join(said)


def effect_cells(effects: Sequence[Effect]) -> Cells:
    """The table of effects that is read; in brackets how many posts an estimate is of."""
    rows = [["effect", "what", "reward", "all posts", "both finished", "equal length"]]
    for effect in effects:
        its = effect_figures(effect)
        said = [_of_posts(its, end) for end in KINDS.values()]
        what = effect.what if effect.kind == OVER else f"{effect.group}: {effect.what}"
        rows.append([effect.kind, what, effect.reward, *said])
    return rows


def _of_posts(its: Figures, end: str) -> str:
    said = within(its, f"reward{end}", signed=True)
    return said if said == "-" else f"{said} ({its[f'posts{end}']:.0f})"


def effect_figures(effect: Effect) -> Figures:
    """The numbers of an effect, by column."""
    nothing = intervals.mean([])
    found: Figures = {"seeds": effect.every["runs"]}
    for kind, end in KINDS.items():
        estimate = getattr(effect, kind) or nothing
        found |= {f"posts{end}": estimate["count"], **spread(f"reward{end}", estimate)}
    return found


def plain_cells(abouts: Sequence[Sequence[str]], figures: Sequence[Figures]) -> Cells:
    """Every figure with all its digits, for programs; empty where there is none."""
    names = list(dict.fromkeys(name for its in figures for name in its))
    rows = [
        [*about, *("" if (value := its.get(name)) is None else repr(value) for name in names)]
        for about, its in zip(abouts[1:], figures, strict=True)
    ]
    return [[*abouts[0], *names], *rows]
