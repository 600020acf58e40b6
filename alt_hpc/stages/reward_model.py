"""reward-model: train a reward model from comparisons, whole or only its head on a frozen trunk."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alt_hpc import interrupt
from alt_hpc.lm import check
from alt_hpc.rewards import Answers, heads, text
from alt_hpc.rewards import model as settings_of
from alt_hpc.rewards.heads import Trunk
from alt_hpc.rewards.text import Text
from alt_hpc.run import models, rows
from alt_hpc.run.layout import MODEL_FOLDER
from alt_hpc.stages import optimise
from alt_hpc.stages.work import Work, scorer
from alt_hpc.training import loop, losses
from alt_hpc.training.examples import FeaturePair, Pair

Made = tuple[int, int]  # comparisons trained on, and how many of their prompts were shortened


def run(work: Work) -> None:
    """Make a sequence-classification folder and report its accuracy on held-out comparisons.

    The loss is -log sigmoid(r_chosen - r_rejected), the reward r a linear head on the last token.
    """
    settings = work.config.reward_model
    assert settings is not None
    work.connect()
    _ = work.device  # sets threads
    make = _train_head if settings.head_only else _train_whole
    count, cut = make(work)
    if not work.ranks.first:
        return
    target = work.attempt.folder / MODEL_FOLDER
    check.weights(target)
    facts = _held_out(work, target) | {"prompts_cut": cut}
    print(
        f"reward model: {facts['accuracy']:.1%} of {facts['pairs']} held-out comparisons right"
        f" (the longer summary is the better one in {facts['longer_is_better']:.1%})"
    )
    optimise.commit(work, MODEL_FOLDER, rows=count, facts=facts)


def _train_head(work: Work) -> Made:
    """Train a linear head on the trunk's features, computed once."""
    config = work.config
    settings = config.reward_model
    assert settings is not None
    place, words = _base(work)
    trunk = heads.load_trunk(place, words, _settings(work).dtype, work.device)
    found = _features(work, trunk, rows.frozen(work.run, "comparisons-train"))
    del trunk
    features = torch.stack([hidden for hidden, _ in found])  # [pairs, 2, hidden]
    # In units of each feature's spread: raw hidden states differ by orders of magnitude.
    scale = features.flatten(0, 1).std(0).clamp_min(1e-6)
    examples = [FeaturePair(pair) for pair in features / scale]
    head = nn.Linear(features.shape[-1], 1, bias=False)
    nn.init.zeros_(head.weight)
    loss = losses.feature_loss
    weights = optimise.optimise(work, head, examples, loss, settings, config.seed)
    if weights is not None:
        whole = heads.classifier(place, words.tokenizer)
        heads.score_of(whole, place).weight.data.copy_(weights["weight"] / scale)
        _save(work, whole, words)
    return len(examples), sum(shortened for _, shortened in found)


def _train_whole(work: Work) -> Made:
    """Train trunk and head together; the head starts at zero."""
    config = work.config
    settings = config.reward_model
    assert settings is not None
    place, words = _base(work)
    examples, lost = [], 0
    for row in rows.frozen(work.run, "comparisons-train"):
        (chosen, rejected), cut = words.ids(row["prompt"], [row["chosen"], row["rejected"]])
        examples.append(Pair(chosen, rejected))
        lost += cut
    model = heads.classifier(place, words.tokenizer)
    shape = model.config
    loop.prepare(model, settings)
    weights = optimise.optimise(work, model, examples, losses.pair_loss, settings, config.seed)
    if weights is not None:
        _save(work, heads.assembled(shape, weights, settings.export_dtype, place), words)
    return len(examples), lost


def _settings(work: Work) -> settings_of.Settings:
    """Those of the reward that is trained."""
    reward = work.config.reward
    assert isinstance(reward, settings_of.Settings)
    return reward


def _base(work: Work) -> tuple[Path, Text]:
    """The folder of the causal language model that it begins with, and what it will read."""
    reward = _settings(work)
    named = reward.named()
    found = {
        key: models.place(work.run, named[key].name, whole=named[key].whole)
        for key in ("base", "tokenizer")
        if key in named
    }
    new = work.config.sample.max_new_tokens
    words = text.of_base(found["base"], reward, work.config.domain, new, found.get("tokenizer"))
    return found["base"], words


def _save(work: Work, model: PreTrainedModel, words: Text) -> None:
    """Straight into the attempt's folder, by the first rank alone."""
    card = f"A value head on the last token of `{text.PLAIN_TEMPLATE}` + EOS."
    heads.save(work.attempt.folder / MODEL_FOLDER, model, words.tokenizer, card)


def _features(
    work: Work, trunk: Trunk, pairs: Sequence[dict[str, str]]
) -> list[tuple[Tensor, bool]]:
    """[2, hidden] for each comparison (chosen, rejected), and whether its prompt was shortened."""
    found = []
    started = time.time()
    for number, row in enumerate(pairs, start=1):
        interrupt.check()
        hidden, shortened = trunk.hidden(row["prompt"], [row["chosen"], row["rejected"]])
        found.append((hidden.cpu(), shortened))
        if number % 10 == 0 or number == len(pairs):
            work.show(number, len(pairs), "comparisons", started)
    return found


def _held_out(work: Work, place: Path) -> dict[str, float | int]:
    """Accuracy on held-out comparisons, and that of preferring the longer text (ties: half)."""
    pairs = rows.frozen(work.run, "comparisons-valid")
    sides = ("chosen", "rejected")
    model = scorer(work.run, work.config.reward, work.device, made=place)
    answers = (Answers(row["prompt"], [row[side] for side in sides]) for row in pairs)
    right = longer = 0.0
    for row, scored in zip(pairs, model.score(answers), strict=True):
        chosen, rejected = scored.rewards
        right += 1.0 if chosen > rejected else 0.5 * (chosen == rejected)
        words = [len(row[side].split()) for side in sides]
        longer += 1.0 if words[0] > words[1] else 0.5 * (words[0] == words[1])
    return {
        "accuracy": right / len(pairs),
        "longer_is_better": longer / len(pairs),
        "pairs": len(pairs),
    }
