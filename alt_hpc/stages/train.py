"""train: fine-tune the policy on conditioned prompts and the generations kept of each quantile."""

import functools
import itertools
import json
from collections.abc import Iterator

import numpy as np
import torch

from alt_hpc.config import Config
from alt_hpc.data import draws
from alt_hpc.graph import SAMPLE, TRAIN, VALID, Graph, Piece
from alt_hpc.lm import load
from alt_hpc.lm.prefix import side_by_side
from alt_hpc.lm.tokens import common, text_ids
from alt_hpc.plan import State, is_whole
from alt_hpc.report import results
from alt_hpc.run import rows as rows_of
from alt_hpc.run.folder import RunFolder
from alt_hpc.stages import optimise
from alt_hpc.stages.work import Policy, Work
from alt_hpc.training import deepspeed, loop, losses
from alt_hpc.training.examples import Siblings
from alt_hpc.training.reference import share_trunk

CARD = """# Policy aligned with textual feedback, {title}, iteration {iteration}

Prompt it with {place}:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER)
prompt = {prompt}
ids = tokenizer(prompt, return_tensors="pt")
out = model.generate(**ids, max_new_tokens={tokens}, do_sample=False)
print(tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True))
```

Feedback, best first: {texts}. Method: arXiv 2407.16970. Made from `{base}` with alt_hpc.
"""


def run(work: Work) -> None:
    """Make the policy of an iteration. Runs on every rank; the first exports and publishes."""
    work.connect()
    config, k, settings = work.config, work.piece.iteration, work.config.train
    before, method = work.policy(k - 1), config.method
    model = load.policy(before.place, "float32", torch.device("cpu"))
    if before.lacks_tokens:
        method.prepare(model, before.tokenizer, config.seed)
    optimise.set_dropout(model, config.policy.dropout)
    made = list(_families(work, before, side_by_side(model.config)))
    examples = [family for family, _ in made]
    if config.shares_prompts:  # batches of families; a step has as many sequences as before
        batches = ("global_batch", "micro_batch")
        sizes = {key: getattr(settings, key) // config.family for key in batches}
        settings = settings.model_copy(update=sizes)
    else:
        examples = [alone for family in examples for alone in family.alone()]
    loop.prepare(model, settings)
    loss = functools.partial(losses.alt_loss, entropy=settings.entropy)
    if settings.kl:
        view = method.loss_view(before.tokenizer)
        dtype = deepspeed.precision(settings, work.ranks)
        reference = load.policy(work.policy(0).place, dtype, work.device)
        if view.reads == "conditioned":
            share_trunk(model, reference)
        against = {"reference": reference, "vocabulary": view.vocabulary}
        loss = functools.partial(loss, kl=settings.kl, **against)
    domain, asked = config.domain, method.ask("best", {}, work.recall(k), config.seed)
    it = domain.around(asked)
    text = domain.text(domain.probe, it)
    bos = it.bos and not text_ids(before.tokenizer, "")  # which it does not add by itself
    said = [f"`{text}`" for text in method.levels]
    if method.reads_words:
        said = ["sentences on an answer, as a judge writes them"]
    card = CARD.format(
        iteration=k,
        title=config.title,
        place=_place(config, asked),
        prompt="tokenizer.bos_token + " * bos + json.dumps(text, ensure_ascii=False),
        tokens=config.sample.max_new_tokens,
        texts=", ".join(said) if asked else "(none)",
        base=config.policy.model or config.policy.base,
    )
    shortened = sum(lost for _, lost in made)
    optimise.make_policy(work, before, model, examples, loss, settings, card, shortened)
    if work.ranks.first:
        _remove_old_policies(work)


def _families(work: Work, policy: Policy, together: bool) -> Iterator[tuple[Siblings, bool]]:
    """Generations that share a prompt, in the order of the draws; whether it was shortened.

    All of a draw where the feedback stands behind it, else those of a family.
    """
    config, k = work.config, work.piece.iteration
    method, new = config.method, config.sample.max_new_tokens
    plainly = method.loss_view(policy.tokenizer).reads == "plain"
    each = (rows_of.of_stage(work.run, j, SAMPLE) for j in method.pooled(k))
    samples = itertools.chain.from_iterable(each)
    for row, (j, _, label) in zip(samples, work.pool(), strict=True):
        generations = row["generations"]
        rng = np.random.default_rng([config.seed, k, row["row"], *([j] if j < k else [])])
        finished = [g["ended"] == "eos" for g in generations]
        kept: dict[tuple[int, str | None], list[list[int]]] = {}
        for index, feedback, family in method.select(label, finished, rng):
            ids = method.learned(generations[index], policy.tokenizer, new)
            kept.setdefault((family, feedback), []).append(ids)
        plain = policy.fit(None, row["prompt"], new)[0] if plainly else None
        fitted = {feedback: policy.fit(feedback, row["prompt"], new) for _, feedback in kept}
        lost = any(lost for _, lost in fitted.values())
        prompts = {feedback: ids for feedback, (ids, _) in fitted.items()}
        if config.domain.is_behind and kept:
            shared = common([*prompts.values()])
            tails = [prompts[word][shared:] for (_, word), some in kept.items() for _ in some]
            answers = [*itertools.chain(*kept.values())]
            prompt = next(iter(prompts.values()))[:shared]
            yield Siblings(prompt, answers, together, plain, tails), lost
            continue
        for (_, feedback), answers in kept.items():
            yield Siblings(prompts[feedback], answers, together, plain), lost


def _place(config: Config, asked: str | None) -> str:
    """What a policy is prompted with, in a few words."""
    if asked is None:
        return "the prompt as it is"
    behind = config.domain.is_behind
    return "the feedback you want" + (" behind it" if behind else ", then the prompt as it is")


def _remove_old_policies(work: Work) -> None:
    """Keep the last `keep`, the best by mean reward on `valid`, and what is still to be read."""
    found = results.reports(work.run)
    valid = {k: report["evaluation"].get(VALID, {}) for k, report in found.items()}
    by = {k: variants.get(results.shown(work.run, k)) for k, variants in valid.items()}
    rewards = {k: m["reward"] for k, m in by.items() if m and m["reward"] is not None}
    best = max(rewards, key=rewards.__getitem__, default=None)
    now = RunFolder(work.run.path)  # more may be asked for since this training began
    graph = Graph(now.config(), {k: draws.sharding(now, k) for k in now.graph().shardings})
    state = State(graph, now.manifests.done())
    for k in range(1, work.piece.iteration - work.config.keep + 1):
        policy = Piece(k, TRAIN)
        readers = [piece for piece in graph.pieces() if policy in graph.sources(piece)]
        if k != best and k in found and all(is_whole(state, piece) for piece in readers):
            now.manifests.remove_policy(policy)
