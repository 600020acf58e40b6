"""The table of a run, and the words printed at its end."""

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, cast

from alt_hpc.graph import TEST, VALID
from alt_hpc.methods.method import Asking
from alt_hpc.report import measures
from alt_hpc.report.results import reports, rows
from alt_hpc.run.folder import RunFolder

COLUMNS = ("iteration", "prompted with", "reward", "perplexity", "length", "truncated")


def table(folder: RunFolder, found: dict[int, dict[str, Any]]) -> str:
    """One row per iteration (and kind of prompt) for each set, as a Markdown table.

    `found` are the reports of the iterations; below the table, what was shortened or set aside.
    """
    parts = []
    for split in dict.fromkeys(name for r in found.values() for name in r["evaluation"]):
        lines = list(_lines(folder, found, split))
        posts = max(one["rows"] for _, _, one in lines)
        cells = _markdown([COLUMNS, *(_cells(*line) for line in lines)])
        parts.append(f"{split}, {posts} held-out posts\n\n{cells}")
    return "\n\n".join([*parts, *_losses(found)])


def _losses(found: dict[int, dict[str, Any]]) -> Iterator[str]:
    """A sentence each for prompts that were shortened or set aside."""
    stages = [(f"{stage} {k}", n) for k, r in found.items() for stage, n in r["shortened"].items()]
    if some := ", ".join(f"{count} in {stage}" for stage, count in stages if count):
        yield f"prompts that lost the end of their post, as the context was full: {some}"
    aside = [(k, report.get("set_aside")) for k, report in found.items()]
    if some := ", ".join(f"{count} in iteration {k}" for k, count in aside if count):
        yield f"prompts set aside, with fewer finite rewards than quantiles: {some}"


def asked(folder: RunFolder, variant: str) -> str:
    """What a policy was asked with, in a word."""
    return folder.config().method.ask(cast(Asking, variant), {}) or "(plain)"


def _lines(
    folder: RunFolder, found: dict[int, dict[str, Any]], split: str
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Policy, what it was asked with, and its measures."""
    for k, report in found.items():
        for variant, one in report["evaluation"].get(split, {}).items():
            yield str(k), asked(folder, variant), one
    for report in found.values():
        for policy, sets in report["policies"].items():
            if split in sets:
                yield policy, "(its own)", sets[split]


def _cells(policy: str, asked: str, found: dict[str, Any]) -> tuple[str, ...]:
    digits = {"reward": 3, "perplexity": 2, "length": 1}
    numbers = [_number(found[name], d) for name, d in digits.items()]
    return policy, asked, *numbers, f"{100 * found['truncated']:.0f} %"


def _markdown(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    body = [lines[0], tuple("-" * width for width in widths), *lines[1:]]
    return "\n".join(f"| {' | '.join(map(str.rjust, line, widths))} |" for line in body)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def last_words(folder: RunFolder) -> str:
    """What is said at a run's end: table, rise, three unseen posts before and after, places."""
    found = reports(folder)
    if len(found) < 2:
        return table(folder, found) or f"{folder.path}: no iteration has been evaluated yet"
    last = max(found)
    split = TEST if TEST in found[last]["evaluation"] else VALID
    before, after = rows(folder, 0, "plain", split), rows(folder, last, "best", split)
    worst = rows(folder, last, "worst", split)
    best_word, worst_word = asked(folder, "best"), asked(folder, "worst")
    parts = [table(folder, found), ""]
    if made := found.get(0, {}).get("reward_model"):
        parts.append(
            f"reward model: right on {made['accuracy']:.1%} of {made['pairs']} held-out"
            f" comparisons (preferring the longer summary: {made['longer_is_better']:.1%})"
        )
    parts.append(_rise(f"'{best_word}' after iteration {last} minus plain 0", before, after))
    parts.append(_rise(f"'{best_word}' minus '{worst_word}' after iteration {last}", worst, after))
    for old, new in list(zip(before, after, strict=True))[:3]:
        parts += ["", _indented(old["prompt"])]
        for when, row in (("before:", old), ("after: ", new)):
            reward = _number(row["reward"], 2)
            parts.append(_indented(f"{when} {row['text']}   (reward {reward})"))
    parts += [
        "",
        f"checkpoint   {folder.layout.policy(last)}",
        f"table        {folder.layout.table}",
        f"curves       {folder.layout.curves}",
        f"TensorBoard  tensorboard --logdir {folder.layout.tensorboard}",
    ]
    return "\n".join(parts)


def _rise(words: str, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> str:
    mean, half, posts = measures.paired(before, after)
    return f"reward of {words}: {mean:+.3f} (95 % interval ±{half:.3f}, {posts} paired posts)"


def _indented(text: str) -> str:
    lines = [textwrap.fill(line, 98) for line in text.split("\n")]
    return textwrap.indent("\n".join(lines), "  ")
