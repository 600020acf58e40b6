"""Rules between the keys of a config: values of the right type that still cannot be meant."""

from __future__ import annotations

from typing import Any

from alt_hpc import graph
from alt_hpc.config.schema import Config, Source
from alt_hpc.errors import InputError, blaming
from alt_hpc.graph import OWN, TEST, VALID
from alt_hpc.training.settings import PolicyTraining, Training, check_batches

_LEFT_OUT = ("requeue", "signal", "open-mode", "cpus-per-task")  # by false, where a site refuses
_OUR_SBATCH = [
    *("array", "cpus-per-task", "dependency", "error", "job-name", "nodes"),
    *("no-requeue", "ntasks", "ntasks-per-node", "open-mode", "output", "parsable", "requeue"),
    *("signal", "wait", "wrap"),
]


def check(config: Config) -> None:
    """Raise InputError, with its field, where two keys contradict each other."""
    if not config.run.strip():
        raise InputError("the run folder's name is empty", "run")
    _check_method(config)
    _check_models(config)
    _check_lengths(config)
    _check_data(config)
    _check_evaluate(config)
    _check_cluster(config)
    for section, stage in trainings().items():
        training: Training | None = getattr(config, section)
        if training is not None:
            _check_training(config, section, training, stage.name)


def trainings() -> dict[str, graph.Stage]:
    """The stages that optimise something, by the section that says how."""
    return {stage.key: stage for stage in graph.STAGES.values() if stage.training}


def _check_method(config: Config) -> None:
    """What the method's own file refuses, and what it asks of sampling."""
    config.method.check()
    config.domain.check()
    fewest = config.method.fewest
    if fewest > config.sample.generations:
        raise InputError(
            f"{config.sample.generations} generations cannot fill {fewest} quantiles",
            "sample.generations",
        )


def _check_models(config: Config) -> None:
    if config.policy.model is None and (config.sft is None or config.policy.base is None):
        raise InputError(
            "give policy.model, or policy.base and an sft section that trains it", "policy.model"
        )
    if config.reward.trained:
        if config.reward_model is None or "base" not in config.reward.named():
            raise InputError(
                "give reward.model, or reward.base and a reward_model section that trains it",
                "reward.model",
            )
        if config.data.comparisons is None:
            raise InputError("needed to train the reward model", "data.comparisons")
    if config.measure.reward is not None and config.measure.reward.trained:
        raise InputError("give the model that measures", "measure.reward.model")


def _check_lengths(config: Config) -> None:
    """Answers have room behind a prompt, in the policy's context and in the reward model's."""
    new = {
        "sample.max_new_tokens": config.sample.max_new_tokens,
        "evaluate.max_new_tokens": config.evaluated_tokens,
    }
    longest = {"policy.max_length": config.policy.max_length}
    longest["reward.max_length"] = getattr(config.reward, "max_length", None)
    for room, most in longest.items():
        for field, tokens in new.items():
            if most is not None and most <= tokens:
                raise InputError(f"no room for a prompt in {room} ({most})", field)
    if config.evaluated_tokens > config.sample.max_new_tokens:
        raise InputError(
            f"{config.evaluated_tokens}, but rewards keep room for"
            f" {config.sample.max_new_tokens} (sample.max_new_tokens)",
            "evaluate.max_new_tokens",
        )


def _check_data(config: Config) -> None:
    columns = {"prompts": ("prompt", "label"), "comparisons": ("prompt", "chosen", "rejected")}
    for section, names in columns.items():
        source: Source | None = getattr(config.data, section)
        _check_columns(f"data.{section}", source.columns if source else {}, names)
    for name, held_out in config.evaluate.sets.items():
        _check_columns(f"evaluate.sets.{name}", held_out.columns, columns["prompts"])


def _check_columns(field: str, given: dict[str, str], names: tuple[str, ...]) -> None:
    for name in given:
        if name not in names:
            problem = f"no such column (there are: {', '.join(names)})"
            raise InputError(problem, f"{field}.columns.{name}")


def _check_evaluate(config: Config) -> None:
    evaluate = config.evaluate
    if evaluate.test_prompts and config.data.prompts.test is None:
        raise InputError("data.prompts.test names no test split", "evaluate.test_prompts")
    for kind, names, taken in (
        ("sets", evaluate.sets, ("train", VALID, TEST)),
        ("policies", evaluate.policies, (OWN,)),
    ):
        for name in names:
            if name in taken or not name.isidentifier():
                problem = f"'{name}' cannot be a name here: give another word"
                raise InputError(problem, f"evaluate.{kind}.{name}")
    for name, policy in evaluate.policies.items():
        if policy.ask.count("{prompt}") != 1 or not policy.ask.endswith("{prompt}"):
            raise InputError("must hold {prompt} once, at its end", f"evaluate.policies.{name}.ask")


def _check_cluster(config: Config) -> None:
    """No setting of a stage that would do nothing, or break the chain of jobs."""
    cluster = config.cluster
    for key, settings in cluster.stages().items():
        stage = next((s for s in graph.STAGES.values() if s.key == key), None)
        field = f"cluster.{key}"
        many = stage is not None and stage.training
        if settings.nodes * settings.tasks_per_node > 1 and not many:
            size = "nodes" if settings.nodes > 1 else "tasks_per_node"
            raise InputError("one process makes a shard: ask for more shards", f"{field}.{size}")
        cut = stage.cut if stage else None
        if settings.shards > 1 and cut is None:
            raise InputError("this stage is not cut into shards", f"{field}.shards")
        if cut and cut != key and settings.shards not in (1, cluster.stage(cut).shards):
            problem = f"this stage has the shards of {cut} ({cluster.stage(cut).shards})"
            raise InputError(problem, f"{field}.shards")
    options: dict[str, Any] = {"cluster": cluster.sbatch}
    options |= {f"cluster.{key}": settings.sbatch for key, settings in cluster.stages().items()}
    for section, given in options.items():
        for key, value in given.items():
            name = key.replace("_", "-")
            if name in _OUR_SBATCH and not (value is False and name in _LEFT_OUT):
                raise InputError("alt_hpc sets this option itself", f"{section}.sbatch.{key}")


def _check_training(config: Config, name: str, training: Training, stage: str) -> None:
    asked = config.cluster.stage(stage)
    world = asked.nodes * asked.tasks_per_node
    with blaming(name):
        check_batches(training, world)
    if isinstance(training, PolicyTraining) and training.share_prompts:
        size = config.method.family
        if training.global_batch % (world * size) or training.micro_batch % size:
            raise InputError(
                f"with train.share_prompts, {training.global_batch} sequences of {world}"
                f" processes, {training.micro_batch} at once, must be whole families of {size}"
                " (generations with the same feedback)",
                f"{name}.global_batch",
            )
