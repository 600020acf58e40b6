"""Curves of a run: TensorBoard points and the picture, from the reports of its iterations."""

from collections.abc import Sequence
from typing import Any

from alt_hpc.graph import TRAIN, VALID, Piece
from alt_hpc.report.text import asked
from alt_hpc.run.files import read_lines, replacing
from alt_hpc.run.folder import RunFolder
from alt_hpc.run.layout import METRICS_FILE

Reports = dict[int, dict[str, Any]]


def write(folder: RunFolder, iteration: int, found: Reports) -> None:
    """One point a quantity for an iteration, and again for later ones among the reports `found`.

    The new session purges everything from `iteration` on, so that a report made again leaves
    neither doubled points nor a gap.
    """
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder.layout.events("iterations")), purge_step=iteration)
    for k, report in found.items():
        if k >= iteration:
            _points(writer, k, report, folder.config().method.levels)
    writer.close()


def _points(writer: Any, k: int, report: dict[str, Any], texts: Sequence[str]) -> None:
    for split, variants in report["evaluation"].items():
        for variant, measures in variants.items():
            for name, value in measures.items():
                if value is not None:
                    writer.add_scalar(f"{split}-{variant}/{name}", value, k)
    for stage, durations in report["stages"].items():
        for name, value in durations.items():
            writer.add_scalar(f"stages/{stage}_{name}", value, k)
    for stage, count in report["shortened"].items():
        writer.add_scalar(f"prompts/shortened_{stage}", count, k)
    if "set_aside" in report:
        writer.add_scalar("prompts/set_aside", report["set_aside"], k)
    for quantile, shape in enumerate(report.get("quantiles", [])):
        name = f"quantile-{quantile} {texts[quantile]}"
        if shape["num"]:
            writer.add_scalar(f"{name}/reward_mean", shape["sum"] / shape["num"], k)
            writer.add_scalar(f"{name}/reward_spread", shape["spread"], k)
            raw = {key: value for key, value in shape.items() if key != "spread"}
            writer.add_histogram_raw(f"{name}/rewards", **raw, global_step=k)
    for number, text in enumerate(report["samples"]):
        writer.add_text(f"samples/{number}", text, k)


def draw(folder: RunFolder, found: Reports) -> None:
    """Draw reward, perplexity, length and training loss of the reports into `curves.png`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    sets = {k: report["evaluation"].get(VALID, {}) for k, report in found.items()}
    _curve(folder, axes[0][0], sets, "reward", "mean reward")
    _curve(folder, axes[0][1], sets, "perplexity", "perplexity under the starting policy")
    _curve(folder, axes[1][0], sets, "length", "mean length (tokens)")
    losses = _losses(folder)
    axes[1][1].plot(range(1, len(losses) + 1), losses, color="tab:purple")
    axes[1][1].set(title="training loss", xlabel="optimiser step")
    figure.suptitle(f"{folder.path.name}: held-out posts (valid)")
    with replacing(folder.layout.curves) as fresh:
        figure.savefig(fresh, dpi=110, format="png")
    pyplot.close(figure)


def _curve(folder: RunFolder, axis: Any, sets: Reports, name: str, title: str) -> None:
    for variant, colour in {"best": "tab:blue", "worst": "tab:red", "plain": "tab:grey"}.items():
        points = {k: by[variant] for k, by in sets.items() if variant in by}
        points = {k: point for k, point in points.items() if point[name] is not None}
        ys = [point[name] for point in points.values()]
        axis.plot([*points], ys, marker="o", label=asked(folder, variant), color=colour)
        if name == "reward":
            errors = [1.96 * (point["reward_error"] or 0) for point in points.values()]
            low, high = ([y + s * e for y, e in zip(ys, errors, strict=True)] for s in (-1, 1))
            axis.fill_between([*points], low, high, color=colour, alpha=0.12)
    axis.set(title=title, xlabel="iteration")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(fontsize=8)


def _losses(folder: RunFolder) -> list[float]:
    """Of every optimiser step of all iterations."""
    trained = [Piece(k, TRAIN) for k in sorted(folder.graph().shardings)]
    whole = [(piece, folder.manifests.get(piece)) for piece in trained]
    places = [folder.manifests.folder(piece, made) for piece, made in whole if made]
    return [row["loss"] for place in places for row in read_lines(place / METRICS_FILE)]
