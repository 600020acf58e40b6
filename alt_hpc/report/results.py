"""The results of a run, read from its pieces: reports, answers, table, the words at its end."""

import textwrap
from typing import Any, cast

from alt_hpc.graph import EVALUATE, MEASURE, OWN, REPORT, TEST, VALID, Piece
from alt_hpc.methods.method import Asking
from alt_hpc.report import measures
from alt_hpc.run import rows as rows_of
from alt_hpc.run.folder import RunFolder

Rows = list[dict[str, Any]]
Reports = dict[int, dict[str, Any]]  # by iteration, in order

COLUMNS = ("iteration", "prompted with", "reward", "perplexity", "length", "truncated")


def reports(folder: RunFolder) -> Reports:
    """The reports of all iterations that have one."""
    found = {k: folder.manifests.get(Piece(k, REPORT)) for k in sorted(folder.graph().shardings)}
    return {k: manifest.facts[REPORT] for k, manifest in found.items() if manifest is not None}


def evaluated(folder: RunFolder, iteration: int) -> Rows:
    """What was evaluated with an iteration: an answer and its measures a row."""
    two = [rows_of.of_stage(folder, iteration, stage) for stage in (EVALUATE, MEASURE)]
    return [answer | measures for answer, measures in zip(*two, strict=True)]


def rows(folder: RunFolder, iteration: int, variant: str, name: str) -> Rows:
    """Answers of the run's policy to a set, asked in one way."""
    wanted = {"policy": OWN, "variant": variant, "set": name}
    return [row for row in evaluated(folder, iteration) if wanted.items() <= row.items()]


def asked(folder: RunFolder, variant: str) -> str:
    """What a policy was asked with, in a word."""
    return folder.config().method.ask(cast(Asking, variant), {}) or "(plain)"


def table(folder: RunFolder, found: Reports) -> str:
    """One row per iteration (and kind of prompt) for each set, as a Markdown table.

    Below it a sentence each for prompts that were shortened or set aside.
    """
    parts = []
    for split in dict.fromkeys(name for r in found.values() for name in r["evaluation"]):
        lines = [
            (str(k), asked(folder, variant), one)
            for k, report in found.items()
            for variant, one in report["evaluation"].get(split, {}).items()
        ]
        others = [item for report in found.values() for item in report["policies"].items()]
        lines += [(name, "(its own)", sets[split]) for name, sets in others if split in sets]
        cells: list[tuple[str, ...]] = [COLUMNS]
        for policy, words, one in lines:
            numbers = (_number(one["reward"], 3), _number(one["perplexity"], 2))
            shares = (_number(one["length"], 1), f"{100 * one['truncated']:.0f} %")
            cells.append((policy, words, *numbers, *shares))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        cells.insert(1, tuple("-" * width for width in widths))
        text = "\n".join(f"| {' | '.join(map(str.rjust, row, widths))} |" for row in cells)
        posts = max(one["rows"] for _, _, one in lines)
        parts.append(f"{split}, {posts} held-out posts\n\n{text}")
    counts = [(f"{stage} {k}", n) for k, r in found.items() for stage, n in r["shortened"].items()]
    if some := ", ".join(f"{count} in {stage}" for stage, count in counts if count):
        parts.append(f"prompts that lost the end of their post, as the context was full: {some}")
    aside = [(k, report.get("set_aside")) for k, report in found.items()]
    if some := ", ".join(f"{count} in iteration {k}" for k, count in aside if count):
        parts.append(f"prompts set aside, with fewer finite rewards than quantiles: {some}")
    return "\n\n".join(parts)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def last_words(folder: RunFolder) -> str:
    """What is said at a run's end: table, rise, three unseen posts before and after, places."""
    found, layout = reports(folder), folder.layout
    if len(found) < 2:
        return table(folder, found) or f"{folder.path}: no iteration has been evaluated yet"
    last = max(found)
    split = TEST if TEST in found[last]["evaluation"] else VALID
    before, after = rows(folder, 0, "plain", split), rows(folder, last, "best", split)
    worst, best = rows(folder, last, "worst", split), asked(folder, "best")
    parts = [table(folder, found), ""]
    if made := found.get(0, {}).get("reward_model"):
        parts.append(
            f"reward model: right on {made['accuracy']:.1%} of {made['pairs']} held-out"
            f" comparisons (preferring the longer summary: {made['longer_is_better']:.1%})"
        )
    for words, other in (
        (f"'{best}' after iteration {last} minus plain 0", before),
        (f"'{best}' minus '{asked(folder, 'worst')}' after iteration {last}", worst),
    ):
        mean, half, posts = measures.paired(other, after)
        interval = f"95 % interval ±{half:.3f}, {posts} paired posts"
        parts.append(f"reward of {words}: {mean:+.3f} ({interval})")
    for old, new in list(zip(before, after, strict=True))[:3]:
        texts = [old["prompt"]]
        for when, row in (("before:", old), ("after: ", new)):
            texts.append(f"{when} {row['text']}   (reward {_number(row['reward'], 2)})")
        lines = [textwrap.fill(line, 98) for text in texts for line in text.split("\n")]
        parts += ["", textwrap.indent("\n".join(lines), "  ")]
    parts += [
        "",
        f"checkpoint   {layout.policy(last)}",
        f"table        {layout.table}",
        f"curves       {layout.curves}",
        f"TensorBoard  tensorboard --logdir {layout.tensorboard}",
    ]
    return "\n".join(parts)
