"""sft: supervised fine-tuning of the base model on prompt and label; makes the starting policy."""

from collections.abc import Iterator

import torch
from transformers import PreTrainedTokenizerBase

from alt_hpc.domains import Domain
from alt_hpc.errors import InputError
from alt_hpc.lm import load, tokens
from alt_hpc.run import rows
from alt_hpc.stages import optimise
from alt_hpc.stages.work import Work
from alt_hpc.training import loop, losses
from alt_hpc.training.examples import Example

CARD = """# Supervised start of an ALT-RM run

`{base}` fine-tuned on prompts and their labels with alt_hpc. Prompt it with the prompt as it is.
"""


def run(work: Work) -> None:
    """Make the starting policy. Runs on every rank; the first exports and publishes."""
    policy, settings = work.config.policy, work.config.sft
    assert settings is not None
    work.connect()
    base = work.named(policy.base, policy.tokenizer)
    texts = rows.frozen(work.run, "prompts-train")
    made = list(_examples(texts, base.tokenizer, work.config.domain, settings.max_length))
    shortened = sum(lost for _, lost in made)
    if shortened:
        work.say(f"{shortened} of {len(made)} rows were shortened to {settings.max_length} tokens")
    model = load.policy(base.place, "float32", torch.device("cpu"))
    optimise.set_dropout(model, policy.dropout)
    loop.prepare(model, settings)
    examples, loss = [example for example, _ in made], losses.sft_loss
    card = CARD.format(base=policy.base)
    optimise.make_policy(
        work, base, model, examples, loss, settings, card, rows=len(made), shortened=shortened
    )


def _examples(
    texts: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, domain: Domain, longest: int
) -> Iterator[tuple[Example, bool]]:
    """Prompt + ` {label}` stripped + EOS, and whether post or label lost its end.

    The post gives way where it is too long.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(f"{tokenizer.name_or_path}: the tokenizer has no EOS token")
    for row in texts:
        label = tokens.continuation_ids(tokenizer, domain.answer(row["label"]))
        answer = [*label[: longest // 2], tokenizer.eos_token_id]
        prompt, lost = domain.fit(tokenizer, "", row["prompt"], longest - len(answer))
        yield Example([*prompt, *answer], len(prompt)), lost > 0 or len(label) > longest // 2
