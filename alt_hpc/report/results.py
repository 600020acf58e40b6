"""The results of a run, read from its pieces: reports, answers, table, the words at its end."""

import dataclasses
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from alt_hpc.config import BestOf
from alt_hpc.graph import DRAWN, EVALUATE, MEASURE, OWN, REPORT, TEST, VALID, Piece
from alt_hpc.report import diagnosis, intervals, judged, measures
from alt_hpc.report.intervals import Estimate
from alt_hpc.report.tables import aligned, number
from alt_hpc.run import rows as rows_of
from alt_hpc.run.folder import RunFolder

Rows = list[dict[str, Any]]
Reports = dict[int, dict[str, Any]]  # by iteration, in order

COLUMNS = (
    *("iteration", "prompted with", "reward", "perplexity", "length", "truncated"),
    *("sampled reward", "words in order"),
)


def reports(folder: RunFolder) -> Reports:
    """The reports of all iterations that have one."""
    found = {k: folder.manifests.get(Piece(k, REPORT)) for k in sorted(folder.graph().shardings)}
    return {k: manifest.facts[REPORT] for k, manifest in found.items() if manifest is not None}


def whole(folder: RunFolder) -> list[int]:
    """Iterations of which all that was asked has been evaluated and measured, in order.

    Of others something is being made, or cannot be any more (its policy was removed).
    """
    get, graph = folder.manifests.get, folder.graph()
    pieces = {k: graph.of(k, EVALUATE, MEASURE) for k in sorted(graph.shardings)}
    return [k for k, its in pieces.items() if its and all(map(get, its))]


def evaluated(folder: RunFolder, iteration: int) -> Rows:
    """What was evaluated with an iteration: an answer and its measures a row."""
    two = [rows_of.of_stage(folder, iteration, stage) for stage in (EVALUATE, MEASURE)]
    return [answer | measures for answer, measures in zip(*two, strict=True)]


def picked(evaluations: Rows, variant: str, name: str) -> Rows:
    """Answers of the run's policy to a set, asked in one way."""
    wanted = {"policy": OWN, "variant": variant, "set": name}
    return [row for row in evaluations if wanted.items() <= row.items()]


def shown(folder: RunFolder, iteration: int) -> str:
    """The variant that a policy is known by: asked for the best; plain where it knows no word."""
    return "best" if "best" in folder.config().method.asked(iteration) else "plain"


def asked(folder: RunFolder, variant: str) -> str:
    """What a policy was asked with, in a word."""
    return folder.config().method.called(variant) or "(plain)"


def table(folder: RunFolder, found: Reports) -> str:
    """One row per iteration (and kind of prompt) for each set, as a Markdown table.

    Below it a sentence each for what the words do, and for prompts that were shortened.
    """
    parts, title = [], folder.config().title
    for split in dict.fromkeys(name for r in found.values() for name in r["evaluation"]):
        lines = []  # policy, what it was asked with, measures, sampled answers', words' diagnosis
        for k, report in found.items():
            its = report["evaluation"].get(split, {})
            for variant in (variant for variant in its if not variant.startswith(DRAWN)):
                words = report["words"]["fixed"] if (split, variant) == (VALID, "best") else None
                drawn = its.get(DRAWN + variant)
                lines.append((str(k), asked(folder, variant), its[variant], drawn, words))
        others = [item for report in found.values() for item in report["policies"].items()]
        for name, sets in others:
            if split in sets:
                lines.append((name, _how(folder, name), sets[split], None, None))
        cells: list[tuple[str, ...]] = [COLUMNS]
        posts = max(one["rows"] for _, _, one, _, _ in lines)
        for policy, how, one, drawn, words in lines:
            policy += f" ({one['rows']} posts)" if one["rows"] < posts else ""
            numbers = (number(one["reward"], 3), number(one["perplexity"], 2))
            shares = (number(one["length"], 1), f"{100 * one['truncated']:.0f} %")
            sampled = number(drawn["reward"] if drawn else None, 3)
            order = f"{words['share']:.2f} ±{words['share_error']:.2f}" if words else "-"
            cells.append((policy, how, *numbers, *shares, sampled, order))
        text = aligned(cells)
        parts.append(f"{title}; {split}, {posts} held-out posts\n\n{text}")
    for report in found.values():
        parts += ["\n".join(report["lines"])] if report["lines"] else []
    counts = [(f"{stage} {k}", n) for k, r in found.items() for stage, n in r["shortened"].items()]
    if some := ", ".join(f"{count} in {stage}" for stage, count in counts if count):
        parts.append(f"prompts that lost the end of their post, as the context was full: {some}")
    aside = [(k, report.get("set_aside")) for k, report in found.items()]
    if some := ", ".join(f"{count} in iteration {k}" for k, count in aside if count):
        parts.append(f"prompts set aside, with fewer finite rewards than quantiles: {some}")
    lost = [(k, report.get("answers_set_aside")) for k, report in found.items()]
    if some := ", ".join(f"{count} in iteration {k}" for k, count in lost if count):
        parts.append(f"answers set aside, without a finite reward: {some}")
    if said := judged.lines(folder):
        parts.append("\n".join(said))
    return "\n\n".join(parts)


