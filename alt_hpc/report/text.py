"""The table of a run, and the words printed at its end."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any, cast

from alt_hpc.graph import TEST, VALID
from alt_hpc.methods.method import Asking
from alt_hpc.report import measures
from alt_hpc.report.results import reports, rows
from alt_hpc.run.folder import RunFolder

COLUMNS = ("iteration", "prompted with", "reward", "perplexity", "length", "truncated")


def table(folder: RunFolder, found: dict[int, dict[str, Any]]) -> str:
    """One row per iteration (and kind of prompt) for each set, as a Markdown table.

    `found` are the reports of the iterations; below the table, what was cut or set aside.
    """
    parts = []
    for split in dict.fromkeys(name for r in found.values() for name in r["evaluation"]):
        lines = list(_lines(folder, found, split))
        if lines:
            posts = max(int(line[6]) for line in lines)
            parts.append(
                f"{split}, {posts} held-out posts\n\n" + _markdown([line[:6] for line in lines])
            )
    return "\n\n".join([*parts, *_losses(found)])


def _losses(found: dict[int, dict[str, Any]]) -> Iterator[str]:
    """A sentence each for prompts that were cut or set aside."""
    cut = [
        f"{count} in {stage} {k}"
        for k, report in found.items()
        for stage, count in report["cut"].items()
        if count
    ]
    if cut:
        yield f"prompts that lost the end of their post, as the context was full: {', '.join(cut)}"
    aside = [f"{r['set_aside']} in iteration {k}" for k, r in found.items() if r.get("set_aside")]
    if aside:
        yield f"prompts set aside, with fewer finite rewards than quantiles: {', '.join(aside)}"


def asked(folder: RunFolder, variant: str) -> str:
    """What a policy was asked with, in a word."""
    return folder.config().method.ask(cast(Asking, variant), {}) or "(plain)"


def _lines(
    folder: RunFolder, found: dict[int, dict[str, Any]], split: str
) -> Iterator[tuple[str, ...]]:
    for k, report in found.items():
        for variant, one in report["evaluation"].get(split, {}).items():
            yield _line(str(k), asked(folder, variant), one)
    for report in found.values():
        for policy, sets in report["policies"].items():
            if split in sets:
                yield _line(policy, "(its own)", sets[split])


def _line(policy: str, asked: str, found: dict[str, Any]) -> tuple[str, ...]:
    return (
        policy,
        asked,
        _number(found["reward"], 3),
        _number(found["perplexity"], 2),
        _number(found["length"], 1),
        f"{100 * found['truncated']:.0f} %",
        str(found["rows"]),
    )


def _markdown(lines: list[tuple[str, ...]]) -> str:
    widths = [max(len(line[i]) for line in [COLUMNS, *lines]) for i in range(len(COLUMNS))]
    rule = tuple("-" * width for width in widths)
    body = [COLUMNS, rule, *lines]
    return "\n".join(
        "| "
        + " | ".join(word.rjust(width) for word, width in zip(line, widths, strict=True))
        + " |"
        for line in body
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def summary(folder: RunFolder) -> str:
    """The words at the end of a run: table, rise, three unseen posts before and after, places."""
    found = reports(folder)
    done = sorted(found)
    if len(done) < 2:
        return table(folder, found) or f"{folder.path}: no iteration has been evaluated yet"
    last = done[-1]
    split = TEST if TEST in found[last]["evaluation"] else VALID
    before, after = rows(folder, 0, "plain", split), rows(folder, last, "best", split)
    worst = rows(folder, last, "worst", split)
    best_word, worst_word = asked(folder, "best"), asked(folder, "worst")
    parts = [table(folder, found), ""]
    judge = found.get(0, {}).get("reward_model")
    if judge:
        parts.append(
            f"reward model: right on {judge['accuracy']:.1%} of {judge['pairs']} held-out"
            f" comparisons (preferring the longer summary: {judge['longer_is_better']:.1%})"
        )
    parts.append(_rise(f"'{best_word}' after iteration {last} minus plain 0", before, after))
    parts.append(_rise(f"'{best_word}' minus '{worst_word}' after iteration {last}", worst, after))
    for old, new in list(zip(before, after, strict=True))[:3]:
        parts += ["", _indented(old["prompt"])]
        parts.append(_indented(f"before: {old['text']}   (reward {_number(old['reward'], 2)})"))
        parts.append(_indented(f"after:  {new['text']}   (reward {_number(new['reward'], 2)})"))
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
