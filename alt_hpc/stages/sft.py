"""sft: supervised fine-tuning of the base model on prompt and label; makes the starting policy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from alt_hpc import losses, models, trainer
from alt_hpc.errors import InputError
from alt_hpc.losses import Example
from alt_hpc.pieces import Piece
from alt_hpc.runfolder import POLICY, RunFolder
from alt_hpc.stages import inputs, optimise, train

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CARD = """# Supervised start of an ALT-RM run

`{base}` fine-tuned on prompts and their labels with alt_hpc. Prompt it with the prompt as it is.
"""


def run(folder: RunFolder, piece: Piece, attempt: int) -> None:
    """Make the starting policy. Runs on every rank; rank 0 exports and publishes."""
    config = folder.config()
    settings = config.sft
    assert settings is not None
    assert config.policy.base is not None
    ranks, work = optimise.begin(folder, piece, attempt)
    inputs.device()
    place = folder.model(config.policy.base)
    tokenizer = inputs.tokenizer(folder, place)
    made = list(_examples(folder, tokenizer, settings.max_length))
    examples = [example for example, _ in made]
    cut = sum(lost for _, lost in made)
    if cut:
        print(f"{piece}: {cut} of {len(made)} rows were cut to {settings.max_length} tokens")
    model = models.load_policy(place, "float32", inputs.cpu())
    train.set_dropout(model, config.policy.dropout)
    trainer.prepare(model, settings)
    weights = optimise.optimise(
        folder, piece, ranks, model, examples, losses.sft_loss, settings, config.seed, inputs={}
    )
    if work is None:
        return
    card = CARD.format(base=config.policy.base)
    train.export(work.folder / POLICY, place, weights, tokenizer, settings.export_dtype, card)
    steps = len(trainer.global_batches(len(examples), settings, config.seed))
    facts = {"steps": steps, "prompts_cut": cut}
    folder.publish_policy(piece, work.folder / POLICY)
    optimise.commit(folder, work, POLICY, rows=len(examples), inputs={}, facts=facts)


def _examples(
    folder: RunFolder, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[tuple[Example, bool]]:
    """Prompt + ` {label}` stripped + EOS; the post gives way where it is too long.

    And whether post or label lost its end.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(f"{tokenizer.name_or_path}: the tokenizer has no EOS token")
    for row in folder.read_data("prompts-train"):
        label = models.continuation_ids(tokenizer, " " + row["label"].strip())
        shortened = label[: max_length // 2]
        answer = [*shortened, tokenizer.eos_token_id]
        prompt, lost = models.fit_prompt(tokenizer, "", row["prompt"], max_length - len(answer))
        yield Example([*prompt, *answer], len(prompt)), lost > 0 or shortened != label
