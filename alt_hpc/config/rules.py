"""Rules between the keys of a config: values of the right type that still cannot be meant."""

from collections.abc import Iterable, Iterator

from alt_hpc import graph
from alt_hpc.config.schema import BestOf, Config, External, SbatchValue
from alt_hpc.errors import InputError, blaming
from alt_hpc.judges import Judge
from alt_hpc.rewards import Reward
from alt_hpc.training.settings import PolicyTraining, check_batches

Problems = Iterator[tuple[str, str]]  # (field, what is wrong with it)
_LEFT_OUT = ("requeue", "signal", "open-mode", "cpus-per-task")  # by false, where a site refuses
_OUR_SBATCH = (
    *(*_LEFT_OUT, "array", "dependency", "error", "job-name", "nodes", "no-requeue"),
    *("ntasks", "ntasks-per-node", "output", "parsable", "wait", "wrap"),
)


def check(config: Config) -> None:
    """Raise InputError, with its field, where two keys contradict each other."""
    if not config.run.strip():
        raise InputError("the run folder's name is empty", "run")
    config.method.check()
    config.domain.check()
    for field, reward in rewards(config):
        with blaming(field):
            reward.check_keys()
    if config.judge is not None:
        with blaming(f"{graph.JUDGE}.judge"):
            config.judge.judge.check_keys()
    for problems in (_models, _data, _evaluation, _judging, _cluster, _trainings):
        for field, problem in problems(config):
            raise InputError(problem, field)


def rewards(config: Config) -> list[tuple[str, Reward]]:
    """All rewards behind the sections where they stand; the one that is trained for comes first."""
    measure = config.measure
    further = [(f"measure.further.{name}", reward) for name, reward in measure.further.items()]
    own = [("measure.reward", measure.reward)] if measure.reward else []
    return [("reward", config.reward), *own, *further]


def _models(config: Config) -> Problems:
    """Models are named or made; behind a prompt, answers have room in the contexts of both."""
    policy, reward = config.policy, config.reward
    answers, fewest = config.sample.generations, len(config.method.levels)
    if (levels := config.method.rated) and reward.rates not in (None, levels):
        judged = f"needs a reward that rates answers in {levels} levels (reward.kind: judge)"
        yield "method.kind", judged
    elif config.method.reads_words and not reward.writes:
        yield "method.kind", "needs a reward that writes feedback (reward.kind: judge, form: lmu)"
    if fewest > answers:
        yield "sample.generations", f"{answers} generations cannot fill {fewest} quantiles"
    if policy.model is None and (config.sft is None or policy.base is None):
        yield "policy.model", "give policy.model, or policy.base and an sft section that trains it"
    trained = reward.to_train()
    for at, one in trained.items():
        if config.reward_model is None or "base" not in one.named():
            it = f"reward{at}"
            problem = f"give {it}.model, or {it}.base and a reward_model section that trains it"
            yield f"{it}.model", problem
    if len(trained) > 1:
        names = " and ".join(f"reward{at}" for at in trained)
        yield f"reward{[*trained][1]}.model", f"a run trains one reward model, not {names}"
    if reward.trained and config.data.comparisons is None:
        yield "data.comparisons", "needed to train the reward model"
    for field, one in rewards(config)[1:]:
        for at in one.to_train():
            yield f"{field}{at}.model", "give the model that measures"
    sampled, evaluated = config.sample.max_new_tokens, config.evaluated_tokens
    for section in ("policy", "reward"):
        most = getattr(getattr(config, section), "max_length", None)
        for stage, tokens in ((graph.SAMPLE, sampled), (graph.EVALUATE, evaluated)):
            if most is not None and most <= tokens:
                problem = f"no room for a prompt in {section}.max_length ({most})"
                yield f"{stage}.max_new_tokens", problem
    if evaluated > sampled:
        problem = f"{evaluated}, but rewards keep room for {sampled} (sample.max_new_tokens)"
        yield "evaluate.max_new_tokens", problem


def _data(config: Config) -> Problems:
    """Splits whose posts are left out are there, and others."""
    data = config.data
    sources = {"prompts": data.prompts, graph.SFT: data.sft, graph.COMPARISONS: data.comparisons}
    there = [
        f"{section}-{split}"
        for section, source in sources.items()
        for split in ("train", "valid", "test")
        if getattr(source, split, None)
    ]
    for section, source in sources.items():
        for number, name in enumerate(source.without if source else ()):
            field = f"data.{section}.without[{number}]"
            if name == f"{section}-train":
                yield field, f"{name} is this split itself"
            elif name not in there:
                yield field, f"no such split as {name} (there are: {', '.join(there)})"


