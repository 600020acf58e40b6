"""Rules between the keys of a config: values of the right type that still cannot be meant."""

from alt_hpc import graph
from alt_hpc.config.schema import Config, HeldOut, SbatchValue, Source
from alt_hpc.errors import InputError, blaming
from alt_hpc.graph import OWN, TEST, VALID
from alt_hpc.training.settings import PolicyTraining, Training, check_batches

_LEFT_OUT = ("requeue", "signal", "open-mode", "cpus-per-task")  # by false, where a site refuses
_OUR_SBATCH = [
    *("array", "cpus-per-task", "dependency", "error", "job-name", "nodes"),
    *("no-requeue", "ntasks", "ntasks-per-node", "open-mode", "output", "parsable", "requeue"),
    *("signal", "wait", "wrap"),
]
_TAKEN = {"sets": ("train", VALID, TEST), "policies": (OWN,)}  # names that mean something already


def check(config: Config) -> None:
    """Raise InputError, with its field, where two keys contradict each other."""
    if not config.run.strip():
        raise InputError("the run folder's name is empty", "run")
    config.method.check()
    config.domain.check()
    answers, fewest = config.sample.generations, len(config.method.levels)
    if fewest > answers:
        problem = f"{answers} generations cannot fill {fewest} quantiles"
        raise InputError(problem, "sample.generations")
    _check_models(config)
    _check_lengths(config)
    _check_columns(config)
    _check_evaluate(config)
    _check_cluster(config)
    for section, stage in trainings().items():
        training: Training | None = getattr(config, section)
        if training is not None:
            asked = config.cluster.stage(stage.name)
            with blaming(section):
                _check_training(config, training, asked.nodes * asked.tasks_per_node)


def trainings() -> dict[str, graph.Stage]:
    """The stages that optimise something, by the section that says how."""
    return {stage.key: stage for stage in graph.STAGES.values() if stage.training}


def _check_models(config: Config) -> None:
    policy, reward, measure = config.policy, config.reward, config.measure.reward
    if policy.model is None and (config.sft is None or policy.base is None):
        problem = "give policy.model, or policy.base and an sft section that trains it"
        raise InputError(problem, "policy.model")
    if reward.trained and (config.reward_model is None or "base" not in reward.named()):
        problem = "give reward.model, or reward.base and a reward_model section that trains it"
        raise InputError(problem, "reward.model")
    if reward.trained and config.data.comparisons is None:
        raise InputError("needed to train the reward model", "data.comparisons")
    if measure is not None and measure.trained:
        raise InputError("give the model that measures", "measure.reward.model")


def _check_lengths(config: Config) -> None:
    """Answers have room behind a prompt, in the policy's context and in the reward model's."""
    sampled, evaluated = config.sample.max_new_tokens, config.evaluated_tokens
    new = {"sample.max_new_tokens": sampled, "evaluate.max_new_tokens": evaluated}
    for section in ("policy", "reward"):
        most = getattr(getattr(config, section), "max_length", None)
        for field, tokens in new.items():
            if most is not None and most <= tokens:
                raise InputError(f"no room for a prompt in {section}.max_length ({most})", field)
    if evaluated > sampled:
        problem = f"{evaluated}, but rewards keep room for {sampled} (sample.max_new_tokens)"
        raise InputError(problem, "evaluate.max_new_tokens")


def _check_columns(config: Config) -> None:
    prompts, pair = ("prompt", "label"), ("prompt", "chosen", "rejected")
    given: dict[str, tuple[Source | HeldOut | None, tuple[str, ...]]] = {
        "data.prompts": (config.data.prompts, prompts),
        "data.comparisons": (config.data.comparisons, pair),
        **{f"evaluate.sets.{key}": (held, prompts) for key, held in config.evaluate.sets.items()},
    }
    for field, (source, names) in given.items():
        for name in source.columns if source else ():
            if name not in names:
                problem = f"no such column (there are: {', '.join(names)})"
                raise InputError(problem, f"{field}.columns.{name}")


def _check_evaluate(config: Config) -> None:
    evaluate = config.evaluate
    if evaluate.test_prompts and config.data.prompts.test is None:
        raise InputError("data.prompts.test names no test split", "evaluate.test_prompts")
    for key, taken in _TAKEN.items():
        for name in getattr(evaluate, key):
            if name in taken or not name.isidentifier():
                problem = f"'{name}' cannot be a name here: give another word"
                raise InputError(problem, f"evaluate.{key}.{name}")
    for name, policy in evaluate.policies.items():
        if policy.ask.count("{prompt}") != 1 or not policy.ask.endswith("{prompt}"):
            raise InputError("must hold {prompt} once, at its end", f"evaluate.policies.{name}.ask")


def _check_cluster(config: Config) -> None:
    """No setting of a stage that would do nothing, or break the chain of jobs."""
    cluster = config.cluster
    rows = {stage.key: stage for stage in graph.STAGES.values()}
    _check_sbatch("cluster", cluster.sbatch)
    for key, asked in cluster.stages().items():
        row, field = rows.get(key), f"cluster.{key}"  # the controller is no stage
        if asked.nodes * asked.tasks_per_node > 1 and not (row and row.training):
            size = "nodes" if asked.nodes > 1 else "tasks_per_node"
            raise InputError("one process makes a shard: ask for more shards", f"{field}.{size}")
        cut = row.cut if row else None
        if asked.shards > 1 and cut is None:
            raise InputError("this stage is not cut into shards", f"{field}.shards")
        if cut and cut != key and asked.shards not in (1, cluster.stage(cut).shards):
            problem = f"this stage has the shards of {cut} ({cluster.stage(cut).shards})"
            raise InputError(problem, f"{field}.shards")
        _check_sbatch(field, asked.sbatch)


def _check_sbatch(section: str, given: dict[str, SbatchValue]) -> None:
    for key, value in given.items():
        name = key.replace("_", "-")
        if name in _OUR_SBATCH and not (value is False and name in _LEFT_OUT):
            raise InputError("alt_hpc sets this option itself", f"{section}.sbatch.{key}")


def _check_training(config: Config, training: Training, world: int) -> None:
    check_batches(training, world)
    if isinstance(training, PolicyTraining) and training.share_prompts:
        batch, micro, size = training.global_batch, training.micro_batch, config.method.family
        if batch % (world * size) or micro % size:
            raise InputError(
                f"with train.share_prompts, {batch} sequences of {world} processes, {micro} at"
                f" once, must be whole families of {size} (generations with the same feedback)",
                ".global_batch",
            )
