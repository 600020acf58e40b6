"""Benchmarks: python tests/benchmarks/run.py NAME ... [--threads N]

sampling, vllm, scoring, training, training_kl, sharing, iteration, startup, makespan, submission,
scale.
Each runs both ways of working on the same model, data, dtype, threads and machine, one after the
other, and prints a table with their ratio. The other sides are written here from the method's
description; ours, which comes last, sets what our tasks set at their start.
What was measured is kept in results.md beside this file, with machine and versions.
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
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cluster
import numpy as np
import torch
import transformers
from torch.nn import functional

from alt_hpc import config as configs
from alt_hpc.data import texts
from alt_hpc.domains import tldr
from alt_hpc.lm import cpu, tokens
from alt_hpc.lm import load as loading
from alt_hpc.lm.blocks import train_top
from alt_hpc.lm.decode import generate
from alt_hpc.lm.tokens import common
from alt_hpc.methods import quantiles
from alt_hpc.rewards import heads
from alt_hpc.rewards.heads import Trunk
from alt_hpc.rewards.model import Settings as Reward
from alt_hpc.run import rows as run_rows
from alt_hpc.run.folder import RunFolder
from alt_hpc.training import losses
from alt_hpc.training.examples import Example, Siblings
from alt_hpc.training.reference import share_trunk

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from embedded import smollm2

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def timed(call: Callable[[], Any], ours: bool = True) -> tuple[float, Any]:
    """Seconds and result of a call; the other sides have attention as transformers has it."""
    transformers.AttentionInterface.register("sdpa", cpu._attend if ours else cpu._sdpa)
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
    place = smollm2()
    return place, loading.tokenizer(place), loading.policy(place, "bfloat16", CPU)


def _trunk(place: Path) -> Trunk:
    """The trunk of a reward model made of SmolLM2, in bfloat16."""
    words = heads.Text(place, Reward(), tldr.Settings(), 64)
    return Trunk(loading.whole(transformers.AutoModel, place, "bfloat16", CPU), words)


def sampling(prompt_tokens: int = 400, n: int = 32, new: int = 48) -> str:
    """n generations of one prompt: `generate(num_return_sequences=n)` against ours."""
    _, tokenizer, model = load()
    prompts = [tokenizer(text)["input_ids"] for text in posts(tokenizer, prompt_tokens, 2)]
    never = [tokenizer.vocab_size + 10**6]  # both sides write all tokens
    settings = {"temperature": 0.9, "top_p": 0.9, "max_new_tokens": new}

    count = len(prompts) * n * new
    theirs, _ = timed(lambda: [_naive(model, ids, n, settings) for ids in prompts], False)
    generate(model, [prompts[0][:50]], 4, [1], eos=never, **{**settings, "max_new_tokens": 4})
    ours, _ = timed(lambda: generate(model, prompts, n, [1, 2], eos=never, **settings))
    title = f"Sampling: {len(prompts)} prompts of {prompt_tokens} tokens × {n} × {new} new tokens"
    return table(title, [("naive generate", theirs, count), ("alt_hpc", ours, count)], "new tokens")


def vllm(count: int = 12, n: int = 16, new: int = 48, group: int = 6, rounds: int = 2) -> str:
    """vLLM's own `generate` over all prompts at once against our vLLM engine and our own engine.

    ALT_HPC_VLLM_VENV names an environment with vLLM; tests/test_vllm.py makes one in .venv-vllm.
    """
    python = Path(os.environ.get("ALT_HPC_VLLM_VENV", ROOT / ".venv-vllm")) / "bin/python"
    place = smollm2()
    tokenizer = loading.tokenizer(place)
    prompts = [tokenizer(text)["input_ids"] for text in posts(tokenizer, 180, count * rounds)]
    settings = {
        "model": str(place),
        "rounds": [prompts[i : i + count] for i in range(0, len(prompts), count)],
        "n": n,
        "new": new,
        "group": group,
        "longest": 256,
        "never": tokenizer.vocab_size - 1,
    }
    found = {}
    for side in ("bare", "ours"):
        command = [str(python), str(Path(__file__).with_name("through_vllm.py")), side]
        environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        said = subprocess.run(
            command,
            input=json.dumps(settings),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=environment,
        ).stdout
        found[side] = json.loads(said.strip().splitlines()[-1])
    tokens = count * n * new
    rows = [("bare vLLM", min(found["bare"]["took"]), tokens)]
    rows += [("alt_hpc with vLLM", min(found["ours"]["took"]), tokens)]
    rows += [("alt_hpc", _without_vllm(settings), tokens)]
    title = f"vLLM: {count} prompts of 180 tokens × {n} × {new} new tokens, the best of {rounds}"
    starts = " and ".join(f"{found[side]['start']:.0f} s" for side in ("bare", "ours"))
    return table(title, rows, "new tokens") + f"\n\nstart, once per task: {starts}"


def _without_vllm(settings: dict[str, Any]) -> float:
    """The same work by our own engine, the best round's seconds."""
    model = load()[2]
    options = {"temperature": 0.9, "top_p": 0.9, "max_new_tokens": settings["new"]}

    def sample(prompts: list[list[int]]) -> None:
        for i in range(0, len(prompts), settings["group"]):
            group = prompts[i : i + settings["group"]]
            seeds = list(range(i, i + len(group)))
            generate(model, group, settings["n"], seeds, eos=[settings["never"]], **options)

    return min(timed(functools.partial(sample, prompts))[0] for prompts in settings["rounds"])


