"""vllm: vLLM generates, for throughput on GPUs; equality across shardings is not promised."""

import collections
import functools
import itertools
import os
import sys
from typing import Literal

from alt_hpc.engines.engine import Decoding, Engine, Generations, Generator, Groups, Model
from alt_hpc.errors import InputError
from alt_hpc.lm.tokens import Generation
from alt_hpc.settings import GIVES_KIND

# What vLLM reads from the environment; a user's own values stay.
VLLM_ENVIRONMENT = {
    # One process instead of three: one kill ends it, and OMP_NUM_THREADS holds. (Workers of its
    # CPU build pin their threads to the first cores: shards on one node would share them.)
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB; only the CPU build reads it, else it takes 92 % of RAM
    "VLLM_LOGGING_LEVEL": "ERROR",  # a warning for every weight that is stored in another dtype
    "VLLM_NO_USAGE_STATS": "1",  # it would report to stats.vllm.ai
}
_NEVER = -100.0  # the least bias that vLLM's sampling parameters take


class Settings(Engine):
    """It has nothing to set."""

    model_config = GIVES_KIND

    kind: Literal["vllm"] = "vllm"

    @property
    def fills_memory(self) -> bool:
        return True

    def load(self, model: Model) -> Generator:
        return Generator(False, _Loaded(model).sample)


class _Loaded:
    """vLLM: n generations are one request (generation i takes seed + i), prefix caching on.

    As many prompts as a prompt group has are in flight, each kept as it is done: the batch never
    runs empty, and a killed task loses no more than a group. It is for GPUs; the CPU build serves
    to test it: on 2 shared cores with AVX-512 (SmolLM2-135M, bfloat16) 8 s to import and 15 s to
    start a task (52 s from a cold disk), then 280 tokens/s at best (16 generations of a 179-token
    prompt), but 7 to 75 beside busier neighbours: OpenMP threads wait for one another.
    """

    def __init__(self, model: Model) -> None:
        for name, value in VLLM_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            import vllm
            import vllm.platforms
        except ModuleNotFoundError as error:
            raise InputError(
                f"engine.kind: vllm is not installed in {sys.prefix} ({error}); let"
                " cluster.sample.python and cluster.evaluate.python name an environment that has it"
            ) from error
        self.ends = model.ends
        on_cpu = vllm.platforms.current_platform.is_cpu()
        self.engine = vllm.LLM(
            model=str(model.place),
            dtype=model.dtype,
            max_model_len=model.context,
            skip_tokenizer_init=True,  # ids in, ids out; the policy's folder may have none
            generation_config="vllm",  # not the folder's: top_k or penalties there are not ours
            enable_prefix_caching=True,
            enforce_eager=on_cpu,  # compiling takes minutes
            # A seeded request whose prompt comes in chunks ends vLLM 0.32 on a CPU
            # ("CPU Generator does not use offset").
            enable_chunked_prefill=not on_cpu,
            disable_log_stats=True,
            use_tqdm_on_load=False,
        ).llm_engine
        self.parameters = functools.partial(
            vllm.SamplingParams,
            ignore_eos=True,  # vLLM's own idea of it; ours are the stop tokens
            stop_token_ids=list(model.ends),
            detokenize=False,
            output_kind=vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        )
        self.names = map(str, itertools.count())  # of requests
        self.answers: dict[str, list[Generation]] = {}  # not yet asked for, by request

    def sample(self, groups: Groups, how: Decoding) -> Generations:
        parameters = functools.partial(
            self.parameters,
            n=how.answers,
            temperature=how.temperature,
            top_p=how.top_p,
            max_tokens=how.max_new_tokens,
            logit_bias=dict.fromkeys(how.silent, _NEVER) or None,
        )
        ahead: collections.deque[list[str]] = collections.deque()
        for group in groups:
            ahead.append([next(self.names) for _ in group])
            for name, ask in zip(ahead[-1], group, strict=True):
                prompt = {"prompt_token_ids": ask.ids}
                self.engine.add_request(name, prompt, parameters(seed=ask.seed))
            if len(ahead) == how.group:
                yield self._answers(ahead.popleft())
        yield from map(self._answers, ahead)

    def _answers(self, requests: list[str]) -> list[list[Generation]]:
        """Work until all these requests are answered. vLLM keeps a stop token, as we do."""
        while not self.answers.keys() >= set(requests):
            for answer in filter(lambda one: one.finished, self.engine.step()):
                made = [list(map(int, one.token_ids)) for one in answer.outputs]
                self.answers[answer.request_id] = [
                    Generation(ids, "eos" if ids[-1] in self.ends else "limit") for ids in made
                ]
        return [self.answers.pop(name) for name in requests]
