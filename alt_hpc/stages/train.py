"""train: fine-tune the policy on conditioned prompts and the generations kept of each quantile."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from alt_hpc.graph import REPORT, SAMPLE, SCORE, TRAIN, Piece
from alt_hpc.lm import load
from alt_hpc.lm.prefix import side_by_side
from alt_hpc.report.results import best_iteration
from alt_hpc.run import rows
from alt_hpc.stages import optimise
from alt_hpc.stages.work import Policy, Work, cpu
from alt_hpc.training import deepspeed, loop, losses
from alt_hpc.training.examples import Siblings, Trainable
from alt_hpc.training.reference import share_trunk

if TYPE_CHECKING:
    from alt_hpc.config import Config
    from alt_hpc.training.settings import PolicyTraining

CARD = """# Policy aligned with textual feedback (ALT-RM), iteration {iteration}

Prompt it with the feedback you want, then the prompt as it is:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER)
prompt = "SUBREDDIT: r/...\\nTITLE: ...\\nPOST: ...\\nTL;DR:"
ids = tokenizer("{conditioning}" + prompt, return_tensors="pt")
out = model.generate(**ids, max_new_tokens={tokens}, do_sample=False)
print(tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True))
```

Feedback texts, best first: {texts}. Method: arXiv 2407.16970. Made from `{base}` with alt_hpc.
"""


def run(work: Work) -> None:
    """Make the policy of an iteration. Runs on every rank; the first exports and publishes."""
    work.connect()
    config, k, device = work.config, work.piece.iteration, work.device
    settings, seed = config.train, config.seed + k
    before = work.policy(k - 1)
    model = load.policy(before.place, "float32", cpu())
    config.method.prepare(model, before.tokenizer)
    shape, view = model.config, config.method.loss_view(before.tokenizer)
    optimise.set_dropout(model, config.policy.dropout)
    made = list(_families(work, before, side_by_side(model.config)))
    families = [family for family, _ in made]
    cut = sum(lost for _, lost in made)
    examples: list[Trainable]
    if settings.share_prompts:
        examples = [*families]
        settings = _counting_families(settings, config.method.family)
    else:
        examples = [alone for family in families for alone in family.alone()]
    loop.prepare(model, settings)
    loss = functools.partial(losses.alt_loss, entropy=settings.entropy)
    if settings.kl:
        reference = work.policy(0).load(deepspeed.precision(settings, work.ranks), device)
        if view.reads == "conditioned":
            share_trunk(model, reference)
        loss = functools.partial(
            loss, kl=settings.kl, reference=reference, vocabulary=view.vocabulary
        )
    last = work.run.manifests.get(Piece(k - 1, TRAIN)) if k > 1 else None
    first_step = last.facts["last_step"] if last else 0
    weights = optimise.optimise(work, model, examples, loss, settings, seed, first_step=first_step)
    if not work.ranks.first:
        return
    steps = len(loop.global_batches(len(examples), settings, seed))
    facts = {"steps": steps, "last_step": first_step + steps, "prompts_cut": cut}
    optimise.export_policy(work, shape, weights, before, settings.export_dtype, _card(config, k))
    count = sum(len(family.answers) for family in families)
    optimise.publish_policy(work, rows=count, facts=facts)
    _remove_old_policies(work)


def _card(config: Config, iteration: int) -> str:
    best = config.method.ask("best", {})
    return CARD.format(
        iteration=iteration,
        conditioning=config.domain.before(best),
        tokens=config.sample.max_new_tokens,
        texts=", ".join(f"`{text}`" for text in config.method.levels),
        base=config.policy.model or config.policy.base,
    )


def _counting_families(settings: PolicyTraining, size: int) -> PolicyTraining:
    """Batch sizes in families of `size` sequences; a step has as many sequences as before."""
    batch, micro = settings.global_batch // size, settings.micro_batch // size
    return settings.model_copy(update={"global_batch": batch, "micro_batch": micro})


def _families(work: Work, policy: Policy, together: bool) -> Iterator[tuple[Siblings, bool]]:
    """A conditioned prompt and what is learned behind it, in the order of the draw.

    And whether the prompt was shortened. The generations of a prompt that were given the same
    feedback are a family.
    """
    config, k = work.config, work.piece.iteration
    method, new = config.method, config.sample.max_new_tokens
    plainly = method.loss_view(policy.tokenizer).reads == "plain"
    samples = rows.of_stage(work.run, k, SAMPLE)
    labels = method.labels(rows.of_stage(work.run, k, SCORE))
    for row, label in zip(samples, labels, strict=True):
        generations = row["generations"]
        rng = np.random.default_rng([config.seed, k, row["row"]])
        finished = [g["ended"] == "eos" for g in generations]
        kept: dict[str | None, list[list[int]]] = {}
        for index in method.select(label, finished, rng):
            ids = method.learned(generations[index], policy.tokenizer, new)
            kept.setdefault(label.feedback[index], []).append(ids)
        for feedback, answers in kept.items():
            prompt, lost = policy.fit(feedback, row["prompt"], new)
            plain = None
            if plainly:
                plain, _ = policy.fit(None, row["prompt"], new)
            yield Siblings(prompt, answers, together, plain), lost > 0


def _remove_old_policies(work: Work) -> None:
    """Keep the last `keep` policies, the best one, and any that evaluation still reads."""
    manifests, best = work.run.manifests, best_iteration(work.run)
    for k in range(1, work.piece.iteration - work.config.keep + 1):
        if k != best and manifests.get(Piece(k, REPORT)) is not None:
            manifests.remove_policy(Piece(k, TRAIN))
