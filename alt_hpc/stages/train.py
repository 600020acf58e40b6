"""train: fine-tune the policy on conditioned prompts and the generations kept of each quantile."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alt_hpc import feedback, losses, models, pieces, trainer
from alt_hpc.generate import side_by_side
from alt_hpc.losses import Example, Siblings, Trainable
from alt_hpc.pieces import Piece
from alt_hpc.reference import share_trunk
from alt_hpc.runfolder import POLICY, RunFolder
from alt_hpc.stages import inputs, optimise
from alt_hpc.summary import best_iteration

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from alt_hpc.config import Config, Training

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


def run(folder: RunFolder, piece: Piece, attempt: int) -> None:
    """Make the policy of an iteration. Runs on every rank; rank 0 exports and publishes."""
    config, k = folder.config(), piece.iteration
    ranks, work = optimise.begin(folder, piece, attempt)
    sources = folder.checksums(pieces.inputs(config, folder.shardings(), piece))
    inputs.device()
    place = inputs.policy_folder(folder, k - 1)
    tokenizer = inputs.tokenizer(folder, place)
    model = models.load_policy(place, "float32", inputs.cpu())
    set_dropout(model, config.policy.dropout)
    made = list(_families(folder, k, tokenizer, place, side_by_side(model.config)))
    families = [family for family, _ in made]
    cut = sum(lost for _, lost in made)
    settings = config.training
    examples: list[Trainable]
    if settings.share_prompts:
        examples = [*families]
        settings = _counting_families(settings, config.feedback.per_quantile)
    else:
        examples = [Example([*f.prompt, *a], len(f.prompt)) for f in families for a in f.answers]
    trainer.prepare(model, settings)
    loss = functools.partial(losses.alt_loss, entropy=settings.entropy)
    if settings.kl:
        reference = models.load_policy(
            inputs.policy_folder(folder, 0), trainer.precision(settings, ranks), ranks.device
        )
        share_trunk(model, reference)
        loss = functools.partial(loss, kl=settings.kl, reference=reference)
    before = Piece(k - 1, "train")
    last = folder.manifest(before) if k > 1 else None
    first_step = last.facts["last_step"] if last else 0
    weights = optimise.optimise(
        folder,
        piece,
        ranks,
        model,
        examples,
        loss,
        settings,
        config.seed + k,
        inputs=sources,
        first_step=first_step,
    )
    if work is None:
        return
    card = _card(config, k)
    export(work.folder / POLICY, place, weights, tokenizer, settings.export_dtype, card)
    steps = len(trainer.global_batches(len(examples), settings, config.seed + k))
    facts = {"steps": steps, "last_step": first_step + steps, "prompts_cut": cut}
    rows = sum(len(family.answers) for family in families)
    folder.publish_policy(piece, work.folder / POLICY)
    optimise.commit(folder, work, POLICY, rows=rows, inputs=sources, facts=facts)
    _remove_old_policies(folder, k)


def export(
    target: Path,
    source: Path,
    weights: Any,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    card: str,
) -> None:
    """Write a Hugging Face folder and check that it loads with every weight present and finite."""
    models.save_policy(target, models.load_config(source), weights, tokenizer, dtype, card)
    models.check_weights(target)


def set_dropout(model: PreTrainedModel, p: float) -> None:
    """Dropout while training: every dropout layer, and attention where it takes a number."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = p
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = p  # type: ignore[assignment]


def _card(config: Config, iteration: int) -> str:
    texts = config.feedback.texts
    return CARD.format(
        iteration=iteration,
        conditioning=feedback.conditioning(config.feedback.template, texts[0]),
        tokens=config.sampling.max_new_tokens,
        texts=", ".join(f"`{text}`" for text in texts),
        base=config.policy.model or config.policy.base,
    )


def _counting_families(settings: Training, size: int) -> Training:
    """Batch sizes in families of `size` sequences; a step has as many sequences as before."""
    batch, micro = settings.global_batch // size, settings.micro_batch // size
    return dataclasses.replace(settings, global_batch=batch, micro_batch=micro)


def _families(
    folder: RunFolder,
    iteration: int,
    tokenizer: PreTrainedTokenizerBase,
    place: Path,
    together: bool,
) -> Iterator[tuple[Siblings, bool]]:
    """A conditioned prompt and the sampled ids kept of its quantile, in the order of the draw.

    And whether the prompt lost the end of its post.
    """
    config = folder.config()
    settings = config.feedback
    ends = models.eos_ids(models.load_config(place), tokenizer)
    budget = inputs.prompt_budget(folder, place, config.sampling.max_new_tokens)
    prefixes = [feedback.conditioning(settings.template, text) for text in settings.texts]
    samples = folder.all_rows(iteration, "sample")
    cuts = feedback.cuts(settings, folder.all_rows(iteration, "score"))
    for row, quantiles in zip(samples, cuts, strict=True):
        generations = row["generations"]
        rng = np.random.default_rng([config.seed, iteration, row["row"]])
        finished = [g["ended"] == "eos" for g in generations]
        kept: dict[int, list[list[int]]] = {}
        for index in feedback.select(quantiles, finished, settings.per_quantile, rng):
            ids = generations[index]["ids"]
            if settings.append_eos and not finished[index] and _ends_sentence(generations[index]):
                ids = [*ids, ends[0]]
            quantile = quantiles[index]
            assert quantile is not None
            kept.setdefault(quantile, []).append(ids)
        for quantile, answers in kept.items():
            prompt, lost = models.fit_prompt(tokenizer, prefixes[quantile], row["prompt"], budget)
            yield Siblings(prompt, answers, together), lost > 0


def _ends_sentence(generation: dict[str, Any]) -> bool:
    return str(generation["text"]).endswith((".", "?", "!"))


def _remove_old_policies(folder: RunFolder, iteration: int) -> None:
    """Keep the last `keep` policies, the best one, and any that evaluation still reads."""
    best = best_iteration(folder)
    for k in range(1, iteration - folder.config().keep + 1):
        if k != best and folder.manifest(Piece(k, "report")) is not None:
            folder.remove_policy(Piece(k, "train"))
