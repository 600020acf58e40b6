"""Runs side by side: which belong together, which cannot be compared, the lines of their table.

Pure, over what `runs` has read. Runs that differ only in their seeds make one group.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from alt_hpc.graph import ASKED, BEST, OWN, REFERENCES, START, TEST, VALID
from alt_hpc.report import measures
from alt_hpc.report.judged import Judged
from alt_hpc.report.results import Rows, picked
from alt_hpc.report.runs import FURTHER, TRAINED, Run
from alt_hpc.settings import digest


@dataclass(frozen=True)
class Group:
    """Runs alike but for their seeds, in the order of these."""

    name: str
    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        return self.runs[0]

    def seed(self, number: int) -> Run | None:
        return next((run for run in self.runs if run.seed == number), None)


@dataclass(frozen=True)
class Line:
    """A row of a set's table: answers of one making, of each run that has its own."""

    name: str
    of: str  # START, REFERENCES, the name of a policy, or OWN
    variant: str
    group: Group
    runs: tuple[Rows, ...]
    compared: bool  # whether its figures may stand beside those of the first group
    judged: tuple[Judged, ...] = ()  # what judges say of its group's runs

    @property
    def set(self) -> str:
        return str(self.runs[0][0]["set"])

    @property
    def row(self) -> str:
        """What `judge.pairs` calls it; empty for a policy that is asked in another way."""
        return self.of if self.of != OWN else BEST if self.variant == self.group.first.shown else ""


def grouped(runs: Sequence[Run]) -> tuple[list[Group], list[str]]:
    """Groups in the order of their first runs; a sentence for each run that is left out."""
    found, said = dict[str, dict[int, Run]](), list[str]()
    for run in runs:
        mine = found.setdefault(run.alike, {})
        if (other := mine.setdefault(run.seed, run)) is not run:
            why = f"{other.name} is the same run, with the same seed"
            said.append(f"{run.name}: left out: {why}")
    titles = [next(iter(mine.values())).title for mine in found.values()]
    groups = list[Group]()
    for title, mine in zip(titles, found.values(), strict=True):
        members = tuple(mine[seed] for seed in sorted(mine))
        same = titles.count(title) > 1
        groups.append(Group(f"{title} ({_place(members[0], runs)})" if same else title, members))
    return groups, said


def _place(run: Run, runs: Sequence[Run]) -> str:
    """A run's folder by its own name, or whole where another one's is the same."""
    paths = {other.folder.path for other in runs}
    name = run.folder.path.name
    return name if [path.name for path in paths].count(name) == 1 else run.name


def sets(groups: Sequence[Group]) -> list[str]:
    """The sets that any policy was evaluated on: valid, test, then the others."""
    names = [row["set"] for group in groups for run in group.runs for row in run.start]
    return sorted(dict.fromkeys(names), key=lambda name: [VALID, TEST, name].index(name))


def on(groups: Sequence[Group], name: str) -> list[Group]:
    """The groups that were evaluated on a set."""
    return [group for group in groups if all(_posts(run, name) for run in group.runs)]


def problems(groups: Sequence[Group], name: str) -> dict[str, list[str]]:
    """Why a group is not compared with the first on a set, by its name; sentences of its runs.

    A run is held against the one of its own seed, else against the first one.
    """
    found = dict[str, list[str]]()
    for group in groups[1:]:
        for run in group.runs:
            other = groups[0].seed(run.seed) or groups[0].first
            if differing := list(_differing(other, run, name)):
                why = f"{name}: {run.name} is not compared with {other.name}"
                found.setdefault(group.name, []).append(f"{why}: other {', '.join(differing)}")
    return found


def _differing(one: Run, other: Run, name: str) -> Iterator[str]:
    for what in dict.fromkeys([*one.measured, *other.measured]):
        its = one.measured.get(what), other.measured.get(what)
        if its[0] != its[1] and not (what.startswith(FURTHER) and None in its):
            yield what
    if _posts(one, name) != _posts(other, name):
        yield "posts"
    if one.last != other.last:
        yield f"last iteration ({other.last}, not {one.last})"


