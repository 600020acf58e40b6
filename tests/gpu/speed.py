"""Speed at GPU sizes: sampling, scoring beside its floor, training; settings chosen by measurement.

Each part of each shape is skipped once the time is used up. Random weights in bfloat16.
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import shapes
import torch

from alt_hpc import process
from alt_hpc.lm import decode, reading
from alt_hpc.lm.blocks import train_top
from alt_hpc.run.manifests import Checkpoints
from alt_hpc.training import loop, losses, ranks
from alt_hpc.training.examples import Example, move
from alt_hpc.training.settings import ZERO2, Training

RATES = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bfloat16 products a second, as sold
MiB = 2**20


@dataclass(frozen=True)
class Sizes:
    """How much is done; the tests do little."""

    prompt: int = 400
    answers: int = 96
    new: int = 48
    scored: int = 10  # prompts
    abreast: tuple[int, ...] = (8, 16, 48)
    groups: tuple[int, ...] = (1, 16, 64)
    budgets: tuple[int, ...] = (2048, 8192, 16384, 65536)
    rows: tuple[int, ...] = (8, 16, 32)
    width: int = 512
    learned: int = 64
    steps: int = 4
    micro_steps: int = 4  # micro-batches of an optimiser step
    product: int = 8192
    # of each shape the share of blocks that is trained
    trained: dict[str, float] = field(default_factory=lambda: {"1.2B": 1, "135M": 1, "3.2B": 0.5})


TINY = Sizes(
    *(20, 6, 4, 2, (3, 6), (1, 2), (16, 64), (1, 2), 24, 4, 3, 2, 128),
    {"tiny": 1},
)


@dataclass
class Bench:
    """What is measured on one device, until a moment."""

    device: torch.device
    sizes: Sizes
    deadline: float
    aims: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """Tables in Markdown, one a shape, line by line as they are measured; last the aims."""
        rate, size = self._product(), self.sizes.product
        yield f"A product of {size}² bfloat16 matrices: {rate / 1e12:.3g} TFLOP/s."
        for shape in self.sizes.trained:
            yield f"\n### {shape}\n\n| what | settings | figure | peak, MiB |\n|---|---|---|---|"
            for part in (self._sampling, self._scoring, self._training):
                if time.time() > self.deadline:
                    yield f"| {part.__name__.strip('_')} | | no time was left | |"
                    continue
                for row in self._tried(part, shape, rate):
                    yield f"| {' | '.join(row)} |"
        yield "\nvLLM was not compared: " + (
            "`python tests/benchmarks/run.py vllm` does."
            if importlib.util.find_spec("vllm")
            else "it is not installed here."
        )
        yield "\nAims:\n\n" + "\n".join(f"- {one}" for one in self.aims)

    def _tried(
        self, part: Callable[..., Any], shape: str, rate: float
    ) -> Iterator[tuple[str, ...]]:
        """The rows of a part; one that says so where the memory does not suffice."""
        try:
            yield from part(shape, rate)
        except torch.cuda.OutOfMemoryError as error:
            yield part.__name__.strip("_"), "", f"no room: {str(error).splitlines()[0]}", ""
        self._free()

    # ------------------------------------------------------------------ time and memory

    def _timed(self, call: Callable[[], Any], times: int = 1) -> float:
        """Seconds of a call, the best of some, after one that also pays for its memory."""
        call()
        took = []
        for _ in range(times):
            self._wait()
            began = time.perf_counter()
            call()
            self._wait()
            took.append(time.perf_counter() - began)
        return min(took)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _free(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _peak(self) -> str:
        found = process.peak_memory()
        return f"{found.get('gpu', found['host']) / MiB:.0f}"

    def _product(self) -> float:
        """Operations a second of a large matrix product."""
        size = self.sizes.product
        one, other = (
            torch.randn(size, size, device=self.device, dtype=torch.bfloat16) for _ in range(2)
        )
        return 2 * size**3 / self._timed(lambda: one @ other, 5)

    def _ids(self, count: int, length: int) -> list[list[int]]:
        drawn = torch.Generator().manual_seed(count)
        return torch.randint(3, 250, (count, length), generator=drawn).tolist()

    # ------------------------------------------------------------------ sampling

    def _sampling(self, shape: str, rate: float) -> Iterator[tuple[str, ...]]:
        """Tokens a second, by answers abreast, then by prompts in a group."""
        model, s = shapes.model(shape, torch.bfloat16, self.device), self.sizes
        _sharpen(model)
        how = {"temperature": 0.9, "top_p": 0.9, "eos": [-1]}

        def rate_of(abreast: int, group: int) -> float:
            prompts, seeds = self._ids(group, s.prompt), list(range(group))

            def generate(new: int) -> None:
                decode.generate(model, prompts, s.answers, seeds, max_new_tokens=new, **how)

            try:
                with mock.patch.object(decode, "ABREAST", abreast):
                    took = self._timed(lambda: generate(s.new))
            except torch.cuda.OutOfMemoryError:
                return 0.0
            return group * s.answers * s.new / took

        by = {n: rate_of(n, s.groups[1]) for n in s.abreast}
        best = max(by, key=by.__getitem__)
        groups = dict[int, float]()
        for n in s.groups:
            if not groups or groups[max(groups)] > 0:  # there was room
                self._free()
                groups[n] = rate_of(best, n)
        most = max(groups, key=groups.__getitem__)
        for n, found in by.items():
            yield "sampling", f"{n} abreast, {s.groups[1]} prompts", f"{found:.0f} tokens/s", ""
        for n, found in groups.items():
            yield "sampling", f"{best} abreast, {n} prompts", f"{found:.0f} tokens/s", ""
        chosen = f"{best} abreast, {most} prompts"
        yield "sampling, chosen", chosen, f"{groups[most]:.0f} tokens/s", self._peak()

    # ------------------------------------------------------------------ scoring

    def _scoring(self, shape: str, rate: float) -> Iterator[tuple[str, ...]]:
        """Distinct tokens a second beside what their matrix products take at their best.

        As rewards are read: some prompts, with all answers behind each.
        """
        model, s = shapes.model(shape, torch.bfloat16, self.device).base_model, self.sizes
        prompts = self._ids(s.scored, s.prompt)
        drawn = torch.Generator().manual_seed(0)
        lengths = torch.randint(s.new // 4, s.new, (s.answers,), generator=drawn).tolist()
        rests = [ids[:n] for ids, n in zip(self._ids(s.answers, s.new), lengths, strict=True)]
        distinct = len(prompts) * (s.prompt + sum(lengths))

        @torch.no_grad()
        def score(budget: int) -> None:
            for states in reading.read(model, [(prompt, rests) for prompt in prompts], budget):
                for one in states:
                    one[-1].float()

        with mock.patch.object(reading, "several", return_value=False):
            by = {n: self._timed(functools.partial(score, n)) for n in s.budgets}
        best = min(by, key=by.__getitem__)
        took = self._timed(functools.partial(score, best), 3)
        seen = s.prompt**2 // 2 + sum(n * s.prompt + n * n // 2 for n in lengths)
        floor = self._floor(model, distinct, len(prompts) * seen)
        for n, alone in by.items():
            settings = f"one after the other, budget {n}"
            yield "scoring", settings, f"{distinct / alone:.0f} distinct tokens/s", ""
        yield from self._several(model)
        share = floor / took
        figure = f"{distinct / took:.0f} distinct tokens/s, {share:.0%} of the floor"
        settings = f"{len(prompts)} prompts of {s.answers} answers, budget {best}"
        yield "scoring, chosen", settings, figure, self._peak()
        self.aims.append(f"scoring, {shape}: {share:.0%} of the floor (aim: 40 %)")

    @torch.no_grad()
    def _several(self, model: Any) -> Iterator[tuple[str, ...]]:
        """Many prompts with few answers each, one after the other and several at once."""
        s = self.sizes
        rests = self._ids(4, s.new // 2)
        texts = [(prompt, rests) for prompt in self._ids(max(2, s.answers // 3), s.prompt)]
        tokens = len(texts) * (s.prompt + len(rests) * len(rests[0]))
        for what, several in (("one after the other", False), ("several at once", True)):
            with mock.patch.object(reading, "several", return_value=several):
                took = self._timed(lambda: list(reading.read(model, texts, max(s.budgets))))
            yield "scoring", f"{len(texts)} prompts, {what}", f"{tokens / took:.0f} tokens/s", ""

    @torch.no_grad()
    def _floor(self, model: Any, tokens: int, seen: int) -> float:
        """Seconds of the matrix products at these sizes, and of attention's at their rate."""
        linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
        took, by = 0.0, dict[tuple[int, int], float]()
        for module in linear:
            size = module.in_features, module.out_features
            if size not in by:
                states = torch.randn(tokens, size[0], device=self.device).to(module.weight.dtype)
                by[size] = self._timed(functools.partial(module, states), 3)
            took += by[size]
        config = model.config
        attention = 4 * config.num_hidden_layers * config.hidden_size * seen
        return took * (1 + attention / (2 * tokens * _weights(linear)))

    # ------------------------------------------------------------------ training

    def _training(self, shape: str, rate: float) -> Iterator[tuple[str, ...]]:
        """Sequences at once chosen without DeepSpeed; then steps with it."""
        share, s = self.sizes.trained[shape], self.sizes
        model = shapes.model(shape, torch.bfloat16, self.device).train()
        train_top(model, share, embeddings=False)
        by = dict[int, float]()
        try:
            for rows in s.rows:
                took = self._timed(functools.partial(self._step, model, rows))
                by[rows] = rows * s.width / took
                yield "training", f"{rows} at once, no optimiser", f"{by[rows]:.0f} tokens/s", ""
        except torch.cuda.OutOfMemoryError:
            yield "training", f"{rows} at once, no optimiser", "no room", ""
        best, work = max(by, key=by.__getitem__), _operations(model, s)
        del model
        self._free()
        took = self._steps(shape, share, best)
        speed = s.micro_steps * best * s.width / took
        used = speed * work
        sold = next((r for name, r in RATES.items() if name in self._name()), rate)
        settings = f"{s.micro_steps} x {best}, the top {share:.0%} of the blocks, DeepSpeed"
        figure = f"{speed:.0f} tokens/s, {used / 1e12:.3g} TFLOP/s, MFU {used / sold:.0%}"
        yield "training, chosen", settings, figure, self._peak()
        self.aims.append(f"training, {shape}: MFU {used / sold:.0%} (aim at 1 to 3 B: 40 %)")

    def _name(self) -> str:
        return torch.cuda.get_device_name() if self.device.type == "cuda" else ""

    def _examples(self, count: int) -> list[Example]:
        s = self.sizes
        return [Example(ids, s.width - s.learned) for ids in self._ids(count, s.width)]

    def _step(self, model: Any, rows: int) -> None:
        batch = Example.batch(self._examples(rows), rows * self.sizes.learned)
        losses.alt_loss(model, move(batch, self.device))[0].backward()
        model.zero_grad()

    def _steps(self, shape: str, share: float, rows: int) -> float:
        """Seconds of an optimiser step: the median, the first two apart."""
        settings = Training(
            epochs=1, global_batch=self.sizes.micro_steps * rows, micro_batch=rows,
            trained_blocks=share, train_embeddings=False, checkpoint_minutes=1e6,
        )  # fmt: skip
        found, me = list[loop.StepRecord](), ranks.Ranks()
        module = shapes.model(shape, torch.float32, self.device).cpu().requires_grad_(True)
        self._free()
        loop.prepare(module, settings)
        with tempfile.TemporaryDirectory() as place:
            loop.train(
                module, self._examples(settings.global_batch * self.sizes.steps),
                losses.alt_loss, settings,
                deepspeed_config=ZERO2, seed=0, ranks=me, log=found.append,
                checkpoints=Checkpoints(Path(place) / "steps"),
            )  # fmt: skip
        assert len(found) == self.sizes.steps
        return statistics.median(record.seconds for record in found[2:])


def _sharpen(model: Any) -> None:
    """Logits as peaked as a trained model's, with a standard deviation of about 5."""
    with torch.no_grad():
        spread = model.config.initializer_range * model.config.hidden_size**0.5
        model.base_model.norm.weight.mul_(5 / spread)


def _weights(linear: list[torch.nn.Linear]) -> int:
    return sum(m.in_features * m.out_features for m in linear)


def _operations(model: Any, s: Sizes) -> float:
    """Operations of a token of a training step: 2 a weight forward, 4 backward where trained."""
    total = 0.0
    trunk, config = model.base_model, model.config
    attention = 2 * s.width * config.num_attention_heads * config.head_dim  # half is masked
    for block in trunk.layers:
        weights = _weights([m for m in block.modules() if isinstance(m, torch.nn.Linear)])
        trained = next(block.parameters()).requires_grad
        total += (2 * weights + attention) * (3 if trained else 1)
    head = config.vocab_size * config.hidden_size
    tied = 4 if not model.get_output_embeddings().weight.requires_grad else 6
    return total + tied * head * s.learned / s.width
