"""Every fast path against the plain way: as near to float32 as plain transformers is in its dtype.

The plain way computes one whole sequence at a time, without a cache, and takes whole logits. Each
of the two is compared with the plain way in float32, by ||x - float32|| / ||float32||.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple
from unittest import mock

import shapes
import test_losses
import tiny
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from alt_hpc.lm import decode, gpu, load, prefix, reading
from alt_hpc.lm.blocks import train_top
from alt_hpc.stages import optimise
from alt_hpc.training.examples import Example, Siblings, move
from alt_hpc.training.losses import alt_loss
from alt_hpc.training.reference import share_trunk

DTYPES = (torch.bfloat16, torch.float16)
WORSE = 1.5  # our error may be so many times the plain one's
ENDS = {*range(40, 44)}
PROMPTS = [[*range(100, 117)], [7], [*range(50, 80)], [*range(100, 117)]]


class Compared(NamedTuple):
    """One path of one model: errors against float32."""

    path: str
    model: str
    dtype: str
    plain: float
    ours: float

    @property
    def badness(self) -> float:
        """Above 1 it is bad. Where the plain way happens to be exact the dtype's step counts."""
        step = torch.finfo(getattr(torch, self.dtype)).eps
        return self.ours / max(step / 4, WORSE * self.plain)


def _model(name: str, device: torch.device) -> Any:
    """A tiny model of an architecture, or a random one of a real shape."""
    if name in shapes.SHAPES:
        return shapes.model(name, torch.float32, device).requires_grad_(True)
    made = load.ready(tiny.model(name), device).requires_grad_(True)
    optimise.set_dropout(made, 0.0)  # as a config has it; GPT-2 drops out by itself
    return made


Both = tuple[Tensor, Tensor, Tensor]  # in float32, plainly in the dtype, by us in the dtype


@contextlib.contextmanager
def plainly(plain: bool = True) -> Iterator[None]:
    """Compute as transformers does, or have a CPU too take the ways that a GPU takes."""
    with (
        mock.patch.object(gpu, "_fast", return_value=not plain),
        mock.patch.object(prefix, "several", return_value=not plain),
    ):
        yield


@plainly(False)
def compared(device: torch.device, name: str, dtype: torch.dtype) -> list[Compared]:
    """All paths of a model in a dtype."""
    paths: dict[str, Callable[[Any, Any], Iterator[tuple[str, Both]]]] = {
        "sampling": sampled,
        "scoring": scored,
        "losses": losses,
    }
    exact, found = _model(name, device), list[Compared]()
    model, kind = copy.deepcopy(exact).to(dtype), str(dtype).removeprefix("torch.")
    for path in paths.values():
        for what, (true, plain, ours) in path(exact, model):
            found.append(Compared(what, name, kind, _far(plain, true), _far(ours, true)))
    return found


def _far(found: Tensor, true: Tensor) -> float:
    found, true = found.double(), true.double()
    return float((found - true).norm() / true.norm())


def _plainly(model: Any, ids: list[int]) -> Tensor:
    """Logits of a whole sequence [length, vocabulary]."""
    with torch.no_grad(), plainly():
        return model(torch.tensor([ids], device=model.device)).logits[0].float()


def _states(model: Any, prompt: list[int], rest: list[int]) -> Tensor:
    """Last hidden states of what stands behind a prompt [length, hidden]."""
    with torch.no_grad(), plainly():
        ids = torch.tensor([prompt + rest], device=model.device)
        return model.base_model(ids, use_cache=False)[0][0, len(prompt) :].float().cpu()


# ---------------------------------------------------------------------- sampling


