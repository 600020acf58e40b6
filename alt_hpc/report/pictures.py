"""The pictures of a comparison, PNG and SVG: rewards over iterations, by length, by word."""

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alt_hpc.graph import OWN, START, VALID
from alt_hpc.report import intervals, measures
from alt_hpc.report.comparison import Group, Line
from alt_hpc.report.curves import COLOURS
from alt_hpc.report.figures import Figures
from alt_hpc.report.results import Rows, picked
from alt_hpc.run.files import replacing

ACROSS = 3  # panels beside one another, at most
APART = 11.0  # points between the labels of two lines, at least


@contextmanager
def _figure(to: Path, panels: int, size: tuple[float, float], **shared: Any) -> Iterator[Any]:
    """Axes, one a panel; written as `to`.png and `to`.svg, the same bytes for the same figures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    across = min(panels, ACROSS)
    down = -(-panels // across)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": to.name, "font.size": 9}):
        figure = pyplot.figure(figsize=(size[0] * across, size[1] * down), layout="constrained")
        axes = figure.subplots(down, across, squeeze=False, **shared)
        for axis in axes.flat[panels:]:
            axis.set_axis_off()
        yield figure, list(axes.flat[:panels])
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            with replacing(to.with_suffix(f".{kind}")) as fresh:
                figure.savefig(fresh, dpi=120, format=kind, metadata=metadata)
        pyplot.close(figure)


def _estimate(runs: Sequence[Rows]) -> intervals.Estimate:
    return intervals.mean(
        [
            {(r["set"], r["row"]): r["reward"] for r in run if r["reward"] is not None}
            for run in runs
        ]
    )


def _name(group: Group, apart: Container[str]) -> str:
    return f"{group.name} (not compared)" if group.name in apart else group.name


def over_iterations(groups: Sequence[Group], apart: Container[str], to: Path) -> None:
    """A panel a group: mean reward on valid posts, asked plainly, for the best, for the worst.

    Bands: 95 % over posts of one run; of several from the lowest to the highest seed. Panels have
    one scale, where none of them is of a group in `apart`, by name.
    """
    alike = not any(group.name in apart for group in groups)
    with _figure(to, len(groups), (5.2, 3.8), sharey=alike) as (figure, axes):
        for axis, group in zip(axes, groups, strict=True):
            for variant in ("plain", "best", "worst"):
                _curve(axis, group, variant)
            seeds = f"lowest to highest of {len(group.runs)} seeds"
            band = seeds if len(group.runs) > 1 else "95 % over posts"
            axis.set_title(_name(group, apart), wrap=True)
            axis.set(xlabel=f"iteration (band: {band})")
            axis.set_xlim(-0.15, group.first.last + 0.15)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.legend(fontsize=8)
        axes[0].set_ylabel("mean reward")
        figure.suptitle(f"{VALID}: reward over iterations")


def _curve(axis: Any, group: Group, variant: str) -> None:
    points = dict[int, tuple[float, float, float]]()
    for k in sorted({k for run in group.runs for k in run.evaluations}):
        its = [picked(run.evaluations[k], variant, VALID) for run in group.runs]
        each = [mean for rows in its if (mean := _estimate([rows])["mean"]) is not None]
        if not each:
            continue
        found = _estimate([rows for rows in its if rows])
        low, high = (found["low"], found["high"]) if len(each) == 1 else (min(each), max(each))
        mean = sum(each) / len(each)
        points[k] = (mean, mean if low is None else low, mean if high is None else high)
    if not points:
        return
    means, lows, highs = zip(*points.values(), strict=True)
    label = group.first.words.get(variant, variant)
    axis.plot([*points], means, marker="o", markersize=4, color=COLOURS[variant], label=label)
    axis.vlines([*points], lows, highs, color=COLOURS[variant], linewidth=1)
    axis.fill_between([*points], lows, highs, color=COLOURS[variant], alpha=0.15, linewidth=0)


def by_length(lines: Sequence[Line], figures: Sequence[Figures], to: Path) -> None:
    """A point a line of a set's table; what is not compared is left out."""
    both = [(line, its) for line, its in zip(lines, figures, strict=True) if line.compared]
    shown = [
        (line, its["length"], its["reward"]) for line, its in both if its["reward"] is not None
    ]
    with _figure(to, 1, (7.5, 4.8)) as (figure, (axis,)):
        colours = [COLOURS.get(line.variant, "tab:green") if line.of == OWN else "black"
                   for line, *_ in shown]  # fmt: skip
        axis.scatter([x for _, x, _ in shown], [y for *_, y in shown], c=colours, s=28, zorder=3)
        axis.margins(x=0.12, y=0.12)
        axis.set(xlabel="mean length (tokens)", ylabel="mean reward")
        axis.grid(alpha=0.25)
        figure.suptitle(f"{_posts(lines)}: reward against length")
        figure.draw_without_rendering()
        _label(axis, [(line.name, x, y) for line, x, y in shown])


def _label(axis: Any, points: Sequence[tuple[str, Any, Any]]) -> None:
    """Names beside their points, moved upwards where they would cover one another."""
    scale = 72 / axis.figure.dpi
    middle = sum(axis.get_xlim()) / 2
    taken = list[tuple[bool, float]]()
    for name, x, y in sorted(points, key=lambda point: point[2]):
        is_right = x > middle  # then its name stands on the left of it
        at = float(axis.transData.transform((x, y))[1]) * scale
        height = max([at, *(other + APART for side, other in taken if side == is_right)])
        taken.append((is_right, height))
        axis.annotate(
            name,
            (x, y),
            xytext=(-10 if is_right else 10, height - at),
            textcoords="offset points",
            fontsize=8,
            ha="right" if is_right else "left",
            va="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "grey"},
        )


def by_word(groups: Sequence[Group], apart: Container[str], name: str, to: Path) -> None:
    """A panel a group that knows words: the reward under each, 95 % over posts; plain and start."""
    alike = not any(group.name in apart for group in groups)
    with _figure(to, len(groups), (5.2, 3.4), sharex=alike) as (figure, axes):
        for axis, group in zip(axes, groups, strict=True):
            words = group.first.words
            for height, variant in enumerate([*words][::-1]):
                found = _estimate([picked(run.end, variant, name) for run in group.runs])
                if (mean := found["mean"]) is None:
                    continue
                ends = (found["low"], found["high"])
                low, high = (mean if end is None else end for end in ends)
                colour = COLOURS.get(variant, "tab:green")
                axis.plot([low, high], [height, height], color=colour, linewidth=2)
                axis.plot(mean, height, marker="o", color=colour)
            places = {"plain": [picked(run.end, "plain", name) for run in group.runs]}
            places[START] = [picked(run.start, "plain", name) for run in group.runs]
            for (label, rows), style in zip(places.items(), ("--", ":"), strict=True):
                if (mean := _estimate(rows)["mean"]) is not None:
                    axis.axvline(mean, color="grey", linestyle=style, label=label)
            axis.set_yticks(range(len(words)), [*words.values()][::-1])
            axis.set_ylim(-0.6, len(words) - 0.4)
            axis.set_title(_name(group, apart), wrap=True)
            axis.set(xlabel=f"mean {measures.REWARD} (95 % over posts)")
            axis.legend(fontsize=8, loc="lower right")
        figure.suptitle(f"{name}: reward under each word after the last iteration")


def _posts(lines: Sequence[Line]) -> str:
    rows = lines[0].runs[0]
    return f"{rows[0]['set']}, {len(rows)} posts"