def scoring(prompt_tokens: int = 400, n: int = 96, new: int = 48) -> str:
    """Reward of n generations of a prompt: padded to 550, at exact lengths, and ours."""
    place, tokenizer, policy = load()
    trunk = _trunk(place)
    plain = Trunk(policy.base_model, trunk.text)
    (prompt,) = posts(tokenizer, prompt_tokens, 1)
    words = (ROOT / "configs/quickstart/README.md").read_text().split()
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(12, new, (n,), generator=rng).tolist()
    summaries = [" ".join((words * 3)[i : i + k]) for i, k in enumerate(lengths)]
    summaries = [tokenizer.decode(tokenizer(s)["input_ids"][:new]) for s in summaries]
    texts, _ = trunk.text.ids(prompt, summaries)

    best = {}
    for way, width in (("padded to 550", 550), ("exact lengths", None)):
        sides = (functools.partial(_padded, plain, prompt, summaries, width, b) for b in (8, 16))
        best[way] = min((timed(side, ours=False) for side in sides), key=_first)
    list(trunk.hidden([(prompt, summaries[:2])]))
    ours, (mine, _) = min(
        (timed(lambda: list(trunk.hidden([(prompt, summaries)]))) for _ in range(4)), key=_first
    )
    count = sum(map(len, texts))
    far = max(float((mine - states).abs().max()) for _, states in best.values())
    rows = [(way, seconds, count) for way, (seconds, _) in best.items()] + [
        ("alt_hpc", ours, count)
    ]
    title = f"Scoring: a prompt of {prompt_tokens} tokens × {n} generations (bfloat16)"
    shared = next(i for i in range(len(min(texts))) if min(texts)[i] != max(texts)[i])
    rests = [len(ids) - shared for ids in texts]
    distinct = shared + sum(rests)
    seen = shared * (shared + 1) // 2 + sum(r * shared + r * (r + 1) // 2 for r in rests)
    matrices = distinct * _seconds_a_token(plain.model)
    floor = matrices * (1 + _attention_share(plain.model, seen / distinct))
    return table(title, rows, "tokens") + (
        f"\n\nfloor {floor:.2f} s ({distinct} distinct tokens: {matrices:.2f} s in the model's own"
        f" matrices, and attention's operations at their rate): alt_hpc, {ours:.2f} s, reaches"
        f" {floor / ours:.0%} of it; largest difference of a hidden state {far:.2g}"
    )


def _seconds_a_token(model: Any, rows: int = 512) -> float:
    """What a token's matrix products take at their best, measured shape by shape."""
    total = 0.0
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                states = torch.randn(rows, module.in_features).to(module.weight.dtype)
                module(states)
                total += min(timed(functools.partial(module, states))[0] for _ in range(3))
    return total / rows


