"""Benchmarks: python tests/benchmarks/run.py {scoring,sampling,training,startup} [--threads N]

Each runs both ways of working on the same model, data, dtype, threads and machine, in one process,
and prints a table with their ratio. The other sides are written here from the method's description.
Results that were measured are kept in results.md beside this file, with machine and versions.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional

from alt_hpc import losses, models, reward, trainer
from alt_hpc.config import RewardModel
from alt_hpc.generate import generate

ROOT = Path(__file__).resolve().parents[2]
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
CPU = torch.device("cpu")


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result of a call."""
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


def table(title: str, rows: list[tuple[str, float, float]], unit: str) -> str:
    """(way, seconds, units done) as Markdown; ratios are to the last row's rate, which is ours."""
    ours = rows[-1][2] / rows[-1][1]
    lines = [f"### {title}", "", f"| way | s | {unit}/s | ours is |", "|---|---|---|---|"]
    for way, seconds, count in rows:
        rate = count / seconds
        lines.append(f"| {way} | {seconds:.1f} | {rate:.1f} | {ours / rate:.1f}× |")
    return "\n".join(lines)


def posts(tokenizer: Any, tokens: int, count: int) -> list[str]:
    """Prompts of about so many tokens: the quickstart's posts, joined."""
    files = (ROOT / "configs/quickstart/train.jsonl").read_text().splitlines()
    texts = itertools.cycle(json.loads(line)["prompt"].removesuffix("\nTL;DR:") for line in files)
    found = []
    for _ in range(count):
        text = ""
        while len(tokenizer(text)["input_ids"]) < tokens - 4:
            text += next(texts) + "\n"
        ids = tokenizer(text)["input_ids"][: tokens - 4]
        found.append(tokenizer.decode(ids) + "\nTL;DR:")
    return found


def load() -> tuple[Path, Any, Any]:
    """SmolLM2 in bfloat16 with its tokenizer."""
    place = models.fetch(NAME)
    return place, models.load_tokenizer(place), models.load_policy(place, "bfloat16", CPU)


def sampling(prompt_tokens: int = 400, n: int = 32, new: int = 48) -> str:
    """n generations of one prompt: `generate(num_return_sequences=n)` against ours."""
    _, tokenizer, model = load()
    prompts = [tokenizer(text)["input_ids"] for text in posts(tokenizer, prompt_tokens, 2)]
    never = [tokenizer.vocab_size + 10**6]  # both sides write all tokens
    settings = {"temperature": 0.9, "top_p": 0.9, "max_new_tokens": new}

    def naive() -> None:
        for ids in prompts:
            model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                do_sample=True,
                top_k=0,
                num_return_sequences=n,
                eos_token_id=None,
                pad_token_id=0,
                **settings,
            )

    count = len(prompts) * n * new
    generate(model, [prompts[0][:50]], 4, [1], eos=never, **{**settings, "max_new_tokens": 4})
    ours, _ = timed(lambda: generate(model, prompts, n, [1, 2], eos=never, **settings))
    theirs, _ = timed(naive)
    title = f"Sampling: {len(prompts)} prompts of {prompt_tokens} tokens × {n} × {new} new tokens"
    return table(title, [("naive generate", theirs, count), ("alt_hpc", ours, count)], "new tokens")


def scoring(prompt_tokens: int = 400, n: int = 96, new: int = 48) -> str:
    """Reward of n generations of a prompt: padded to 550, at exact lengths, and ours."""
    place, tokenizer, _ = load()
    settings = RewardModel(max_length=550, dtype="bfloat16")
    trunk = reward.load_trunk(place, settings, CPU, max_new_tokens=64)
    (prompt,) = posts(tokenizer, prompt_tokens, 1)
    words = (ROOT / "configs/quickstart/README.md").read_text().split()
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(12, new, (n,), generator=rng).tolist()
    summaries = [" ".join((words * 3)[i : i + k]) for i, k in enumerate(lengths)]
    summaries = [tokenizer.decode(tokenizer(s)["input_ids"][:new]) for s in summaries]
    texts, _ = trunk.text.ids(prompt, summaries)

    def padded(width: int | None, batch: int) -> torch.Tensor:
        out = []
        order = sorted(range(n), key=lambda i: len(texts[i]))
        with torch.no_grad():
            for start in range(0, n, batch):
                rows = [texts[i] for i in order[start : start + batch]]
                wide = width or max(map(len, rows))
                ids = torch.tensor([row + [0] * (wide - len(row)) for row in rows])
                mask = torch.tensor([[1] * len(r) + [0] * (wide - len(r)) for r in rows])
                states = trunk.model(input_ids=ids, attention_mask=mask)[0]
                out += [states[i, len(row) - 1].float() for i, row in enumerate(rows)]
        return torch.stack(out)[[order.index(i) for i in range(n)]]

    trunk.hidden(prompt, summaries[:2])
    ours, ((mine, _)) = timed(lambda: trunk.hidden(prompt, summaries))
    best = {}
    for way, width in (("padded to 550", 550), ("exact lengths", None)):
        best[way] = min((timed(functools.partial(padded, width, b)) for b in (8, 16)), key=_first)
    count = sum(map(len, texts))
    far = max(float((mine - states).abs().max()) for _, states in best.values())
    rows = [(way, seconds, count) for way, (seconds, _) in best.items()] + [
        ("alt_hpc", ours, count)
    ]
    title = f"Scoring: a prompt of {prompt_tokens} tokens × {n} generations (bfloat16)"
    return table(title, rows, "tokens") + f"\n\nlargest difference of a hidden state: {far:.2g}"


