"""sft: supervised fine-tuning of the base model on prompt and label; makes the starting policy."""

import torch

from alt_hpc.data import texts
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
    """Make the starting policy: it learns ` {label}` stripped + EOS behind the prompt.

    The post gives way where it is too long. Runs on every rank; the first exports and publishes.
    """
    policy, domain, settings = work.config.policy, work.config.domain, work.config.sft
    assert settings is not None
    work.connect()
    base, longest = work.named(policy.base, policy.tokenizer), settings.max_length
    tokenizer, examples, shortened = base.tokenizer, [], 0
    if tokenizer.eos_token_id is None:
        raise InputError(f"{tokenizer.name_or_path}: the tokenizer has no EOS token")
    for row in rows.frozen(work.run, texts.labelled(work.config)):
        label = tokens.continuation_ids(tokenizer, domain.answer(row["label"]))
        answer = [*label[: longest // 2], tokenizer.eos_token_id]
        prompt, lost = domain.fit(tokenizer, row["prompt"], longest - len(answer))
        examples.append(Example([*prompt, *answer], len(prompt)))
        shortened += lost > 0 or len(label) > longest // 2  # post or label lost its end
    if shortened:
        work.say(f"{shortened} of {len(examples)} rows were shortened to {longest} tokens")
    model = load.policy(base.place, "float32", torch.device("cpu"))
    optimise.set_dropout(model, policy.dropout)
    loop.prepare(model, settings)
    card, loss = CARD.format(base=policy.base), losses.sft_loss
    optimise.make_policy(work, base, model, examples, loss, settings, card, shortened)