def _attention_share(model: Any, seen: float) -> float:
    """Attention's operations over the matrices', for tokens that see so many on average."""
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    weights = sum(m.in_features * m.out_features for m in linear)
    return 2 * model.config.num_hidden_layers * model.config.hidden_size * seen / weights


def _padded(
    trunk: Trunk, prompt: str, summaries: list[str], width: int | None, batch: int
) -> torch.Tensor:
    """Last hidden states [n, hidden] of whole texts, padded to a width or to the batch's."""
    texts, _ = trunk.text.ids(prompt, summaries)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    out = torch.empty(len(texts), trunk.model.config.hidden_size)
    with torch.no_grad():
        for start in range(0, len(texts), batch):
            chosen = order[start : start + batch]
            wide = width or max(len(texts[i]) for i in chosen)
            ids = torch.tensor([texts[i] + [0] * (wide - len(texts[i])) for i in chosen])
            mask = torch.tensor(
                [[1] * len(texts[i]) + [0] * (wide - len(texts[i])) for i in chosen]
            )
            states = trunk.model(input_ids=ids, attention_mask=mask)[0]
            for row, i in enumerate(chosen):
                out[i] = states[row, len(texts[i]) - 1].float()
    return out


def _first(pair: tuple[float, Any]) -> float:
    return pair[0]


# ---------------------------------------------------------------------- training

STEPS, BATCH, RATE = 20, 8, 1e-4


def training() -> str:
    """Optimiser steps without KL."""
    return _training(kl=0.0)


def training_kl() -> str:
    """The same with KL to the starting policy."""
    return _training(kl=0.05)


def _training(kl: float) -> str:
    """20 steps of 8 quickstart posts in float32, the same blocks frozen on both sides.

    Each side has a process of its own, so that its peak memory can be told.
    """
    found = {}
    for way in ("official", "ours"):
        threads = ["--threads", str(torch.get_num_threads())]
        command = [sys.executable, __file__, f"_{way}", "--kl", str(kl), *threads]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[way] = json.loads(said.strip().splitlines()[-1])
    theirs, ours = found["official"], found["ours"]
    far = max(abs(a - b) / abs(a) for a, b in zip(theirs["losses"], ours["losses"], strict=True))
    rows = [
        ("left-padded, full logits, whole backward" + ", own reference" * bool(kl), theirs),
        ("alt_hpc", ours),
    ]
    title = f"Training {'with' if kl else 'without'} KL: {STEPS} steps of {BATCH} posts (float32)"
    text = table(title, [(way, f["seconds"], f["tokens"]) for way, f in rows], "tokens")
    peaks = f"peak memory {theirs['MiB']:.0f} and {ours['MiB']:.0f} MiB"
    above = [f["MiB"] - f["before"] for f in (theirs, ours)]
    return (
        f"{text}\n\n{peaks} (above the loaded models: {above[0]:.0f} and {above[1]:.0f}, ratio"
        f" {above[0] / above[1]:.1f}); largest relative difference of a step's loss: {far:.1g}"
    )


def _steps(tokenizer: Any) -> list[list[Example]]:
    """Batches of posts, each followed by its good summary."""
    lines = (ROOT / "configs/quickstart/train.jsonl").read_text().splitlines()
    made = []
    for row in map(json.loads, itertools.islice(itertools.cycle(lines), STEPS * BATCH)):
        prompt = tokenizer("Excellent. input: " + row["prompt"])["input_ids"]
        answer = tokenizer(" " + row["chosen"])["input_ids"] + [tokenizer.eos_token_id]
        made.append(Example([*prompt, *answer], len(prompt)))
    return [made[i : i + BATCH] for i in range(0, len(made), BATCH)]