def _first(pair: tuple[float, Any]) -> float:
    return pair[0]


def training(prompt_tokens: int = 160, new: int = 32, steps: int = 4) -> str:
    """Steps of 8 sequences, the same blocks frozen: left-padded with full logits, and ours."""
    place, tokenizer, _ = load()
    prompts = [tokenizer(t)["input_ids"] for t in posts(tokenizer, prompt_tokens, 8 * steps)]
    examples = [
        losses.Example([*ids, *ids[: new - i % 16]], len(ids)) for i, ids in enumerate(prompts)
    ]
    batches = [examples[i : i + 8] for i in range(0, len(examples), 8)]

    def fresh() -> Any:
        model = models.load_policy(place, "bfloat16", CPU).train()
        model.requires_grad_(True)
        trainer.freeze(model, 0.3, False)
        return model

    def official(model: Any) -> list[float]:
        found = []
        for batch in batches:
            wide = max(len(e.ids) for e in batch)
            ids = torch.tensor([[0] * (wide - len(e.ids)) + e.ids for e in batch])
            mask = torch.tensor([[0] * (wide - len(e.ids)) + [1] * len(e.ids) for e in batch])
            learned = torch.tensor([[0] * (wide - e.weight) + [1] * e.weight for e in batch])[:, 1:]
            # The input's gradient is asked for, so that the backward pass runs through all blocks.
            states = model.get_input_embeddings()(ids).requires_grad_(True)
            logits = model(inputs_embeds=states, attention_mask=mask).logits[:, :-1].float()
            log_p = functional.log_softmax(logits, -1)
            ce = -log_p.gather(-1, ids[:, 1:, None])[..., 0]
            entropy = -(log_p.exp() * log_p).sum(-1)
            loss = ((ce - 0.06 * entropy) * learned).sum()
            loss.backward()
            found.append(float((ce * learned).sum() / learned.sum()))
        return found

    def ours(model: Any) -> list[float]:
        found = []
        for batch in batches:
            texts = losses.Example.batch(batch, max(e.weight for e in batch))
            loss, parts = losses.alt_loss(model, texts, entropy=0.06)
            loss.backward()
            found.append(float(parts["ce"]) / sum(e.weight for e in batch))
        return found

    official(fresh())
    theirs, a = timed(functools.partial(official, fresh()))
    mine, b = timed(functools.partial(ours, fresh()))
    count = sum(len(e.ids) for e in examples)
    far = max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))
    rows = [("left-padded, full logits, whole backward", theirs, count), ("alt_hpc", mine, count)]
    title = f"Training without KL: {steps} steps of 8 × about {prompt_tokens + new} tokens"
    return table(title, rows, "tokens") + f"\n\nlargest relative difference of the loss: {far:.2g}"


def startup() -> str:
    """Seconds until a process has imported what it needs, the best of three."""
    lines = ["### Start-up", "", "| process | s |", "|---|---|"]
    for what, code in (
        (
            "`alt-hpc --help`",
            "import sys; sys.argv = ['alt-hpc', '--help']; import alt_hpc.__main__ as m; m.main()",
        ),
        ("a controller's imports", "import alt_hpc.controller"),
        ("torch", "import torch"),
        ("a sampling task's imports", "import alt_hpc.stages.sample"),
        ("a training task's imports", "import alt_hpc.stages.train, deepspeed"),
    ):
        best = min(timed(lambda c=code: _python(c))[0] for _ in range(3))
        lines.append(f"| {what} | {best:.2f} |")
    return "\n".join(lines)


def _python(code: str) -> None:
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)


def main() -> None:
    known = {f.__name__: f for f in (scoring, sampling, training, startup)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="*", choices=[*known, []], default=list(known))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores ({platform.machine()}), "
        f"{options.threads} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}\n"
    )
    for name in options.name:
        print(known[name](), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