def _how(folder: RunFolder, policy: str) -> str:
    """How a policy was asked that the run did not make."""
    found = folder.config().evaluate.policies.get(policy)
    if isinstance(found, BestOf):
        return f"(best of {found.best_of})"
    return found.ask.replace("\n", " ") if found else "(labels)"


def diagnosed(folder: RunFolder, evaluations: Rows) -> dict[str, dict[str, Any] | None]:
    """The words' diagnosis of a policy: on the starting policy's answers, and on its own."""
    graph, start, theirs, own = folder.graph(), dict[int, Rows](), list[Rows](), dict[int, Rows]()
    for piece in graph.fixed():
        pieces = (dataclasses.replace(piece, stage=stage) for stage in (EVALUATE, MEASURE))
        for answer, measured in zip(*(rows_of.of_piece(folder, p) for p in pieces), strict=True):
            if answer["variant"] == f"{DRAWN}plain":
                start.setdefault(answer["row"], []).append(answer | measured)
    for row in evaluations:
        if row["fixed"]:
            pairs = zip(start[row["row"]], row["fixed"], strict=True)
            theirs.append([answer | {"word": word} for answer, word in pairs])
        if row["word"] is not None:
            own.setdefault(row["row"], []).append(row)
    levels = len(folder.config().method.levels)

    def of(posts: Iterable[Rows]) -> dict[str, Any] | None:
        return diagnosis.diagnose(diagnosis.post(map(_answer, post), levels) for post in posts)

    return {"fixed": of(theirs), "own": of(own.values())}


def _answer(row: dict[str, Any]) -> diagnosis.Answer:
    return diagnosis.Answer(row["reward"], row["ended"] == "eos", row["length"], row["word"])


def gains(
    folder: RunFolder, split: str, k: int, runs: Sequence[Rows], starts: Sequence[Rows] = ()
) -> Iterator[str]:
    """Sentences: what the best feedback gains after an iteration, over the worst and the start.

    `runs`: the evaluations of runs like this one; `starts`: those of their iteration 0.
    """
    how = shown(folder, k)
    best, worst = asked(folder, how), asked(folder, "worst")
    after = [picked(run, how, split) for run in runs]
    others = {f"'{best}' after iteration {k} minus plain 0": (starts, "plain")} if starts else {}
    if how == "best":
        others[f"'{best}' minus '{worst}' after iteration {k}"] = (runs, "worst")
    for name, (befores, variant) in others.items():
        before = [picked(run, variant, split) for run in befores]
        for finished in (False, True):
            found = [measures.gain(*two, finished) for two in zip(before, after, strict=True)]
            if any(found):
                where = ", where both answers finished" if finished else ""
                yield f"reward of {name}{where}: {_said(intervals.mean(found))}"


def _said(it: Estimate) -> str:
    """`+1.003 (95 % over posts ±0.781, over seeds ±0.652; 64 posts, 3 seeds)`."""
    both = {"posts": it["posts"], "seeds": it["seeds"]}
    halves = [f"over {of} ±{half:.3f}" for of, half in both.items() if half is not None]
    counts = f"{it['count']} posts, " + ("1 seed" if it["runs"] == 1 else f"{it['runs']} seeds")
    interval = [f"95 % {', '.join(halves)}"] if halves else []
    return f"{it['mean']:+.3f} ({'; '.join([*interval, counts])})"


def last_words(folder: RunFolder) -> str:
    """What is said at a run's end: table, rise, three unseen posts before and after, places."""
    found, layout = reports(folder), folder.layout
    last = max(found, default=0)
    if not {0, last} <= {*whole(folder)} or not last:
        return table(folder, found) or f"{folder.path}: no iteration has been evaluated yet"
    split = TEST if TEST in found[last]["evaluation"] else VALID
    start, end = evaluated(folder, 0), evaluated(folder, last)
    before, after = picked(start, "plain", split), picked(end, shown(folder, last), split)
    parts = [table(folder, found), ""]
    if made := found.get(0, {}).get("reward_model"):
        parts.append(
            f"reward model: right on {made['accuracy']:.1%} of {made['pairs']} held-out"
            f" comparisons (preferring the longer summary: {made['longer_is_better']:.1%})"
        )
    parts += gains(folder, split, last, [end], [start])
    for old, new in list(zip(before, after, strict=True))[:3]:
        texts = [old["prompt"]]
        for when, row in (("before:", old), ("after: ", new)):
            texts.append(f"{when} {row['text']}   (reward {number(row['reward'], 2)})")
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