def _evaluation(config: Config) -> Problems:
    evaluate, prompts, pair = config.evaluate, ("prompt", "label"), ("prompt", "chosen", "rejected")
    sources = [
        ("data.prompts", config.data.prompts, prompts),
        ("data.sft", config.data.sft, prompts),
        ("data.comparisons", config.data.comparisons, pair),
        *((f"evaluate.sets.{name}", held_out, prompts) for name, held_out in evaluate.sets.items()),
    ]
    for field, source, names in sources:
        for name in source.columns if source else ():
            if name not in names:
                yield f"{field}.columns.{name}", f"no such column (there are: {', '.join(names)})"
    if evaluate.test_prompts and config.data.prompts.test is None:
        yield "evaluate.test_prompts", "data.prompts.test names no test split"
    rows = (graph.OWN, graph.REFERENCES, graph.START, graph.BEST)
    named: list[tuple[str, Iterable[str], tuple[str, ...]]] = [
        ("evaluate.sets", evaluate.sets, ("train", graph.VALID, graph.TEST, graph.COMPARISONS)),
        ("evaluate.policies", evaluate.policies, rows),
        ("measure.further", config.measure.further, ("reward",)),
    ]
    for section, given, taken in named:
        for name in given:
            if name in taken or not name.isidentifier():
                yield f"{section}.{name}", f"'{name}' cannot be a name here: give another word"
    external = [name for name, policy in evaluate.policies.items() if isinstance(policy, External)]
    for name, policy in evaluate.policies.items():
        if isinstance(policy, BestOf):
            if policy.of not in (graph.START, *external):
                there = ", ".join((graph.START, *external))
                yield f"evaluate.policies.{name}.of", f"no such policy (there are: {there})"
        elif problem := config.domain.problem(policy.ask):
            yield f"evaluate.policies.{name}.ask", problem
    for name, held_out in evaluate.sets.items():
        if held_out.template.count("{prompt}") != 1:
            yield f"evaluate.sets.{name}.template", "must contain {prompt} once"
        if held_out.seed is not None and held_out.prompts is None:
            yield f"evaluate.sets.{name}.seed", "draws no rows: say how many (prompts)"
    yield from _published(config)


def _judging(config: Config) -> Problems:
    """A judge compares rows and a set that there are, and did not make the feedback itself."""
    judging, evaluate = config.judge, config.evaluate
    if judging is None:
        return
    references = [graph.REFERENCES] if evaluate.references else []
    rows = [graph.BEST, graph.START, *references, *evaluate.policies]
    for number, (a, b) in enumerate(judging.pairs or []):
        for name in (a, b):
            if name not in rows:
                there = f"no such row {name} (there are: {', '.join(rows)})"
                yield f"{graph.JUDGE}.pairs[{number}]", there
        if a == b:
            yield f"{graph.JUDGE}.pairs[{number}]", f"{a} is compared with itself"
    sets = evaluate.all_sets
    if config.judged_set not in sets:
        yield f"{graph.JUDGE}.set", f"no such set (there are: {', '.join(sets)})"
    if judging.iterations == "all" and config.judged_set != graph.VALID:
        problem = f"{config.judged_set} is evaluated at 0 and at the end, not after all iterations"
        yield f"{graph.JUDGE}.set", problem
    for at, reward in config.reward.singles().items():
        other = getattr(reward, graph.JUDGE, None)  # where a judge writes the feedback
        if isinstance(other, Judge) and other.who == judging.judge.who:
            problem = f"{judging.judge.model} makes the feedback (reward{at}.judge): take another"
            yield f"{graph.JUDGE}.judge.model", problem


def _published(config: Config) -> Problems:
    """Published figures are of sets and rows that there are."""
    published, evaluate = config.report.published, config.evaluate
    if published is None:
        return
    sets = evaluate.all_sets
    if published.set not in sets:
        yield "report.published.set", f"no such set (there are: {', '.join(sets)})"
    references = [graph.REFERENCES] if evaluate.references else []
    rows = [graph.START, "best", *references, *evaluate.policies]
    for name in published.rows:
        if name not in rows:
            yield f"report.published.rows.{name}", f"no such row (there are: {', '.join(rows)})"


def _cluster(config: Config) -> Problems:
    """No setting of a stage that would do nothing, or break the chain of jobs."""
    cluster, rows = config.cluster, {stage.key: stage for stage in graph.STAGES.values()}
    yield from _sbatch("cluster", cluster.sbatch)
    for key, asked in cluster.stages().items():
        row, field = rows.get(key), f"cluster.{key}"  # the controller is no stage
        if asked.nodes * asked.tasks_per_node > 1 and not (row and row.training):
            size = "nodes" if asked.nodes > 1 else "tasks_per_node"
            yield f"{field}.{size}", "one process makes a shard: ask for more shards"
        cut = row.cut if row else None
        if asked.shards > 1 and cut is None:
            yield f"{field}.shards", "this stage is not cut into shards"
        if cut and asked.shards not in (1, most := cluster.stage(cut).shards):
            yield f"{field}.shards", f"this stage has the shards of {cut} ({most})"
        yield from _sbatch(field, asked.sbatch)


def _sbatch(field: str, options: dict[str, SbatchValue]) -> Problems:
    for key, value in options.items():
        name = key.replace("_", "-")
        if name in _OUR_SBATCH and not (value is False and name in _LEFT_OUT):
            yield f"{field}.sbatch.{key}", "alt_hpc sets this option itself"


def _trainings(config: Config) -> Problems:
    for section, stage in graph.TRAININGS.items():
        training, asked = getattr(config, section), config.cluster.stage(stage.name)
        world, size = asked.nodes * asked.tasks_per_node, config.family
        if training is not None:
            with blaming(section):
                check_batches(training, world)
        lacks = isinstance(training, PolicyTraining) and not training.trains_embeddings
        if lacks and config.method.adds_tokens:
            problem = f"method.kind: {config.method.kind} learns its tokens by them"
            yield f"{section}.train_embeddings", problem
        if isinstance(training, PolicyTraining) and config.shares_prompts:
            batch, micro = training.global_batch, training.micro_batch
            if batch % (world * size) or micro % size:
                of = "of a prompt" if config.domain.is_behind else "with the same feedback"
                yield (
                    f"{section}.global_batch",
                    f"with train.share_prompts, {batch} sequences of {world} processes, {micro} at"
                    f" once, must be whole families of {size} (generations {of})",
                )
