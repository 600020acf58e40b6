"""Judges before anything is paid: their prompts, whether they answer, what asking may cost."""

import sys
from pathlib import Path

from alt_hpc.config import BestOf, Config, rules
from alt_hpc.data import draws, texts
from alt_hpc.errors import InputError, blaming
from alt_hpc.graph import COMPARISONS, JUDGE, TEST, VALID
from alt_hpc.report import judged
from alt_hpc.rewards import judge as rated
from alt_hpc.run import code, rows
from alt_hpc.run.folder import RunFolder

WIDEST = 6  # bytes of text that a token of an answer stands for, at most


def check(config: Config, run: RunFolder) -> None:
    """Raise InputError where the judge of `judge` cannot be asked, or a judge costs too much.

    The texts of the run are frozen by now.
    """
    _check_rewards(config, run)
    if config.judge is None:
        return
    judge = config.judge.judge
    questions, size = _wanted(config, run, len(judged.template(run).encode()))
    cost = judge.cost(questions, size, config.judge.max_tokens)
    if judge.most is not None and cost > judge.most:
        problem = f"{questions} questions may cost {cost:.2f} dollars, and the budget is"
        problem += f" {judge.most:g}: give more, or ask less"
        raise InputError(problem, f"{JUDGE}.judge.budget")
    if not judge.named():  # else it was checked with the other models
        with blaming(f"{JUDGE}.judge"):
            judge.check(Path)
    if cost:
        words = f"{questions} questions, at most {cost:.2f} dollars where each is asked once"
        print(f"{JUDGE}.judge: {words} (budget {judge.most:g})", file=sys.stderr)


def _check_rewards(config: Config, run: RunFolder) -> None:
    """The judges of rewards, which score and measure; prompts of mean length and full answers."""
    for section, whole in rules.rewards(config):
        count = _answers(config, run, section)
        for at, reward in whole.singles().items():
            if not isinstance(reward, rated.Settings) or (most := reward.asked.most) is None:
                continue
            name = reward.prompt or ""
            template = reward.template(lambda _, name=name: code.user_file(run, name))  # type: ignore[misc]
            lengths = [len(row["prompt"].encode()) for row in rows.frozen(run, texts.PROMPTS)]
            each = len(template.encode()) + sum(lengths) // len(lengths)
            size = count * (each + WIDEST * config.sample.max_new_tokens)
            cost, field = reward.asked.cost(count, size, reward.most_tokens), f"{section}{at}.judge"
            words = f"{count} answers are rated, which may cost {cost:.2f} dollars"
            if cost > most:
                problem = f"{words}, and the budget is {most:g}: give more, or ask less"
                raise InputError(problem, f"{field}.budget")
            print(f"{field}: {words} where each is asked once (budget {most:g})", file=sys.stderr)


def _answers(config: Config, run: RunFolder, section: str) -> int:
    """How many answers the reward of a section rates in the whole run, at most."""
    evaluate, method, last = config.evaluate, config.method, config.iterations
    posts = {name: draws.posts(run, name) for name in evaluate.all_sets}
    count = 0
    if section == "reward":
        several = [p.best_of for p in evaluate.policies.values() if isinstance(p, BestOf)]
        count += last * config.sample.prompts * config.sample.generations
        count += sum(several) * sum(posts.values())
    if section == "reward" and config.measure.reward is not None:
        return count
    for k in range(last + 1):
        held = sum(posts.values()) if k in (0, last) else posts[VALID]
        ways = len(method.asked(k)) + (len(method.between(k)) if evaluate.every_word else 0)
        count += held * ways + min(evaluate.drawn.posts, posts[VALID]) * evaluate.drawn.answers
    return count + (len(evaluate.policies) + evaluate.references) * sum(posts.values())


def _wanted(config: Config, run: RunFolder, template: int) -> tuple[int, int]:
    """How many questions the whole run asks the judge, and their bytes, at most."""
    judging = config.judge
    assert judging is not None
    count = sum(len(draws.judged(run, k)) for k in range(config.iterations + 1))
    held = rows.frozen(run, texts.of_set(config, config.judged_set)) if count else []
    asked = {TEST: config.evaluate.test_prompts, VALID: config.evaluate.prompts}
    most = min(judging.posts, asked.get(config.judged_set) or judging.posts)
    answers = 2 * WIDEST * config.evaluated_tokens
    each = [
        template + len(row["prompt"].encode()) + answers + len(str(row.get("label", "")).encode())
        for row in held[:most]
    ]
    questions, size = 2 * count * len(each), 2 * count * sum(each)
    if config.judges_humans:
        pairs = rows.frozen(run, texts.of_set(config, COMPARISONS))[: judging.comparisons]
        its = ("prompt", "chosen", "rejected")
        size += 2 * sum(template + sum(len(row[key].encode()) for key in its) for row in pairs)
        questions += 2 * len(pairs)
    return questions, size