def _side(step: Callable[..., torch.Tensor], kl: float) -> str:
    """Train with one way of computing a step's loss; JSON of what it took."""
    place, tokenizer, _ = load()
    model = loading.policy(place, "float32", CPU).train()
    train_top(model, 0.3, False)
    reference = loading.policy(place, "float32", CPU) if kl else None
    if reference is not None and step is _our_step:
        share_trunk(model, reference)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, fused=True)
    batches = _steps(tokenizer)
    before, found = cluster.peak(), []
    began = time.perf_counter()
    for batch in batches:
        loss = step(model, batch, reference, kl)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        model.zero_grad()
        found.append(float(loss))
    seconds = time.perf_counter() - began
    count = sum(len(e.ids) for batch in batches for e in batch)
    facts = {"seconds": seconds, "tokens": count, "losses": found, "before": before}
    return json.dumps(facts | {"MiB": cluster.peak()})


def _official_step(model: Any, batch: list[Example], reference: Any, kl: float) -> Any:
    """Left-padded, logits of every position, a backward pass through all blocks."""
    wide = max(len(e.ids) for e in batch)
    ids = torch.tensor([[0] * (wide - len(e.ids)) + e.ids for e in batch])
    mask = torch.tensor([[0] * (wide - len(e.ids)) + [1] * len(e.ids) for e in batch])
    learned = torch.tensor([[0] * (wide - e.weight) + [1] * e.weight for e in batch])[:, 1:]
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    # The input's gradient is asked for, so that the backward pass runs through all blocks.
    states = model.get_input_embeddings()(ids).requires_grad_(True)
    said = model(inputs_embeds=states, attention_mask=mask, position_ids=places, use_cache=False)
    log_p = functional.log_softmax(said.logits[:, :-1].float(), -1)
    ce = -log_p.gather(-1, ids[:, 1:, None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    loss = ce - 0.06 * entropy
    if reference is not None:
        with torch.no_grad():
            said = reference(ids, attention_mask=mask, position_ids=places, use_cache=False)
            log_q = functional.log_softmax(said.logits[:, :-1].float(), -1)
        loss = loss + kl * (log_q.exp() * (log_q - log_p)).sum(-1)
    mean = (loss * learned).sum() / learned.sum()
    mean.backward()
    return mean.detach()


def _our_step(model: Any, batch: list[Example], reference: Any, kl: float) -> Any:
    """What the trainer does with two micro-batches."""
    rows = sorted(batch, key=lambda e: e.tokens)
    count, total = sum(e.weight for e in rows), torch.zeros(())
    for half in (rows[: BATCH // 2], rows[BATCH // 2 :]):
        texts = Example.batch(half, sum(e.weight for e in half))
        loss, _ = losses.alt_loss(model, texts, entropy=0.06, kl=kl, reference=reference)
        (loss / count).backward()
        total += loss.detach() / count
    return total


def sharing(tokens: int = 400, count: int = 10, new: int = 50, prompts: int = 4) -> str:
    """An epoch over the answers of some prompts: alone, by quantile, and behind one prompt."""
    _, tokenizer, model = load()
    model.requires_grad_(True).train()
    answers = [list(range(100 + n, 100 + n + new)) for n in range(count)]
    words = [f"{w}." for w in ("Excellent", "Good", "Mediocre", "Bad", "Horrible") for _ in (1, 2)]
    ways: dict[str, list[Siblings]] = {"in front, alone": [], "in front, a quantile's": []}
    behind = []
    for text in posts(tokenizer, tokens, prompts):
        fronts = [tokenizer(f"{word} input: {text}")["input_ids"] for word in words]
        families = [Siblings(fronts[i], answers[i : i + 2]) for i in range(0, count, 2)]
        ways["in front, a quantile's"] += families
        ways["in front, alone"] += [one for family in families for one in family.alone()]
        whole = [tokenizer(f"{text} {word}")["input_ids"] for word in words]
        shared = common(whole)
        tails = [ids[shared:] for ids in whole]
        behind.append(Siblings(whole[0][:shared], answers, tails=tails))
    ways["behind, all of a prompt"] = behind
    rows = []
    for way, examples in ways.items():
        size = max(1, len(examples) // prompts // (1 if way.startswith("behind") else 2))
        parts = [examples[i : i + size] for i in range(0, len(examples), size)]
        seconds, _ = timed(functools.partial(_epoch, model, parts))
        rows.append((f"{way} ({sum(e.tokens for e in examples)} tokens)", seconds, count * prompts))
    title = f"Training: {prompts} prompts of {tokens} tokens × {count} answers of {new} (bfloat16)"
    return table(title, rows, "answers")


def _epoch(model: Any, parts: list[list[Siblings]]) -> None:
    for part in parts:
        batch = Siblings.batch(part, sum(e.weight for e in part))
        losses.alt_loss(model, batch)[0].backward()
        model.zero_grad()


# ---------------------------------------------------------------------- a whole iteration


def iteration(prompts: int = 2, n: int = 32, new: int = 48) -> str:
    """Sampling, scoring and training of some prompts, stage after stage, in bfloat16."""
    place, tokenizer, model = load()
    texts = posts(tokenizer, 400, prompts)
    trunk = _trunk(place)
    plain = Trunk(loading.policy(place, "bfloat16", CPU).base_model, trunk.text)
    took: dict[str, list[float]] = {}
    for way in ("official", "alt_hpc"):
        ours = way == "alt_hpc"
        seconds, made = timed(lambda: _sampled(model, tokenizer, texts, n, new, ours))  # noqa: B023
        took[way] = [seconds]
        answers = [[tokenizer.decode(ids) for ids in group] for group in made]
        took[way].append(
            timed(
                lambda: [
                    list(trunk.hidden([(t, a)])) if ours else _padded(plain, t, a, 550, 8)  # noqa: B023
                    for t, a in zip(texts, answers, strict=True)  # noqa: B023
                ]
            )[0]
        )
        kept = [
            Example([*ids, *one], len(ids))
            for text, group in zip(texts, made, strict=True)
            for ids in [tokenizer("Excellent. input: " + text)["input_ids"]]
            for one in group[:10]
        ]
        policy = loading.policy(place, "bfloat16", CPU).train()
        train_top(policy, 0.3, False)
        step = _our_step if ours else _official_step
        batches = [kept[i : i + BATCH] for i in range(0, len(kept) // BATCH * BATCH, BATCH)]
        took[way].append(timed(lambda: [step(policy, b, None, 0.0) for b in batches])[0])  # noqa: B023
    lines = [
        f"### A whole iteration: {prompts} prompts of 400 tokens × {n} generations × {new} tokens,"
        f" {len(batches)} steps of {BATCH} (bfloat16)",
        "",
        "| stage | official way, s | alt_hpc, s | ratio |",
        "|---|---|---|---|",
    ]
    for stage, a, b in zip(("sample", "score", "train"), *took.values(), strict=True):
        lines.append(f"| {stage} | {a:.1f} | {b:.1f} | {a / b:.1f}× |")
    a, b = (sum(seconds) for seconds in took.values())
    return "\n".join([*lines, f"| all | {a:.1f} | {b:.1f} | {a / b:.1f}× |"])


def _sampled(
    model: Any, tokenizer: Any, texts: list[str], n: int, new: int, ours: bool
) -> list[list[list[int]]]:
    """n generations of each prompt, all `new` tokens long."""
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    settings = {"temperature": 0.9, "top_p": 0.9, "max_new_tokens": new}
    if ours:
        never = [tokenizer.vocab_size + 10**6]
        made = generate(model, prompts, n, list(range(len(prompts))), eos=never, **settings)
        return [[one.ids for one in group] for group in made]
    return [_naive(model, ids, n, settings) for ids in prompts]


def _naive(model: Any, ids: list[int], n: int, settings: dict[str, Any]) -> list[list[int]]:
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=True,
        top_k=0,
        num_return_sequences=n,
        eos_token_id=None,
        pad_token_id=0,
        **settings,
    )
    found: list[list[int]] = out[:, len(ids) :].tolist()
    return found


# ---------------------------------------------------------------------- pipeline and scale


def makespan() -> str:
    """With tasks as long as sampling and scoring 12 shards of the quickstart's posts took."""
    place, tokenizer, model = load()
    trunk = _trunk(place)
    lines = (ROOT / "configs/quickstart/train.jsonl").read_text().splitlines()[:24]
    texts = [json.loads(line)["prompt"] for line in lines]
    ends = tokens.all_ends(place, tokenizer)
    took: list[tuple[float, float]] = []
    for i in range(0, len(texts), 2):
        mine = texts[i : i + 2]
        prompts = [tokenizer(text)["input_ids"] for text in mine]
        options = {"temperature": 0.9, "top_p": 0.9, "max_new_tokens": 48, "eos": ends}
        sampled, made = timed(lambda: generate(model, prompts, 8, [i, i + 1], **options))  # noqa: B023
        answers = [[tokenizer.decode(one.ids) for one in group] for group in made]
        both = list(zip(mine, answers, strict=True))
        scored, _ = timed(lambda: list(trunk.hidden(both)))  # noqa: B023
        took.append((2 * sampled, 2 * scored))
    return cluster.makespan(*zip(*took, strict=True))


def scale() -> str:
    """Freezing, drawing, quantiles and selection as streams."""
    lines = [
        "### Scale: freezing prompts; draw, quantiles and selection of 96 generations a prompt",
        "",
        "| prompts | step | s | s per million | peak memory above the start, MiB |",
        "|---|---|---|---|---|",
    ]
    for count, step in itertools.product((100_000, 1_000_000), ("freeze", "select")):
        command = [sys.executable, __file__, f"_{step}", "--count", str(count)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        seconds, memory = json.loads(said.strip().splitlines()[-1])
        million = seconds * 1e6 / count
        lines.append(f"| {count:,} | {step} | {seconds:.1f} | {million:.1f} | {memory:.1f} |")
    return "\n".join(lines)


def _freeze(count: int) -> str:
    with tempfile.TemporaryDirectory() as place:
        with open(f"{place}/train.jsonl", "w") as file:
            for row in range(count):
                file.write(json.dumps({"prompt": f"{row} " + 300 * "x"}) + "\n")
        config = configs.load(ROOT / "configs/quickstart.yaml", [f"run={place}/run"])
        folder = RunFolder.create(config)
        before, began = cluster.peak(), time.perf_counter()
        found = texts.read(configs.Source(path=place), "train", ("prompt",), "data.prompts")
        assert run_rows.freeze(folder, "prompts-train", found) == count
        return json.dumps([time.perf_counter() - began, cluster.peak() - before])


def _select(count: int) -> str:
    rng = np.random.default_rng(0)
    before, began = cluster.peak(), time.perf_counter()
    for row in rng.choice(count, size=count):
        rewards = rng.standard_normal(96).tolist()
        cut = quantiles.quantiles(rewards, 5, "spread")
        own = np.random.default_rng([1, 1, int(row)])
        assert len(quantiles.select(cut, [True] * 96, 2, own)) == 10
    return json.dumps([time.perf_counter() - began, cluster.peak() - before])


def startup() -> str:
    """Seconds until a process has imported what it needs, the best of three."""
    lines = ["### Start-up", "", "| process | s |", "|---|---|"]
    for what, code in (
        (
            "`alt-hpc --help`",
            "import sys; sys.argv = ['alt-hpc', '--help']; import alt_hpc.__main__ as m; m.main()",
        ),
        ("a controller's imports", "import alt_hpc.control.chain"),
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
    shown = (sampling, vllm, scoring, training, training_kl, sharing, iteration)
    shown += (startup, makespan, cluster.submission, scale)
    known: dict[str, Callable[[], str]] = {call.__name__: call for call in shown}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", nargs="*")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--kl", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sides: dict[str, Callable[[], str]] = {
        "_official": lambda: _side(_official_step, options.kl),
        "_ours": lambda: _side(_our_step, options.kl),
        "_freeze": lambda: _freeze(options.count),
        "_select": lambda: _select(options.count),
    }
    names = options.name or list(known)
    strange = [name for name in names if name not in known | sides]
    if strange:
        parser.error(f"no benchmark '{strange[0]}' (there are: {', '.join(known)})")
    print(
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores ({platform.machine()}), "
        f"{options.threads} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}\n"
    )
    for name in names:
        print((known | sides)[name](), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