def sampled(exact: Any, model: Any) -> Iterator[tuple[str, Both]]:
    """The logits that each token was picked from, sampled and greedy; and what was picked."""
    for what, n, temperature in (("sampling", 19, 0.9), ("greedy", 1, 0.0)):
        seen, pick = list[Tensor](), decode._pick

        def spy(logits: Tensor, *rest: Any, _pick: Any = pick, _seen: Any = seen) -> list[int]:
            _seen.append(logits.float())
            return list(_pick(logits, *rest))

        how = {"temperature": temperature, "top_p": 0.95, "max_new_tokens": 10, "eos": ENDS}
        with mock.patch.object(decode, "_pick", spy):
            made = decode.generate(model, PROMPTS, n, [1, 2, 3, 1], **how)
        assert n == 1 or made[0] == made[3], "the same prompt and seed, other answers"
        both = [(p, one.ids) for p, some in zip(PROMPTS, made, strict=True) for one in some]
        live = [(t, i) for t in range(len(seen)) for i, (_, ids) in enumerate(both) if len(ids) > t]
        true, plain = (_picked_from(of, both, live) for of in (exact, model))
        ours = torch.cat(seen)
        if not temperature:  # where the best token is clear, it was picked
            best = true.topk(2).values
            clear = best[:, 0] - best[:, 1] > 4 * (ours - true).abs().amax(-1)
            same = true.argmax(-1).cpu() == torch.tensor([both[i][1][t] for t, i in live])
            assert bool(same[clear.cpu()].all()), "greedy decoding has picked another token"
        yield what, (true, plain, ours)


def _picked_from(
    model: Any, both: list[tuple[list[int], list[int]]], live: list[tuple[int, int]]
) -> Tensor:
    """What a plain pass over each prompt and answer has at each step, of the live ones."""
    whole = [_plainly(model, [*prompt, *ids])[len(prompt) - 1 :] for prompt, ids in both]
    return torch.stack([whole[i][t] for t, i in live])


# ---------------------------------------------------------------------- scoring


def scored(exact: Any, model: Any) -> Iterator[tuple[str, Both]]:
    """Last hidden states behind one prompt, as rewards read them; log-probabilities of answers."""
    prompt, rests = PROMPTS[2], [[9, 8, 7], [5], [*range(60, 90)], *[[i, 3] for i in range(20)]]
    ours = torch.empty(len(rests), model.config.hidden_size)
    with torch.no_grad():
        for i, states in reading.outputs(model.base_model, prompt, rests, budget=64):
            ours[i] = states[-1].float().cpu()
    true, plain = (
        torch.stack([_states(of, prompt, rest)[-1] for rest in rests]) for of in (exact, model)
    )
    yield "scoring", (true, plain, ours)
    found = reading.continuation_logprobs(model, prompt, rests)
    true, plain = (
        torch.cat([_logprobs(of, prompt, rest) for rest in rests]) for of in (exact, model)
    )
    yield "log-probabilities", (true, plain, torch.tensor([one for some in found for one in some]))
    yield from _together(exact, model)


@torch.no_grad()
def _together(exact: Any, model: Any) -> Iterator[tuple[str, Both]]:
    """The same of several prompts at once."""
    texts = [(PROMPTS[0], [[9, 8, 7], [5]]), ([], [[4, 3]]), (PROMPTS[2], [[*range(60, 90)]])]
    texts += [(PROMPTS[1], [[i, 3] for i in range(20)])]
    with mock.patch.object(reading, "several", return_value=True):
        read = list(reading.read(model.base_model, texts, budget=64))
        found = list(reading.logprobs(model, texts[:1] + texts[2:]))
    ours = torch.cat([states.float() for some in read for states in some]).cpu()
    true, plain = (
        torch.cat([_states(of, prompt, rest) for prompt, rests in texts for rest in rests])
        for of in (exact, model)
    )
    yield "scoring together", (true, plain, ours)
    flat = [(p, rest) for p, rests in texts[:1] + texts[2:] for rest in rests]
    true, plain = (torch.cat([_logprobs(of, prompt, rest) for prompt, rest in flat]) for of in
                   (exact, model))  # fmt: skip
    ours = torch.tensor([one for some in found for each in some for one in each])
    yield "log-probabilities together", (true, plain, ours)


def _logprobs(of: Any, prompt: list[int], rest: list[int]) -> Tensor:
    logits = _plainly(of, prompt + rest)[len(prompt) - 1 : -1]
    return logits.log_softmax(-1).cpu()[range(len(rest)), rest]


# ---------------------------------------------------------------------- losses


def _loss(parts: dict[str, Tensor]) -> Tensor:
    return parts["ce"] - 0.06 * parts["entropy"] + 0.5 * parts["kl"]


def _found(model: Any, loss: Tensor) -> tuple[Tensor, Tensor]:
    """A loss and the gradients of all that is trained, as vectors."""
    gradients = test_losses._gradients(model, loss)
    return loss.detach().float().cpu()[None], parameters_to_vector(gradients.values()).float().cpu()


