"""From a config to a run that goes: check, freeze, then hand over to a controller or run here."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from alt_hpc import config as configs
from alt_hpc import controller, progress
from alt_hpc.clusters import QueueUnknown, SubmissionRefused, queue
from alt_hpc.clusters.local import Local
from alt_hpc.clusters.slurm import Slurm
from alt_hpc.config import Config
from alt_hpc.data import frozen, texts
from alt_hpc.errors import InputError, blaming
from alt_hpc.graph import STAGES
from alt_hpc.plan import Job
from alt_hpc.run import code
from alt_hpc.run.folder import RunFolder
from alt_hpc.run.journal import Submit

if TYPE_CHECKING:
    from transformers import PretrainedConfig


ZERO2: dict[str, object] = {  # configs/deepspeed/zero2.json, which an installation has not
    "zero_optimization": {
        "stage": 2,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": 50_000_000,
        "allgather_bucket_size": 50_000_000,
    },
    "data_types": {"grad_accum_dtype": "fp32"},
}


def submit(config: Config, wait: bool = False, accept_packages: bool = False) -> int:
    """Check a config, freeze its data and models, and queue the first controller on Slurm."""
    config = _on("slurm", config)
    slurm = _slurm()
    slurm.check(config.cluster)
    if set("%\\") & set(config.run):
        raise InputError(
            f"{config.run}: Slurm reads % and \\ in paths of logs; choose another", "run"
        )
    folder = prepare(config)
    controller.check_cluster(folder, slurm)
    _test_jobs(folder, slurm)
    waiting = slurm.controllers(controller.scripts(folder))
    if waiting:
        print(f"{folder.path}: goes on already (controller {', '.join(waiting)} is in the queue)")
        return progress.follow(folder) if wait else 0
    if accept_packages:
        code.accept_packages(folder)
    folder.reopen()
    who = os.environ.get("USER", str(os.getuid()))
    folder.journal.record(Submit(who=who, cluster=slurm.name()))
    try:
        if config.cluster.chain == "presubmitted":
            job = controller.presubmit(folder, slurm)
        else:
            job = controller.queue_controller(folder, slurm, "")
    except SubmissionRefused as error:
        raise InputError(f"Slurm refused the controller: {error}", "cluster.controller") from error
    print(
        f"submitted controller {job} of run {folder.path}\n"
        f"  squeue --me\n"
        f"  alt-hpc status {folder.path}\n"
        f"  tensorboard --logdir {folder.layout.tensorboard}"
    )
    return progress.follow(folder) if wait else 0


def _slurm() -> Slurm:
    try:
        slurm = Slurm()
        queue.mine()  # or slurmctld does not answer
        return slurm
    except QueueUnknown as error:
        raise InputError(f"Slurm does not answer: {error}") from error


def prepare(config: Config) -> RunFolder:
    """Everything that can be found wrong now is; then data and settings are frozen.

    Raises
    ------
    InputError
        One sentence; see `errors`.
    """
    config = absolute(config)
    folder = RunFolder.create(config)
    if folder.exists():
        folder.freeze(config, {}, {})
        return folder
    try:
        deepspeed = deepspeed_settings(config)
        frozen.freeze(config, folder)
        models = fetch_models(config)
        check_deepspeed(config, deepspeed)
        code.freeze(folder)
    except BaseException:
        folder.abandon()
        raise
    folder.freeze(config, models, deepspeed)
    return folder


def _on(backend: Literal["local", "slurm"], config: Config) -> Config:
    """The config with the backend that the command says."""
    return dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, backend=backend))


def absolute(config: Config) -> Config:
    """The run folder as an absolute path, so that jobs find it from anywhere."""
    try:
        place = Path(config.run).expanduser().absolute()
    except RuntimeError as error:
        raise InputError(f"{config.run}: {error}", "run") from error
    return dataclasses.replace(config, run=str(place))


def deepspeed_settings(config: Config) -> dict[str, dict[str, object]]:
    """The DeepSpeed JSONs that the config names: path -> content; "" stands for none."""
    found: dict[str, dict[str, object]] = {"": ZERO2}
    for name in configs.trainings():
        training = getattr(config, name)
        if training is not None and training.deepspeed is not None:
            found[training.deepspeed] = read_deepspeed(training.deepspeed, f"{name}.deepspeed")
    return found


def read_deepspeed(path: str, field: str) -> dict[str, object]:
    """A DeepSpeed JSON file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", field) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text", field) from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not valid JSON ({error.msg})", field) from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object", field)
    return value


def check_deepspeed(config: Config, settings: dict[str, dict[str, object]]) -> None:
    """Refuse now what the trainer would refuse in its job."""
    from alt_hpc import trainer  # imports torch

    for name in configs.trainings():
        training = getattr(config, name)
        if training is not None and training.deepspeed is not None:
            try:
                trainer.check_deepspeed_config(settings[training.deepspeed])
            except InputError as error:
                raise InputError(f"{training.deepspeed}: {error}", f"{name}.deepspeed") from error


def fetch_models(config: Config) -> dict[str, str]:
    """Local folders of all models that the config names, downloaded where needed."""
    from alt_hpc import models  # imports torch

    found: dict[str, str] = {}
    for field, get in (
        (_named(config, "policy"), models.fetch),
        (_named(config, "reward_model"), models.fetch),
        ("policy.tokenizer", models.fetch_light),
        ("reward_model.tokenizer", models.fetch_light),
        ("reward_model.base", models.fetch_light),
    ):
        section, _, key = field.partition(".")
        name = getattr(getattr(config, section), key)
        if name is not None and name not in found:
            with blaming(field):
                found[name] = str(get(name).absolute())
    _check_models(config, {name: Path(place) for name, place in found.items()})
    return found


