"""evaluate: greedy summaries of held-out prompts, with reward, perplexity and length of each."""

from __future__ import annotations

import gc
import math
from typing import Any

from alt_hpc import data, models, packed, pieces
from alt_hpc.feedback import conditioning
from alt_hpc.generate import continuation_logprobs, generate
from alt_hpc.pieces import Piece
from alt_hpc.runfolder import RunFolder
from alt_hpc.stages import inputs


def variants(iteration: int, texts: list[str], template: str) -> dict[str, str]:
    """Name -> text in front of the prompt: the best feedback, the worst as control, plain at 0."""
    named = {"best": conditioning(template, texts[0]), "worst": conditioning(template, texts[-1])}
    return {"plain": "", **named} if iteration == 0 else named


def run(folder: RunFolder, piece: Piece, attempt: int) -> None:
    """Make one shard of held-out prompts: a row per prompt and variant.

    Perplexity is exp of the mean token loss under the starting policy given the plain prompt,
    EOS excluded; null for an empty summary. Length counts tokens without EOS.
    """
    config, k = folder.config(), piece.iteration
    sources = folder.checksums(pieces.inputs(config, folder.shardings(), piece))
    work = folder.attempt(piece, attempt)
    start, end = folder.shardings()[k].evaluate[piece.shard]
    prompts = data.held_out_prompts(folder, k, start, end)
    kinds = variants(k, config.feedback.texts, config.feedback.template)
    steps = len(prompts) * (len(kinds) + 2)
    rows = _generate(folder, k, prompts, kinds, lambda n: work.progress(n, steps, "prompts"))
    done = len(prompts) * len(kinds)
    model = inputs.reward_model(folder, inputs.device())
    for group in rows:
        rewards, _ = model.score(group[0]["prompt"], [row["text"] for row in group])
        for row, reward in zip(group, rewards, strict=True):
            row["reward"] = reward if math.isfinite(reward) else None
        done += 1
        work.progress(done, steps, "prompts")
    del model
    gc.collect()  # three models in turn must not be three models in memory
    reference = inputs.policy_folder(folder, 0)
    tokenizer = inputs.tokenizer(folder, reference)
    policy = packed.pack(models.load_policy(reference, config.policy.dtype, inputs.device()))
    budget = inputs.prompt_budget(folder, reference, config.evaluation.max_new_tokens)
    for group in rows:
        ids, _ = models.fit_prompt(tokenizer, "", group[0]["prompt"], budget)
        losses = continuation_logprobs(policy, ids, [row["kept"] for row in group])
        for row, logprobs in zip(group, losses, strict=True):
            row["perplexity"] = math.exp(-sum(logprobs) / len(logprobs)) if logprobs else None
            del row["kept"]
        done += 1
        work.progress(done, steps, "prompts")
    flat = [row for group in rows for row in group]
    work.commit_rows(flat, inputs=sources)


def _generate(
    folder: RunFolder,
    iteration: int,
    prompts: list[tuple[str, int, str]],
    kinds: dict[str, str],
    progress: Any,
) -> list[list[dict[str, Any]]]:
    """For each prompt its rows, one a variant, with the greedy summary."""
    config = folder.config()
    place = inputs.policy_folder(folder, iteration)
    tokenizer = inputs.tokenizer(folder, place)
    ends = models.eos_ids(models.load_config(place), tokenizer)
    policy = packed.pack(models.load_policy(place, config.policy.dtype, inputs.device()))
    budget = inputs.prompt_budget(folder, place, config.evaluation.max_new_tokens)
    rows: list[list[dict[str, Any]]] = [[] for _ in prompts]
    done, size = 0, config.evaluation.group
    for name, prefix in kinds.items():
        for first in range(0, len(prompts), size):
            group = prompts[first : first + size]
            ids = [models.fit_prompt(tokenizer, prefix, text, budget)[0] for _, _, text in group]
            made = generate(
                policy,
                ids,
                1,
                [0] * len(ids),
                temperature=0.0,
                top_p=1.0,
                max_new_tokens=config.evaluation.max_new_tokens,
                eos=ends,
            )
            for place_in, (split, number, text), (one,) in zip(
                rows[first : first + size], group, made, strict=True
            ):
                kept = [i for i in one.ids if i not in ends]
                summary = models.text_of(tokenizer, kept, ends)
                place_in.append(
                    {"split": split, "row": number, "variant": name, "prompt": text}
                    | {"text": summary, "kept": kept, "length": len(kept), "ended": one.ended}
                )
            done += len(group)
            progress(done)
    return rows
