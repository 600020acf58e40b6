"""Engines that sample generations: transformers (ours, exact) and vLLM, behind one call."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

import torch

from alt_hpc import models
from alt_hpc.config import Sampling
from alt_hpc.generate import Generation, generate


class Engine(Protocol):
    """Samples generations for a prompt group."""

    def sample(self, prompts: list[list[int]], seeds: list[int]) -> list[list[Generation]]:
        """`sampling.generations` generations for each prompt (token ids), one seed a prompt."""
        ...


def load(
    policy: Path, sampling: Sampling, dtype: str, ends: tuple[int, ...], on: torch.device
) -> Engine:
    """The engine that the config names, with the policy loaded."""
    if sampling.engine == "vllm":
        return Vllm(policy, sampling, dtype, ends)
    return Transformers(policy, sampling, dtype, ends, on)


class Transformers:
    """Our own decoding on a transformers model: the same samples whatever the sharding."""

    def __init__(
        self, policy: Path, sampling: Sampling, dtype: str, ends: tuple[int, ...], on: torch.device
    ) -> None:
        self.model = models.load_policy(policy, dtype, on)
        self.sampling = sampling
        self.ends = ends

    def sample(self, prompts: list[list[int]], seeds: list[int]) -> list[list[Generation]]:
        return generate(
            self.model,
            prompts,
            self.sampling.generations,
            seeds,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            max_new_tokens=self.sampling.max_new_tokens,
            eos=self.ends,
        )


class Vllm:
    """vLLM: n generations in one request, prefix caching on. It batches continuously, so that
    seeds are per prompt but equality across shardings is not promised."""

    def __init__(self, policy: Path, sampling: Sampling, dtype: str, ends: tuple[int, ...]) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB; only its CPU build reads it
        import vllm

        self.vllm = vllm
        self.sampling = sampling
        self.ends = ends
        self.model = vllm.LLM(
            model=str(policy),
            dtype=dtype,
            enable_prefix_caching=True,
            enforce_eager=not torch.cuda.is_available(),
            disable_log_stats=True,
        )

    def sample(self, prompts: list[list[int]], seeds: list[int]) -> list[list[Generation]]:
        settings = [
            self.vllm.SamplingParams(
                n=self.sampling.generations,
                temperature=self.sampling.temperature,
                top_p=self.sampling.top_p,
                max_tokens=self.sampling.max_new_tokens,
                seed=seed,
                stop_token_ids=list(self.ends),
                detokenize=False,
            )
            for seed in seeds
        ]
        texts = [{"prompt_token_ids": ids} for ids in prompts]
        answers = self.model.generate(texts, settings, use_tqdm=False)
        return [[self._generation(one) for one in answer.outputs] for answer in answers]

    def _generation(self, output: object) -> Generation:
        ids = list(output.token_ids)  # type: ignore[attr-defined]
        ended = bool(ids) and ids[-1] in self.ends
        return Generation(ids, "eos" if ended else "limit")
