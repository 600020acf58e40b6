"""`alt-hpc report`: tables, sentences, pictures and examples of one run or several, as files."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from alt_hpc.errors import InputError
from alt_hpc.graph import TEST, VALID
from alt_hpc.report import comparison, diagnosis, effects, figures, pictures, results, tables
from alt_hpc.report.comparison import Group, Line
from alt_hpc.report.effects import Effect
from alt_hpc.report.figures import Figures
from alt_hpc.report.runs import Run, read
from alt_hpc.run.files import write_atomically
from alt_hpc.run.folder import RunFolder
from alt_hpc.run.layout import PAGE_FILE

EXAMPLES = 3  # posts
HOW_TO_READ = """\
Each figure is the mean over seeds of each run's own, at the last iteration. ± is half of a 95 %
interval: first over posts, for these policies (percentile bootstrap; the post is the cluster,
paired in differences); then, of several runs, over seeds (Student's t). distinct-n is of equally
many words of the same posts, and has no interval. Equal length: the intercept of the difference in
reward regressed on the difference in length. Published figures carry no interval, so no difference
to them does. Win rate: of two answers to a post 1 where a judge, named in the head, prefers the
first one in both orders, 0 where the other one, else one half."""


@dataclass(frozen=True)
class Set:
    """What is said of one set."""

    name: str
    lines: Sequence[Line]
    figures: Sequence[Figures]
    rewards: Sequence[str]
    effects: Sequence[Effect]
    sentences: Sequence[str]

    @property
    def cells(self) -> tables.Cells:
        return figures.cells(self.lines, self.figures, self.rewards)

    @property
    def title(self) -> str:
        return f"{self.name}, {len(self.lines[0].runs[0])} posts"


def write(folders: Sequence[RunFolder], to: Path | None = None) -> str:
    """Write all files to a folder (default: below the first run); what a terminal shows of them.

    InputError where the start of no run has been evaluated, or the folder cannot be written.
    """
    found = {folder: read(folder) for folder in folders}
    runs = [run for run in found.values() if run]
    if not runs:
        raise InputError(f"{folders[0].path}: {_absent(folders[0])}")
    absent = [folder for folder, run in found.items() if not run]
    missing = [f"{folder.path}: left out: {_absent(folder)}" for folder in absent]
    groups, left_out = comparison.grouped(runs)
    about = [_set(groups, name) for name in comparison.sets(groups)]
    said = [*missing, *left_out, *comparison.notes(groups)]
    place = to or folders[0].layout.report
    try:
        place.mkdir(parents=True, exist_ok=True)
        _write(place, groups, about, said)
    except OSError as error:
        raise InputError(f"{place}: cannot be written ({error.strerror})") from error
    gains = ["\n".join(_gains(group)) for group in groups] if len(runs) > 1 else []
    shown = [_section(one) for one in about]
    return "\n\n".join([*gains, *shown, *(["\n".join(said)] if said else []), f"report  {place}"])


def _absent(folder: RunFolder) -> str:
    """Why a run cannot be reported."""
    if results.reports(folder).get(0):
        return "what was added to the evaluation of its start is not made yet"
    return "its start has not been evaluated yet"


def _set(groups: Sequence[Group], name: str) -> Set:
    here = comparison.on(groups, name)
    lines, rewards = comparison.lines(here, name), comparison.rewards(here)
    found = effects.effects(here, name)
    sentences = list(itertools.chain(*comparison.problems(here, name).values()))
    absent = [group for group in groups if group not in here]
    sentences += [f"{name}: {group.name} was not evaluated on it" for group in absent]
    sentences += effects.over_optimised(found)
    return Set(name, lines, figures.of(lines, rewards), rewards, found, sentences)


def _section(one: Set) -> str:
    parts = [one.title, tables.aligned(one.cells, left=1)]
    if one.effects:
        parts.append(tables.aligned(figures.effect_cells(one.effects), left=3))
    return "\n\n".join([*parts, *one.sentences])


def _write(place: Path, groups: Sequence[Group], about: Sequence[Set], said: Sequence[str]) -> None:
    texts = {"table.csv": _lines_csv(about), "effects.csv": _effects_csv(about)}
    texts["table.tex"] = _latex((one.title, one.cells, 1) for one in about)
    cells = ((one.title, figures.effect_cells(one.effects), 3) for one in about if one.effects)
    texts["effects.tex"] = _latex(cells)
    texts[PAGE_FILE] = _markdown(groups, about, said, _draw(place, groups, about))
    for name, text in texts.items():
        write_atomically(place / name, text)


def _lines_csv(about: Sequence[Set]) -> str:
    head = ["set", "row", "compared"]
    rows = [[one.name, line.name, str(line.compared)] for one in about for line in one.lines]
    numbers = [its for one in about for its in one.figures]
    return tables.as_csv(figures.plain_cells([head, *rows], numbers))


def _effects_csv(about: Sequence[Set]) -> str:
    head = ["set", "method", "effect", "what", "reward of"]
    rows = [[one.name, e.group, e.kind, e.what, e.reward] for one in about for e in one.effects]
    numbers = [figures.effect_figures(effect) for one in about for effect in one.effects]
    return tables.as_csv(figures.plain_cells([head, *rows], numbers))


def _latex(about: Iterable[tuple[str, tables.Cells, int]]) -> str:
    """A `tabular` for each set; the last number: columns of text."""
    return "\n".join(f"% {title}\n{tables.latex(cells, left)}" for title, cells, left in about)


def _markdown(
    groups: Sequence[Group], about: Sequence[Set], said: Sequence[str], drawn: Sequence[str]
) -> str:
    runs = [run.name for group in groups for run in group.runs]
    page = [f"# {', '.join(group.name for group in groups)}"]
    page += ["\n".join(f"- {tables.escaped(name)}" for name in runs), HOW_TO_READ]
    for one in about:
        page += [f"## {one.title}", *map(tables.underscored, _section(one).split("\n\n")[1:])]
    page += ["\n".join(f"- {tables.escaped(sentence)}" for sentence in said)] if said else []
    page += [f"![{name}]({name}.png)" for name in drawn]
    return "\n\n".join([*page, "## Examples", *_examples(_main(about))]) + "\n"


def _main(about: Sequence[Set]) -> Set:
    """The set that pictures and examples are of: test, where there is one."""
    order = [TEST, VALID]
    return min(about, key=lambda one: order.index(one.name) if one.name in order else 2)


def _draw(place: Path, groups: Sequence[Group], about: Sequence[Set]) -> list[str]:
    """The names of the pictures."""
    main, drawn = _main(about), list[str]()
    trained = [group for group in groups if group.first.last]
    apart = {name: set(comparison.problems(groups, name)) for name in (VALID, main.name)}
    if trained:
        pictures.over_iterations(trained, apart[VALID], place / "reward")
        drawn.append("reward")
    pictures.by_length(main.lines, main.figures, place / "length")
    drawn.append("length")
    if worded := [group for group in comparison.on(trained, main.name) if group.first.words]:
        pictures.by_word(worded, apart[main.name], main.name, place / "words")
        drawn.append("words")
    return drawn


def _examples(one: Set) -> Iterator[str]:
    """Of the set's first posts, the answer of the first run of each line."""
    prompts = {row["row"]: row["prompt"] for row in one.lines[0].runs[0][:EXAMPLES]}
    for number, prompt in prompts.items():
        yield f"### {one.name} {number}"
        yield "\n".join(f"> {tables.escaped(text)}  " for text in prompt.split("\n"))
        answers = list[str]()
        for line in one.lines:
            for row in (row for row in line.runs[0] if row["row"] == number):
                reward = tables.number(row["reward"], 2)
                name = f"**{tables.escaped(line.name)}** (reward {reward})"
                answers.append(f"- {name}: {tables.escaped(row['text'])}")
        yield "\n".join(answers)


def _gains(group: Group) -> Iterator[str]:
    """What the runs of a group have gained on valid posts: each, then all of them."""
    yield group.name
    if not group.first.last:
        return
    for run in group.runs:
        yield from (run.name, *(f"  {sentence}" for sentence in _gain([run])))
        if run.learned:
            yield f"  {diagnosis.sentence(dict(run.learned))}"
    if len(group.runs) > 1:
        yield from (f"{len(group.runs)} runs", *(f"  {s}" for s in _gain(group.runs)))


def _gain(runs: Sequence[Run]) -> Iterator[str]:
    first, starts, ends = runs[0], [run.start for run in runs], [run.end for run in runs]
    return results.gains(first.folder, VALID, first.last, ends, starts)