def _ours(model: Any, reference: Any, batch: Any) -> tuple[Tensor, Tensor]:
    batch = move(batch, model.device)
    loss, parts = alt_loss(model, batch, entropy=0.06, kl=0.5, reference=reference)
    assert set(parts) == {"ce", "entropy", "kl"}
    return _found(model, loss)


def _plain(model: Any, reference: Any, sequences: list[Example]) -> tuple[Tensor, Tensor]:
    with torch.device(model.device), plainly():
        return _found(model, _loss(test_losses._plain(model, reference, sequences)))


def losses(exact: Any, model: Any) -> Iterator[tuple[str, Both]]:
    """Loss and gradients: sequences apart, siblings in both places, and a trunk that is shared."""
    apart = test_losses.EXAMPLES
    yield from _compared_losses("loss", exact, model, apart, Example.batch(apart, most=9))
    for what, families in (("siblings", test_losses.FAMILIES), ("behind", test_losses.TAILED)):
        sequences = [
            Example([*f.prompt, *tail, *answer], len(f.prompt) + len(tail))
            for f in families
            for tail, answer in f.both
        ]
        batch = Siblings.batch(families, most=15)
        yield from _compared_losses(what, exact, model, sequences, batch)
        one_by_one = [dataclasses.replace(family, together=False) for family in families]
        batch = Siblings.batch(one_by_one, most=15)
        yield from _compared_losses(f"{what}, one by one", exact, model, sequences, batch)
    yield from _shared(exact, model)


def _compared_losses(
    what: str, exact: Any, model: Any, sequences: list[Example], batch: Any
) -> Iterator[tuple[str, Both]]:
    true = _plain(_moved(exact), exact, sequences)
    plain = _plain(_moved(model), model, sequences)
    ours = _ours(_moved(model), model, batch)
    yield from zip((what, f"gradients of {what}"), zip(true, plain, ours, strict=True), strict=True)


def _moved(model: Any) -> Any:
    """A policy that has gone some way from the reference, which is the model: KL is not 0."""
    policy = copy.deepcopy(model)
    noise = torch.Generator(model.device).manual_seed(5)
    with torch.no_grad():
        for parameter in policy.parameters():
            step = torch.randn(parameter.shape, generator=noise, device=model.device) * 0.05
            parameter.add_((step * parameter.abs().mean()).to(parameter))
    return policy


def _shared(exact: Any, model: Any) -> Iterator[tuple[str, Both]]:
    """The reference goes on from the policy's trunk."""
    batch = Example.batch(test_losses.EXAMPLES, most=9)

    def policy(of: Any) -> Any:
        made = copy.deepcopy(of)
        train_top(made, 0.4, embeddings=False)
        for parameter in made.parameters():
            parameter.data.mul_(1.25 if parameter.requires_grad else 1.0)
        return made

    true = _plain(policy(exact), exact, test_losses.EXAMPLES)
    plain = _plain(policy(model), model, test_losses.EXAMPLES)
    mine, reference = policy(model), copy.deepcopy(model)
    assert share_trunk(mine, reference) > 0
    ours = _ours(mine, reference, batch)
    names = ("KL, trunk shared", "its gradients")
    yield from zip(names, zip(true, plain, ours, strict=True), strict=True)


def report(device: torch.device, names: list[str], write: Callable[[str], None]) -> bool:
    """A table in Markdown, of each path the worst model; whether all is good."""
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        # On a GPU at once: each waits for the launching of its kernels, on a core of its own.
        given = zip(*itertools.product([device], names, DTYPES), strict=True)
        each = (pool.map if device.type == "cuda" else map)(compared, *given)
        found = list(itertools.chain.from_iterable(each))
    worst: dict[tuple[str, str], Compared] = {}
    for one in found:
        key = one.path, one.dtype
        if key not in worst or one.badness > worst[key].badness:
            worst[key] = one
    write(
        f"{len(found)} comparisons over {', '.join(names)}. Errors are relative to float32; of each"
        " path the model is shown on which ours is worst beside plain.\n\n"
        "| path | dtype | model | plain | ours | |\n|---|---|---|---|---|---|"
    )
    for one in worst.values():
        verdict = "good" if one.badness <= 1 else "BAD"
        cells = (one.path, one.dtype, one.model, f"{one.plain:.1e}", f"{one.ours:.1e}", verdict)
        write(f"| {' | '.join(cells)} |")
    return all(one.badness <= 1 for one in found)