def _named(config: Config, section: str) -> str:
    """The key that says which model a section begins with."""
    return f"{section}.model" if getattr(config, section).model else f"{section}.base"


def _check_models(config: Config, found: dict[str, Path]) -> None:
    """Every weight present and finite, every tokenizer there, before a job depends on it."""
    from alt_hpc import models, reward

    policy, judge = config.policy, config.reward_model
    start = found[policy.model or policy.base or ""]
    with blaming(_named(config, "policy")):
        models.check_weights(start)
        _check_context(config, models.load_config(start))
    with blaming("policy.tokenizer" if policy.tokenizer else _named(config, "policy")):
        models.load_tokenizer(found[policy.tokenizer] if policy.tokenizer else start)
    base = found[judge.base] if judge.base else None
    tokenizer = found[judge.tokenizer] if judge.tokenizer else None
    longest = max(config.sampling.max_new_tokens, config.evaluation.max_new_tokens)
    with blaming(_named(config, "reward_model")):
        if judge.model is None:
            assert base is not None
            reward.check_base(base, judge, max_new_tokens=longest, tokenizer=tokenizer)
            return
        place = found[judge.model]
        reward.check_reward_model(
            place, judge, max_new_tokens=longest, base=base, tokenizer=tokenizer
        )


def _check_context(config: Config, model: PretrainedConfig) -> None:
    """What the policy is to read and write fits into its context."""
    from alt_hpc import models

    asked = config.policy.max_length
    context = models.context_length(model, unknown=asked)
    if asked is not None and asked > context:
        raise InputError(f"{asked}, but the model reads {context} tokens", "policy.max_length")
    for field in ("sampling", "evaluation"):
        if getattr(config, field).max_new_tokens >= context:
            raise InputError(
                f"no room for a prompt: the model reads {context} tokens",
                f"{field}.max_new_tokens",
            )


def fetch(config: Config) -> None:
    """Models and data into the caches of this machine's home, for nodes without a network."""
    for name, place in fetch_models(config).items():
        print(f"{name}: {place}")
    for section in ("prompts", "comparisons"):
        source = getattr(config.data, section)
        for split in ("train", "valid", "test") if source else ():
            if getattr(source, split):
                rows = sum(1 for _ in texts.read(source, split, ("prompt",), f"data.{section}"))
                print(f"{source.path} {split}: {rows} rows")


def cancel(folder: RunFolder) -> int:
    """Cancel a run's jobs, controllers first; submitting again goes on from there.

    It looks again until it finds nothing more: a controller may have been at work.
    """
    slurm = _slurm()
    ended: set[str] = set()
    try:
        controller.check_cluster(folder, slurm)
        while found := _in_the_queue(folder, slurm) - ended:
            slurm.cancel(*dict.fromkeys(element.partition("_")[0] for element in sorted(found)))
            ended |= found
    except QueueUnknown as error:
        raise InputError(f"not known whether all was cancelled: {error}; try again") from error
    count = len(ended)
    if not count:
        print(f"{folder.path}: nothing was found to cancel")
        return 0
    folder.end("STOPPED", "cancelled; submit again to go on")
    tasks = "1 task" if count == 1 else f"{count} tasks"
    print(f"{folder.path}: {tasks} cancelled; submit again to go on")
    return 0


def _in_the_queue(folder: RunFolder, slurm: Slurm) -> set[str]:
    """Ids of a run's controllers and elements that have not ended."""
    controllers = slurm.controllers(controller.scripts(folder))
    return {*controllers, *(element.id for _, element in controller.looked(folder, slurm))}


def _test_jobs(folder: RunFolder, slurm: Slurm) -> None:
    """Let Slurm itself judge what each stage asks for, before anything is queued."""
    config = folder.config()
    made = {*folder.graph().stages(0), *folder.graph().stages(1)}
    for name, stage in STAGES.items():
        if name in made:
            request = controller.request(folder, config, Job(name, 1, 0, (0,)))
            slurm.test(request, f"cluster.{stage.key}")


# ---------------------------------------------------------------------- local


def run(config: Config, accept_packages: bool = False) -> int:
    """Run everything on this machine, with progress and the final table on stdout."""
    folder = prepare(_on("local", config))
    if accept_packages:
        code.accept_packages(folder)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        with folder.only_one():
            return _run(config, folder)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(config: Config, folder: RunFolder) -> int:
    folder.reopen()
    folder.journal.record(Submit(who=os.environ.get("USER", str(os.getuid()))))
    local = Local(config.cluster.slots)
    screen = progress.Screen(folder, local)
    try:
        while True:
            done = controller.step(folder, local)
            if done.plan.finished or done.plan.stop:
                break
            local.wait(done.waits, screen.tick)
            screen.ended(local)
    except KeyboardInterrupt:
        local.end_all()
        print(f"\nstopped; run the same command again to go on ({folder.path})", file=sys.stderr)
        return 130
    if done.plan.stop:
        local.end_all()
        sentence = f"stopped: {done.plan.stop}; logs are in {folder.layout.jobs}"
        folder.end("STOPPED", sentence)
        print(sentence, file=sys.stderr)
        return 1
    folder.end("FINISHED", controller.finish(done.plan))
    screen.summary()
    for why in done.plan.given_up.values():
        print(why, file=sys.stderr)
    return 0
