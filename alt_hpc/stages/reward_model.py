"""reward-model: train a reward model from comparisons, whole or only its head on a frozen trunk."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from alt_hpc import interrupt, losses, models, reward, trainer
from alt_hpc.losses import FeaturePair, Pair
from alt_hpc.reward import RewardModel, Trunk
from alt_hpc.run import rows
from alt_hpc.run.layout import MODEL_FOLDER
from alt_hpc.stages import optimise
from alt_hpc.stages.work import Work, cpu


def run(work: Work) -> None:
    """Make a sequence-classification folder and report its accuracy on held-out comparisons.

    The loss is -log sigmoid(r_chosen - r_rejected), the reward r a linear head on the last token.
    """
    settings = work.config.reward_training
    assert settings is not None
    work.connect()
    _ = work.device  # sets threads
    make = _train_head if settings.head_only else _train_whole
    with tempfile.TemporaryDirectory(prefix="alt-hpc-reward-") as place:
        count, cut = make(work, Path(place) / MODEL_FOLDER)
        if not work.ranks.first:
            return
        target = work.attempt.folder / MODEL_FOLDER
        shutil.copytree(Path(place) / MODEL_FOLDER, target)
    models.check_weights(target)
    facts = _held_out(work, target) | {"prompts_cut": cut}
    print(
        f"reward model: {facts['accuracy']:.1%} of {facts['pairs']} held-out comparisons right"
        f" (the longer summary is the better one in {facts['longer_is_better']:.1%})"
    )
    optimise.commit(work, MODEL_FOLDER, rows=count, facts=facts)


def _train_head(work: Work, target: Path) -> tuple[int, int]:
    """Train a linear head on the frozen trunk's features, computed once.

    Returns how many comparisons there were, and how many of them lost the end of their post.
    """
    config = work.config
    settings = config.reward_training
    assert settings is not None
    assert config.reward_model.base is not None
    place = work.run.model(config.reward_model.base)
    trunk = _trunk(work, place)
    found = _features(work, trunk, rows.frozen(work.run, "comparisons-train"))
    features = torch.stack([hidden for hidden, _ in found])  # [pairs, 2, hidden]
    # In units of each feature's spread: raw hidden states differ by orders of magnitude.
    scale = features.flatten(0, 1).std(0).clamp_min(1e-6)
    examples = [FeaturePair(pair) for pair in features / scale]
    head = nn.Linear(features.shape[-1], 1, bias=False)
    nn.init.zeros_(head.weight)
    loss = losses.feature_loss
    weights = optimise.optimise(work, head, examples, loss, settings, config.seed)
    if weights is not None:
        tokenizer = trunk.text.tokenizer
        reward.save_sequence_classifier(target, place, weights["weight"] / scale, tokenizer)
    return len(examples), sum(cut for _, cut in found)


def _train_whole(work: Work, target: Path) -> tuple[int, int]:
    """Train trunk and head together; the head starts at zero. Returns as `_train_head`."""
    from transformers import AutoModelForSequenceClassification

    config = work.config
    settings = config.reward_training
    assert settings is not None
    assert config.reward_model.base is not None
    place = work.run.model(config.reward_model.base)
    trunk = _trunk(work, place)
    examples, lost = [], 0
    for row in rows.frozen(work.run, "comparisons-train"):
        (chosen, rejected), cut = trunk.text.ids(row["prompt"], [row["chosen"], row["rejected"]])
        examples.append(Pair(chosen, rejected))
        lost += cut
    start = target.with_name("start")
    width = trunk.model.config.get_text_config().hidden_size
    reward.save_sequence_classifier(start, place, torch.zeros(1, width), trunk.text.tokenizer)
    model = models.load_whole(AutoModelForSequenceClassification, start, "float32", cpu())
    trainer.prepare(model, settings)
    weights = optimise.optimise(work, model, examples, losses.pair_loss, settings, config.seed)
    if weights is not None:
        whole = models.assemble(
            AutoModelForSequenceClassification, model.config, weights, settings.export_dtype, target
        )
        card = "# Reward model\nTrained on comparisons; scores the last token.\n"
        models.save_folder(target, whole, trunk.text.tokenizer, card)
    return len(examples), lost


def _trunk(work: Work, place: Path) -> Trunk:
    config = work.config
    named = config.reward_model.tokenizer
    return reward.load_trunk(
        place,
        config.reward_model,
        work.device,
        max_new_tokens=config.sampling.max_new_tokens,
        tokenizer=work.run.model(named) if named else None,
    )


def _features(work: Work, trunk: Trunk, pairs: list[dict[str, str]]) -> list[tuple[Tensor, bool]]:
    """[2, hidden] for each comparison (chosen, rejected), and whether its post was cut."""
    found = []
    started = time.time()
    for number, row in enumerate(pairs, start=1):
        interrupt.check()
        hidden, cut = trunk.hidden(row["prompt"], [row["chosen"], row["rejected"]])
        found.append((hidden.cpu(), cut))
        if number % 10 == 0 or number == len(pairs):
            work.show(number, len(pairs), "comparisons", started)
    return found


def _held_out(work: Work, place: Path) -> dict[str, float | int]:
    """Accuracy on held-out comparisons, and that of preferring the longer text (ties: half)."""
    config = work.config
    model: RewardModel = reward.load_reward_model(
        place, config.reward_model, work.device, max_new_tokens=config.sampling.max_new_tokens
    )
    right = longer = 0.0
    pairs = rows.frozen(work.run, "comparisons-valid")
    for row in pairs:
        (chosen, rejected), _ = model.score(row["prompt"], [row["chosen"], row["rejected"]])
        right += 1.0 if chosen > rejected else 0.5 * (chosen == rejected)
        words = [len(row[side].split()) for side in ("chosen", "rejected")]
        longer += 1.0 if words[0] > words[1] else 0.5 * (words[0] == words[1])
    return {
        "accuracy": right / len(pairs),
        "longer_is_better": longer / len(pairs),
        "pairs": len(pairs),
    }
