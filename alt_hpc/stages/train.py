"""train: fine-tune the policy on conditioned prompts and the generations kept of each quantile."""

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from alt_hpc.config import Config
from alt_hpc.graph import REPORT, SAMPLE, SCORE, TRAIN, Piece
from alt_hpc.lm import load
from alt_hpc.lm.prefix import side_by_side
from alt_hpc.report.results import best_iteration
from alt_hpc.run import rows as rows_of
from alt_hpc.stages import optimise
from alt_hpc.stages.work import Policy, Work
from alt_hpc.training import deepspeed, loop, losses
from alt_hpc.training.examples import Siblings, Trainable
from alt_hpc.training.reference import share_trunk

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
    config, k, settings = work.config, work.piece.iteration, work.config.train
    before, method = work.policy(k - 1), config.method
    model = load.policy(before.place, "float32", torch.device("cpu"))
    method.prepare(model, before.tokenizer)
    optimise.set_dropout(model, config.policy.dropout)
    made = list(_families(work, before, side_by_side(model.config)))
    families = [family for family, _ in made]
    examples: Sequence[Trainable] = families
    if settings.share_prompts:  # batches of families; a step has as many sequences as before
        batches = ("global_batch", "micro_batch")
        sizes = {key: getattr(settings, key) // method.family for key in batches}
        settings = settings.model_copy(update=sizes)
    else:
        examples = [alone for family in families for alone in family.alone()]
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
    rows, shortened = sum(len(f.answers) for f in families), sum(lost for _, lost in made)
    optimise.make_policy(
        work, before, model, examples, loss, settings, _card(config, k), rows, shortened
    )
    if work.ranks.first:
        _remove_old_policies(work)


def _card(config: Config, iteration: int) -> str:
    return CARD.format(
        iteration=iteration,
        conditioning=config.domain.before(config.method.ask("best", {})),
        tokens=config.sample.max_new_tokens,
        texts=", ".join(f"`{text}`" for text in config.method.levels),
        base=config.policy.model or config.policy.base,
    )


def _families(work: Work, policy: Policy, together: bool) -> Iterator[tuple[Siblings, bool]]:
    """A conditioned prompt and what is learned behind it, in the order of the draw.

    And whether the prompt was shortened. The generations of a prompt that were given the same
    feedback are a family.
    """
    config, k = work.config, work.piece.iteration
    method, new = config.method, config.sample.max_new_tokens
    plainly = method.loss_view(policy.tokenizer).reads == "plain"
    samples = rows_of.of_stage(work.run, k, SAMPLE)
    labels = method.labels(rows_of.of_stage(work.run, k, SCORE))
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
            plain = policy.fit(None, row["prompt"], new)[0] if plainly else None
            yield Siblings(prompt, answers, together, plain), lost > 0


def _remove_old_policies(work: Work) -> None:
    """Keep the last `keep` policies, the best one, and any that evaluation still reads."""
    manifests, best = work.run.manifests, best_iteration(work.run)
    for k in range(1, work.piece.iteration - work.config.keep + 1):
        if k != best and manifests.get(Piece(k, REPORT)) is not None:
            manifests.remove_policy(Piece(k, TRAIN))
