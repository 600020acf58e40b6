"""Curves of a run: TensorBoard points and the picture, from the reports of its iterations."""

from typing import Any

from alt_hpc.graph import JUDGE, TRAIN, VALID, Piece
from alt_hpc.report import judged
from alt_hpc.report.results import Reports, asked
from alt_hpc.run.files import read_lines, replacing
from alt_hpc.run.folder import RunFolder
from alt_hpc.run.layout import METRICS_FILE

COLOURS = {"best": "tab:blue", "worst": "tab:red", "plain": "tab:grey"}
NAMES = ("reward", "perplexity", "length")
TITLES = ("mean reward", "perplexity under the starting policy", "mean length (tokens)")


def write(folder: RunFolder, iteration: int, found: Reports) -> None:
    """One point a quantity for an iteration, and again for later ones among the reports `found`.

    The new session purges all from `iteration` on: a report made again leaves no doubled points.
    """
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(folder.layout.tensorboard / "iterations"), purge_step=iteration)
    for k, report in found.items():
        if k < iteration:
            continue
        points = {"prompts/set_aside": report.get("set_aside")}
        points["answers/set_aside"] = report.get("answers_set_aside")
        for part, about in report.get("parts", {}).items():
            points |= {f"reward-parts/{part}_{name}": value for name, value in about.items()}
        for answers, words in report["words"].items():  # the starting policy's, and its own
            points |= {f"words-{answers}/{name}": value for name, value in (words or {}).items()}
        for split, variants in report["evaluation"].items():
            for variant, measures in variants.items():
                points |= {f"{split}-{variant}/{name}": v for name, v in measures.items()}
        for stage, durations in report["stages"].items():
            points |= {f"stages/{stage}_{name}": value for name, value in durations.items()}
            points[f"prompts/shortened_{stage}"] = report["shortened"][stage]
        for quantile, shape in enumerate(report.get("quantiles", [])):
            name = f"quantile-{quantile} {folder.config().method.levels[quantile]}"
            if shape["num"]:
                points[f"{name}/reward_mean"] = shape["sum"] / shape["num"]
                points[f"{name}/reward_spread"] = shape["spread"]
                raw = {key: value for key, value in shape.items() if key != "spread"}
                writer.add_histogram_raw(f"{name}/rewards", **raw, global_step=k)
        for name, value in points.items():
            if value is not None:
                writer.add_scalar(name, value, k)
        for number, text in enumerate(report["samples"]):
            writer.add_text(f"samples/{number}", text, k)
    writer.close()


def write_win_rates(folder: RunFolder, iteration: int) -> None:
    """The same for what the judge has said after an iteration and later ones."""
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(folder.layout.tensorboard / JUDGE), purge_step=iteration)
    for k, figures in judged.known(folder).items():
        for name, value in judged.points(figures).items():
            if k >= iteration and value is not None:
                writer.add_scalar(name, value, k)
    writer.close()


def draw(folder: RunFolder, found: Reports) -> None:
    """Draw reward, perplexity, length and training loss of the reports into `curves.png`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    sets = {k: report["evaluation"].get(VALID, {}) for k, report in found.items()}
    for axis, name, title in zip(axes.flat, NAMES, TITLES, strict=False):
        for variant, colour in COLOURS.items():
            points = {k: by[variant] for k, by in sets.items() if variant in by}
            points = {k: point for k, point in points.items() if point[name] is not None}
            if not points:  # a control may know no words
                continue
            ys = [point[name] for point in points.values()]
            axis.plot([*points], ys, marker="o", label=asked(folder, variant), color=colour)
            if name == "reward":
                errors = [1.96 * (point["reward_error"] or 0) for point in points.values()]
                low, high = ([y + s * e for y, e in zip(ys, errors, strict=True)] for s in (-1, 1))
                axis.fill_between([*points], low, high, color=colour, alpha=0.12)
        axis.set(title=title, xlabel="iteration")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(fontsize=8)
    losses: list[float] = []  # of every optimiser step of all iterations
    for piece in [Piece(k, TRAIN) for k in sorted(folder.graph().shardings)]:
        if made := folder.manifests.get(piece):
            steps = read_lines(folder.layout.piece(piece) / made.folder / METRICS_FILE)
            losses += [row["loss"] for row in steps]
    axes[1][1].plot(range(1, len(losses) + 1), losses, color="tab:purple")
    axes[1][1].set(title="training loss", xlabel="optimiser step")
    figure.suptitle(f"{folder.path.name}: held-out posts (valid)")
    with replacing(folder.layout.curves) as fresh:
        figure.savefig(fresh, dpi=110, format="png")
    pyplot.close(figure)