def _posts(run: Run, name: str) -> list[tuple[int, str]]:
    return [(row["row"], row["prompt"]) for row in picked(run.start, "plain", name)]


def lines(groups: Sequence[Group], name: str) -> list[Line]:
    """The rows of a set's table; those that are the same for several groups stand once."""
    apart, found = problems(groups, name), list[Line]()
    silent = [run.name for run, _ in _no_win_rates(groups)]
    known: dict[tuple[str, str], list[set[str]]] = {}  # what lines are that the runs did not make

    def add(label: str, of: str, variant: str, group: Group, pick: Callable[[Run], Rows]) -> None:
        made = [(run, rows) for run in group.runs if (rows := pick(run))]
        runs, mine = tuple(rows for _, rows in made), {_identity(*both) for both in made}
        others = known.setdefault((of, variant), []) if of != OWN else []
        if not runs or any(mine <= other for other in others):
            return
        label += f" of {group.name}" if others else ""
        if of != OWN and len(mine) == 1:
            runs = runs[:1]
        others.append(mine)
        judged = tuple(run.judged for run in group.runs if run.name not in silent)
        found.append(Line(label, of, variant, group, runs, group.name not in apart, judged))

    for group in groups:
        add(START, START, "plain", group, lambda run: picked(run.start, "plain", name))
    policies = [_policies(group) for group in groups]
    for policy in sorted(dict.fromkeys(itertools.chain(*policies)), key=lambda p: p != REFERENCES):
        for group in groups:
            how = group.first.best_of.get(policy)
            label = f"{policy} ({how})" if how else policy
            add(label, policy, ASKED, group, partial(_asked, policy, name))
    for group in (group for group in groups if group.first.last):
        for variant in ["plain", *group.first.words]:
            label = f"{group.name}, {group.first.words.get(variant, variant)}"
            add(label, OWN, variant, group, partial(_at_end, variant, name))
    return found


def _policies(group: Group) -> list[str]:
    """The policies that its runs did not make; those chosen among answers first."""
    names = dict.fromkeys(row["policy"] for run in group.runs for row in run.start)
    return sorted((n for n in names if n != OWN), key=lambda n: n not in group.first.best_of)


def _asked(policy: str, name: str, run: Run) -> Rows:
    return [row for row in run.start if (row["policy"], row["set"]) == (policy, name)]


def _at_end(variant: str, name: str, run: Run) -> Rows:
    return picked(run.end, variant, name)


def _identity(run: Run, rows: Rows) -> str:
    """What answers are and what measures them: measures may differ in their last digit."""
    texts = [(row["row"], row["prompt"], row["text"]) for row in rows]
    return digest([dict(run.measured), texts])


def rewards(groups: Sequence[Group]) -> list[str]:
    """The columns of rewards: the evaluation's, then the further ones by their names."""
    names = [name for group in groups for run in group.runs for name in measures.further(run.start)]
    return [measures.REWARD, *dict.fromkeys(names)]


def _no_win_rates(groups: Sequence[Group]) -> Iterator[tuple[Run, str]]:
    """The runs whose judge says nothing beside others, and why."""
    ways = dict[str, str]()  # judge -> how the first run asks it
    for run in (run for group in groups for run in group.runs if run.judged.wins):
        its = run.judged
        if its.cannot:
            yield run, f"{its.who} {its.cannot}"
        elif ways.setdefault(its.who, its.key) != its.key:
            yield run, f"{its.who} is asked in another way than in the first run"


def notes(groups: Sequence[Group]) -> Iterator[str]:
    """What must be known of the groups to read their figures."""
    for group in groups:
        own = [n.removesuffix(TRAINED) for n in group.first.measured if n.endswith(TRAINED)]
        if len(group.runs) > 1 and own:
            yield f"{group.name}: each seed has trained its own {' and its own '.join(own)}"
    for run, why in _no_win_rates(groups):
        yield f"{run.name}: no win rates: {why}"
