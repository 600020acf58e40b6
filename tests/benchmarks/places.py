"""Does a word teach? An arm of the grid: place of the word, blocks and embeddings trained.

    python tests/benchmarks/places.py RUN --place behind --blocks 1 --embeddings --seed 0 > arm.json
    python tests/benchmarks/places.py --table arm.json ...

RUN has sampled and scored an iteration. Of its posts 63 are trained on, once, a post a step: of the
answers that came to an end the four best with `Excellent.`, the four worst with `Horrible.` (504
sequences where all posts have eight). 72 others are the fixed set, the same for every arm: how many
pairs of a finished answer of the best and one of the worst fifth stand in the right order by how
much more probable the first word makes them. A plain loop, in bfloat16 with float32 masters, on one
thread.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alt_hpc.domains.tldr import Settings as Tldr
from alt_hpc.graph import Piece
from alt_hpc.lm import load, reading
from alt_hpc.lm.blocks import train_top
from alt_hpc.lm.tokens import common
from alt_hpc.run.files import read_lines
from alt_hpc.run.layout import Layout
from alt_hpc.run.manifests import Manifest
from alt_hpc.training import losses
from alt_hpc.training.examples import Siblings

WORDS = ("Excellent.", "Horrible.")
PLACES = {
    "front": "{feedback} input: {prompt}",
    "bos": "{bos}{feedback} input: {prompt}",
    "behind": "{body}\n{feedback} {last_line}",
}
KEPT, TRAINED, FIXED, ROOM = 4, 63, slice(80, 152), 4096


def rows_of(run: Path, stage: str) -> list[dict[str, Any]]:
    """Rows of all shards of iteration 1, of a run of any version."""
    layout, found = Layout(run), []
    for place in sorted(layout.manifest(Piece(1, stage)).parent.parent.glob("*")):
        piece = Piece(1, stage, int(place.name))
        manifest = Manifest.read(layout.manifest(piece))
        assert manifest is not None, f"{place}: not whole"
        found += read_lines(place / manifest.folder / layout.rows(piece))
    return found


def ranked(sample: dict[str, Any], score: dict[str, Any]) -> list[list[int]]:
    """Token ids of a post's finished answers, the best first."""
    both = zip(sample["generations"], score["rewards"], strict=True)
    ended = [(r, g["ids"]) for g, r in both if g["ended"] == "eos" and r is not None]
    return [ids for _, ids in sorted(ended, key=lambda one: -one[0])]


