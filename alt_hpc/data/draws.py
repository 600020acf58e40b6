"""Draws of prompts: which rows an iteration samples from and is evaluated on, and its shards."""

from __future__ import annotations

import numpy as np

from alt_hpc.data import texts
from alt_hpc.graph import EVALUATE, SAMPLE, Piece, Sharding, cut
from alt_hpc.run import rows
from alt_hpc.run.folder import RunFolder

SPLITS = ("valid", "test")  # that are held out


def begin(run: RunFolder, iteration: int) -> None:
    """Draw an iteration's prompts and cut it into shards, if that has not been done.

    The draw is a function of (run seed, iteration): N rows of the train split, with replacement
    (duplicates are separate rows) or without. Iteration 0 only evaluates.
    """
    if iteration in run.graph().shardings:
        return
    config = run.config()
    total = rows.count(run, "prompts-train")
    rng = np.random.default_rng([config.seed, iteration])
    count = config.sampling.prompts if iteration else 0
    drawn = rng.choice(total, size=count, replace=config.sampling.replacement)
    held_out = {split: evaluated(run, split, iteration) for split in SPLITS}
    run.begin(iteration, {"rows": drawn.tolist(), **held_out}, sharding(run, iteration))


def sharding(run: RunFolder, iteration: int) -> Sharding:
    """How an iteration that begins now is cut."""
    config = run.config()
    count = config.sampling.prompts if iteration else 0
    held_out = sum(evaluated(run, split, iteration) for split in SPLITS)
    return Sharding(
        sample=cut(count, config.sampling.group, config.cluster.stage(SAMPLE).shards),
        evaluate=cut(held_out, config.evaluation.group, config.cluster.stage(EVALUATE).shards),
    )


def evaluated(run: RunFolder, split: str, iteration: int) -> int:
    """How many rows of a split an iteration is evaluated on: test rows at 0 and at the end."""
    config = run.config()
    asked = config.evaluation.prompts if split == "valid" else config.evaluation.test_prompts
    if split == "test" and (not asked or iteration not in (0, config.iterations)):
        return 0
    if rows.is_frozen(run, f"prompts-{split}"):
        found = rows.count(run, f"prompts-{split}")
        return min(found, asked or found)
    if asked:  # only a plan is asked for, before anything has been frozen
        return asked
    return sum(1 for _ in texts.read(config.data.prompts, split, ("prompt",), "data.prompts"))


def drawn_prompts(run: RunFolder, piece: Piece) -> list[str]:
    """Raw prompts of a shard of an iteration's draw."""
    start, end = run.graph().rows(piece) or (0, 0)
    drawn = run.draw(piece.iteration)["rows"][start:end]
    return [row["prompt"] for row in rows.frozen(run, "prompts-train", drawn)]


def held_out_prompts(run: RunFolder, piece: Piece) -> list[tuple[str, int, str]]:
    """(split, row, raw prompt) of a shard of what an iteration is evaluated on."""
    start, end = run.graph().rows(piece) or (0, 0)
    draw = run.draw(piece.iteration)
    places = [(split, i) for split in SPLITS for i in range(draw[split])][start:end]
    found = []
    for split in SPLITS:
        mine = [i for s, i in places if s == split]
        if mine:
            frozen = rows.frozen(run, f"prompts-{split}", mine)
            found += [(split, i, t["prompt"]) for i, t in zip(mine, frozen, strict=True)]
    return found
