"""Engines that sample generations: transformers (ours, exact) and vLLM, behind one call."""

from __future__ import annotations

import collections
import functools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from alt_hpc import models, packed
from alt_hpc.config import Sampling
from alt_hpc.errors import InputError
from alt_hpc.generate import Generation, generate

# What vLLM reads from the environment; a user's own values stay.
VLLM_ENVIRONMENT = {
    # One process instead of three: one kill ends it, and OMP_NUM_THREADS holds. (Workers of its
    # CPU build pin their threads to the first cores: shards on one node would share them.)
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB; only the CPU build reads it, else it takes 92 % of RAM
    "VLLM_LOGGING_LEVEL": "ERROR",  # a warning for every weight that is stored in another dtype
    "VLLM_NO_USAGE_STATS": "1",  # it would report to stats.vllm.ai
}


Group = list[tuple[list[int], int]]  # token ids and seed of each of its prompts


class Engine(Protocol):
    """Samples generations for groups of prompts.

    Attributes
    ----------
    together
        Prompts of a group: what is kept, or lost, at once.
    """

    together: int

    def sample(self, groups: Iterable[Group]) -> Iterator[list[list[Generation]]]:
        """`sampling.generations` generations for each prompt of each group, in order."""
        ...


@functools.lru_cache(maxsize=1)  # a task may make several shards
def load(
    policy: Path,
    sampling: Sampling,
    dtype: str,
    ends: tuple[int, ...],
    longest: int,
    on: torch.device,
) -> Engine:
    """The engine that the config names, with the policy loaded, once per task.

    Parameters
    ----------
    ends
        Token ids that end a generation.
    longest
        The most tokens that a prompt and its generation have together.
    on
        Where to compute. vLLM finds that out by itself.

    Raises
    ------
    InputError
        The policy cannot be loaded, or vLLM is not installed in this environment.
    """
    if sampling.engine == "vllm":
        return Vllm(policy, sampling, dtype, ends, longest)
    return Transformers(policy, sampling, dtype, ends, on)


class Transformers:
    """Our own decoding on a transformers model: the same samples whatever the sharding."""

    def __init__(
        self, policy: Path, sampling: Sampling, dtype: str, ends: tuple[int, ...], on: torch.device
    ) -> None:
        self.model = packed.pack(models.load_policy(policy, dtype, on))
        self.sampling = sampling
        self.together = sampling.group
        self.ends = ends

    def sample(self, groups: Iterable[Group]) -> Iterator[list[list[Generation]]]:
        for group in groups:
            yield generate(
                self.model,
                [ids for ids, _ in group],
                self.sampling.generations,
                [seed for _, seed in group],
                temperature=self.sampling.temperature,
                top_p=self.sampling.top_p,
                max_new_tokens=self.sampling.max_new_tokens,
                eos=self.ends,
            )


class Vllm:
    """vLLM: n generations are one request, prefix caching on. As many prompts as a prompt group has
    are in flight at any time, each kept as it is done, so that the batch never runs empty and a
    killed task loses no more than a group. Seeds are per prompt (generation i takes seed + i), but
    as vLLM batches continuously, equality across shardings is not promised.

    Goal: throughput on a GPU. The CPU build serves to test this without one. Measured with it, on
    2 cores with AVX-512 that others used too (SmolLM2-135M, bfloat16, 2 threads): imports 8 s and
    engine start 15 s, once per task (52 s the first time, its files not yet in memory); then 280
    tokens/s at best, 16 generations of a 179-token prompt at once, but 7 to 75 beside busier
    neighbours: OpenMP threads wait for one another.
    """

    def __init__(
        self, policy: Path, sampling: Sampling, dtype: str, ends: tuple[int, ...], longest: int
    ) -> None:
        for name, value in VLLM_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            import vllm
            import vllm.platforms
        except ModuleNotFoundError as error:
            raise InputError(
                f"sampling.engine: vllm is not installed in {sys.prefix} ({error}); let"
                " cluster.sample.python name an environment that has it"
            ) from error
        self.vllm = vllm
        self.together, self.in_flight = 1, sampling.group
        on_cpu = vllm.platforms.current_platform.is_cpu()
        self.engine = vllm.LLM(
            model=str(policy),
            dtype=dtype,
            max_model_len=longest,
            skip_tokenizer_init=True,  # ids in, ids out; the policy's folder may have none
            generation_config="vllm",  # not the folder's: top_k or penalties there are not ours
            enable_prefix_caching=True,
            enforce_eager=on_cpu,  # compiling takes minutes
            # A seeded request whose prompt is cut into chunks ends vLLM 0.32 on a CPU
            # ("CPU Generator does not use offset").
            enable_chunked_prefill=not on_cpu,
            disable_log_stats=True,
            use_tqdm_on_load=False,
        ).llm_engine
        self.settings: dict[str, Any] = {
            "n": sampling.generations,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "ignore_eos": True,  # vLLM's own idea of it; ours are the stop tokens
            "stop_token_ids": list(ends),
            "detokenize": False,
            "output_kind": vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        }
        self.ends = ends
        self.entered = 0  # requests, ever
        self.answers: dict[str, list[Generation]] = {}  # not yet asked for, by request

    def sample(self, groups: Iterable[Group]) -> Iterator[list[list[Generation]]]:
        ahead: collections.deque[list[str]] = collections.deque()
        for group in groups:
            ahead.append([self._enter(ids, seed) for ids, seed in group])
            if len(ahead) == self.in_flight:
                yield self._answers(ahead.popleft())
        while ahead:
            yield self._answers(ahead.popleft())

    def _enter(self, ids: list[int], seed: int) -> str:
        """The name of a new request."""
        name, self.entered = str(self.entered), self.entered + 1
        settings = self.vllm.SamplingParams(**self.settings, seed=seed)
        self.engine.add_request(name, self.vllm.TokensPrompt(prompt_token_ids=ids), settings)
        return name

    def _answers(self, requests: list[str]) -> list[list[Generation]]:
        """Work until all these requests are answered."""
        while not all(name in self.answers for name in requests):
            for answer in self.engine.step():
                if answer.finished:
                    found = [self._generation(one.token_ids) for one in answer.outputs]
                    self.answers[answer.request_id] = found
        return [self.answers.pop(name) for name in requests]

    def _generation(self, token_ids: Sequence[int]) -> Generation:
        """vLLM keeps a stop token in the ids, as we do."""
        ids = [int(i) for i in token_ids]
        return Generation(ids, "eos" if ids[-1] in self.ends else "limit")