def examples(prompts: list[list[int]], answers: list[list[int]], behind: bool) -> list[Siblings]:
    """The rows of a post: best answers behind the first prompt, worst behind the second."""
    half = min(KEPT, len(answers) // 2)
    best, worst = answers[:half], answers[-half:]
    if not behind:
        return [Siblings(p, some) for p, some in zip(prompts, (best, worst), strict=True)]
    shared = common(prompts)
    tails = [p[shared:] for p, some in zip(prompts, (best, worst), strict=True) for _ in some]
    return [Siblings(prompts[0][:shared], [*best, *worst], tails=tails)]


def train(model: Any, posts: list[list[Siblings]], rate: float) -> None:
    """AdamW over float32 masters of what is trained; linear warm-up over 5 %, then decay to 0."""
    masters = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    model.to(torch.bfloat16).train()
    low = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for master in masters.values():
        master.requires_grad_(True)
    adam = {"betas": (0.8, 0.999), "eps": 1e-8, "weight_decay": 3e-7, "fused": True}
    optimiser = torch.optim.AdamW([*masters.values()], lr=rate, **adam)
    warm = max(1, math.ceil(0.05 * len(posts)))
    for step, rows in enumerate(posts, start=1):
        count = sum(row.weight for row in rows)
        for row in rows:
            loss, _ = losses.alt_loss(model, Siblings.batch([row], row.weight), entropy=0.06)
            (loss / count).backward()
        for name, p in low.items():
            assert p.grad is not None
            masters[name].grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_([*masters.values()], 1.0)
        decay = (len(posts) - step + 1) / (len(posts) - warm + 1)
        optimiser.param_groups[0]["lr"] = rate * (step / warm if step <= warm else decay)
        optimiser.step()
        with torch.no_grad():
            for name, p in low.items():
                p.copy_(masters[name])
        print(step, "of", len(posts), file=sys.stderr, flush=True)


def heard(model: Any, prompts: list[list[int]], answers: list[list[int]]) -> tuple[float, float]:
    """A post's share of pairs in order, and half of what parts them, in nats."""
    fifth = [rank * 5 // len(answers) for rank in range(len(answers))]
    best = [ids for ids, q in zip(answers, fifth, strict=True) if q == 0]
    worst = [ids for ids, q in zip(answers, fifth, strict=True) if q == 4]
    ((one, other),) = reading.answers_logprobs(model, [(prompts, best + worst)])
    by = np.array(one) - np.array(other)
    mine, theirs = by[: len(best)], by[len(best) :]
    return float((mine[:, None] > theirs).mean()), float(mine.mean() - theirs.mean()) / 2


def arm(options: argparse.Namespace) -> dict[str, Any]:
    """Train and ask one arm."""
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    place, domain = Layout(options.run).policy(0), Tldr(template=PLACES[options.place])
    tokenizer, behind = load.tokenizer(place), options.place == "behind"
    posts = []
    for sample, score in zip(*(rows_of(options.run, s) for s in ("sample", "score")), strict=True):
        arounds = [domain.around(word) for word in WORDS]
        prompts = [domain.fit(tokenizer, sample["prompt"], ROOM, it)[0] for it in arounds]
        posts.append((prompts, ranked(sample, score)))
    order = np.random.default_rng(0).permutation(len(posts))  # the same posts for every seed
    taught = [posts[i] for i in order[: options.posts] if len(posts[i][1]) > 1]
    turns = np.random.default_rng(options.seed).permutation(len(taught))
    rows = [examples(*taught[i], behind) for i in turns]
    model = load.policy(place, "float32", torch.device("cpu"))
    train_top(model, options.blocks, options.embeddings)
    train(model, rows, options.rate)
    model.eval().requires_grad_(False)
    fixed = [posts[i] for i in order[FIXED] if len(posts[i][1]) > 4][: options.fixed]
    found = np.array([heard(model, *post) for post in fixed])
    error = 1.96 * found.std(0, ddof=1) / math.sqrt(len(found))
    about = {
        key: getattr(options, key) for key in ("place", "blocks", "embeddings", "seed", "rate")
    }
    sizes = {"sequences": sum(len(row.answers) for its in rows for row in its), "posts": len(found)}
    names = ("share", "nats")
    return (
        about | sizes | {n: [*pair] for n, *pair in zip(names, found.mean(0), error, strict=True)}
    )


def table(arms: list[dict[str, Any]]) -> str:
    """A line for each place, blocks and embeddings: every seed's share, their means."""
    lines = [
        "| place | blocks | embeddings | words in order, by seed | mean | nats |",
        "|---" * 6 + "|",
    ]
    groups: dict[Any, list[dict[str, Any]]] = {}
    for one in sorted(arms, key=lambda one: one["seed"]):
        groups.setdefault((one["place"], one["blocks"], one["embeddings"]), []).append(one)
    for (place, blocks, embeddings), its in sorted(groups.items()):
        shares = ", ".join(f"{one['share'][0]:.2f} ±{one['share'][1]:.2f}" for one in its)
        share, nats = (statistics.mean(one[name][0] for one in its) for name in ("share", "nats"))
        which = "trained" if embeddings else "frozen"
        lines.append(f"| {place} | {blocks:g} | {which} | {shares} | {share:.2f} | {nats:+.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--table", type=Path, nargs="+")
    parser.add_argument("--place", choices=PLACES, default="behind")
    parser.add_argument("--blocks", type=float, default=1.0)
    parser.add_argument("--embeddings", action="store_true")
    parser.add_argument("--rate", type=float, default=4e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--posts", type=int, default=TRAINED)
    parser.add_argument("--fixed", type=int, default=None)
    options = parser.parse_args()
    if options.table:
        print(table([json.loads(file.read_text()) for file in options.table]))
    else:
        print(json.dumps(arm(options)), flush=True)


if __name__ == "__main__":
    main()
