"""sft: supervised fine-tuning of the base model on prompt and label; makes the starting policy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from alt_hpc.domains import Domain
from alt_hpc.errors import InputError
from alt_hpc.lm import tokens
from alt_hpc.run import rows
from alt_hpc.stages import optimise
from alt_hpc.stages.work import Work, cpu
from alt_hpc.training import loop, losses
from alt_hpc.training.examples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CARD = """# Supervised start of an ALT-RM run

`{base}` fine-tuned on prompts and their labels with alt_hpc. Prompt it with the prompt as it is.
"""


def run(work: Work) -> None:
    """Make the starting policy. Runs on every rank; the first exports and publishes."""
    config, settings = work.config, work.config.sft
    assert settings is not None
    work.connect()
    _ = work.device  # sets threads
    base = work.base()
    texts = rows.frozen(work.run, "prompts-train")
    made = list(_examples(texts, base.tokenizer, config.domain, settings.max_length))
    examples = [example for example, _ in made]
    cut = sum(lost for _, lost in made)
    if cut:
        work.say(f"{cut} of {len(made)} rows were cut to {settings.max_length} tokens")
    model = base.load("float32", cpu())
    shape = model.config
    optimise.set_dropout(model, config.policy.dropout)
    loop.prepare(model, settings)
    weights = optimise.optimise(work, model, examples, losses.sft_loss, settings, config.seed)
    if not work.ranks.first:
        return
    card = CARD.format(base=config.policy.base)
    steps = len(loop.global_batches(len(examples), settings, config.seed))
    facts = {"steps": steps, "prompts_cut": cut}
    optimise.export_policy(work, shape, weights, base, settings.export_dtype, card)
    optimise.publish_policy(work, rows=len(examples), facts=facts)


def _examples(
    texts: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, domain: Domain, longest: int
) -> Iterator[tuple[Example, bool]]:
    """Prompt + ` {label}` stripped + EOS; the post gives way where it is too long.

    And whether post or label lost its end.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(f"{tokenizer.name_or_path}: the tokenizer has no EOS token")
    for row in texts:
        label = tokens.continuation_ids(tokenizer, domain.answer(row["label"]))
        shortened = label[: longest // 2]
        answer = [*shortened, tokenizer.eos_token_id]
        prompt, lost = domain.fit(tokenizer, "", row["prompt"], longest - len(answer))
        yield Example([*prompt, *answer], len(prompt)), lost > 0 or shortened != label
