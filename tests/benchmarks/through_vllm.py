"""One side of the vLLM benchmark, in vLLM's environment: `ours` or `bare`; JSON settings on stdin.

Prints JSON: seconds from the start to a working engine, and seconds per round. Each round has
prompts of its own, so that prefix caching is of no use between rounds.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from alt_hpc.engines import Ask, Decoding, Model, vllm


def main() -> None:
    side, settings = sys.argv[1], json.load(sys.stdin)
    began = time.perf_counter()
    sample = {"ours": _ours, "bare": _bare}[side](settings)
    sample([ids[:50] for ids in settings["rounds"][0][:2]])  # warm
    started, took = time.perf_counter() - began, []
    for prompts in settings["rounds"]:
        began = time.perf_counter()
        tokens = sample(prompts)
        took.append(time.perf_counter() - began)
        assert tokens == len(prompts) * settings["n"] * settings["new"]
    print(json.dumps({"start": started, "took": took}))


def _ours(settings: dict[str, Any]) -> Any:
    place, device = Path(settings["model"]), torch.device("cpu")
    model = Model(place, "bfloat16", (settings["never"],), settings["longest"], device)
    decoding = Decoding(settings["n"], 0.9, 0.9, settings["new"], settings["group"])
    engine = vllm.Settings().load(model)

    def sample(prompts: list[list[int]]) -> int:
        groups = [[Ask(ids, seed)] for seed, ids in enumerate(prompts)]
        return sum(
            len(g.ids) for made in engine.sample(groups, decoding) for of in made for g in of
        )

    return sample


def _bare(settings: dict[str, Any]) -> Any:
    os.environ.update(vllm.VLLM_ENVIRONMENT)  # the same process layout on both sides
    import vllm as bare

    model = bare.LLM(
        model=settings["model"],
        dtype="bfloat16",
        max_model_len=settings["longest"],
        enable_prefix_caching=True,
        enforce_eager=True,
        enable_chunked_prefill=False,  # with seeds, the CPU build fails otherwise
        generation_config="vllm",
    )
    options = {"n": settings["n"], "temperature": 0.9, "top_p": 0.9}
    options |= {"max_tokens": settings["new"], "ignore_eos": True, "detokenize": False}

    def sample(prompts: list[list[int]]) -> int:
        texts = [bare.TokensPrompt(prompt_token_ids=ids) for ids in prompts]
        params = [bare.SamplingParams(**options, seed=i) for i in range(len(prompts))]
        answers = model.generate(texts, params, use_tqdm=False)
        return sum(len(one.token_ids) for answer in answers for one in answer.outputs)

    return sample


if __name__ == "__main__":
    main()
