"""reward-model: train a reward model from comparisons, whole or only a head on a trunk as it is."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel

from alt_hpc import interrupt
from alt_hpc.lm import check, load, save
from alt_hpc.rewards import Answers, heads, model
from alt_hpc.rewards.heads import Text
from alt_hpc.run import models, rows
from alt_hpc.run.files import link
from alt_hpc.run.layout import MODEL_FOLDER
from alt_hpc.stages import optimise
from alt_hpc.stages.work import Work, scorer
from alt_hpc.training import loop, losses
from alt_hpc.training.examples import FeaturePair, Pair
from alt_hpc.training.settings import Training

Rows = list[dict[str, Any]]
Made = tuple[PreTrainedModel | None, int]  # None but on the first rank; prompts shortened


def run(work: Work) -> None:
    """Make a sequence-classification folder and report its accuracy on held-out comparisons.

    The loss is -log sigmoid(r_chosen - r_rejected), the reward r a linear head on the last token.
    """
    work.connect()
    settings, reward = work.config.reward_model, _to_train(work)
    assert settings is not None
    named = reward.named().items()
    found = {key: models.place(work.run, of.name, whole=of.whole) for key, of in named}
    base, new = found["base"], work.config.sample.max_new_tokens
    words = Text(found.get("tokenizer", base), reward, work.config.domain, new)
    pairs = rows.frozen(work.run, "comparisons-train")
    train = _train_head if settings.head_only else _train_whole
    made, shortened = train(work, settings, base, words, pairs)
    if made is None:
        return
    folder = work.attempt.folder / MODEL_FOLDER
    card = f"A value head on the last token of `{heads.PLAIN_TEMPLATE}` + EOS."
    save.whole(folder, made, words.tokenizer, f"# Reward model\n{card}\n")
    del made  # it is loaded again
    check.weights(folder)
    facts = _held_out(work, folder)
    link(work.run.layout.reward_model, folder)
    print(
        f"reward model: {facts['accuracy']:.1%} of {facts['pairs']} held-out comparisons right"
        f" (the longer summary is the better one in {facts['longer_is_better']:.1%})"
    )
    optimise.publish(work, len(pairs), facts | {"prompts_shortened": shortened})


def _to_train(work: Work) -> model.Settings:
    """The reward, or the part of it, whose model is trained."""
    (reward,) = work.config.reward.to_train().values()
    assert isinstance(reward, model.Settings)
    return reward


def _train_head(work: Work, settings: Training, base: Path, words: Text, pairs: Rows) -> Made:
    """Train a linear head on the trunk's features, computed once."""
    reward, found, shortened, started = _to_train(work), [], 0, time.time()
    trunk = heads.Trunk(load.whole(AutoModel, base, reward.dtype, work.device), words)
    asked = ((row["prompt"], [row["chosen"], row["rejected"]]) for row in pairs)
    for number, (hidden, lost) in enumerate(trunk.hidden(asked), start=1):
        interrupt.check()
        found.append(hidden.cpu())
        shortened += lost
        if number % 10 == 0 or number == len(pairs):
            work.show(number, len(pairs), "comparisons", started)
    del trunk
    features = torch.stack(found)  # [pairs, 2, hidden]
    # In units of each feature's spread: raw hidden states differ by orders of magnitude.
    scale = features.flatten(0, 1).std(0).clamp_min(1e-6)
    examples = [FeaturePair(pair) for pair in features / scale]
    head = nn.Linear(features.shape[-1], 1, bias=False)
    nn.init.zeros_(head.weight)
    weights = optimise.optimise(work, head, examples, losses.feature_loss, settings)
    if weights is None:
        return None, shortened
    whole = heads.classifier(base, words.tokenizer)
    heads.score_of(whole, base).weight.data.copy_(weights["weight"] / scale)
    return whole, shortened


def _train_whole(work: Work, settings: Training, base: Path, words: Text, pairs: Rows) -> Made:
    """Train trunk and head together; the head starts at zero."""
    texts = [words.ids(row["prompt"], [row["chosen"], row["rejected"]]) for row in pairs]
    examples = [Pair(chosen, rejected) for (chosen, rejected), _ in texts]
    shortened = sum(lost for _, lost in texts)
    whole = heads.classifier(base, words.tokenizer)
    shape = whole.config
    loop.prepare(whole, settings)
    weights = optimise.optimise(work, whole, examples, losses.pair_loss, settings)
    if weights is None:
        return None, shortened
    return load.assembled(heads.CLASSIFIER, shape, weights, settings.export_dtype, base), shortened


def _held_out(work: Work, place: Path) -> dict[str, float | int]:
    """Accuracy on held-out comparisons, and that of preferring the longer text."""
    pairs = rows.frozen(work.run, "comparisons-valid")
    texts = [[row["chosen"], row["rejected"]] for row in pairs]
    reward = scorer(work.run, _to_train(work), work.device, made=place)
    answers = (Answers(row["prompt"], two) for row, two in zip(pairs, texts, strict=True))
    rewards, started = list[tuple[float, ...]](), time.time()
    for number, scored in enumerate(reward.score(answers), start=1):
        rewards.append(tuple(scored.rewards))
        if number % 10 == 0 or number == len(pairs):
            work.show(number, len(pairs), "held-out comparisons", started)
    lengths = [tuple(float(len(one.split())) for one in two) for two in texts]
    accuracy, longer = (  # how often the first is the greater one; ties count half
        sum(1.0 if a > b else 0.5 * (a == b) for a, b in both) / len(pairs)
        for both in (rewards, lengths)
    )
    return {"accuracy": accuracy, "longer_is_better": longer, "pairs": len(pairs)}
