"""What a run is: the YAML config as frozen dataclasses, read strictly (unknown keys are errors).

Everything outside `cluster`, `iterations`, `run` and `keep` decides content: it is *frozen* at
the first submission and fingerprinted (see `fingerprint`). The defaults are the paper's
(arXiv 2407.16970) unless a comment says otherwise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from alt_hpc import graph
from alt_hpc.errors import InputError, one_line

LARGEST = 2**31 - 1  # of whole numbers: what Slurm and every library take
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Policy:
    """The model that is aligned."""

    model: str | None = None  # hub name or folder; none: the `sft` stage makes it
    base: str | None = None  # what `sft` starts from
    tokenizer: str | None = None  # where the model's folder has none
    dtype: Dtype = "bfloat16"  # of sampling and evaluation
    max_length: int | None = None  # tokens of prompt + generation; default: the model's context
    dropout: float = 0.0  # while training


@dataclass(frozen=True)
class RewardModel:
    """The model that ranks generations: a sequence-classification folder or CarperAI's format."""

    model: str | None = None  # hub name or folder; none: the `reward-model` stage makes it
    base: str | None = (
        None  # architecture of a CarperAI checkpoint; what `reward-model` starts from
    )
    tokenizer: str | None = None
    template: str | None = None  # default: the checkpoint's kind decides (see reward.py)
    max_length: int = 550
    dtype: Dtype = "float32"


@dataclass(frozen=True)
class Source:
    """Rows of text: a hub data set, or a folder of JSONL/Parquet files named after the splits."""

    path: str
    train: str = "train"
    valid: str = "valid"
    test: str | None = None
    columns: dict[str, str] = field(default_factory=dict)  # our name -> the data set's
    limit: int | None = None  # rows kept of the train split
    valid_limit: int | None = None  # rows kept of the valid split


@dataclass(frozen=True)
class Data:
    """`prompts` has columns prompt and label (for SFT); `comparisons` prompt, chosen, rejected."""

    prompts: Source
    comparisons: Source | None = None


@dataclass(frozen=True)
class Sampling:
    """Drawing prompts and sampling generations (paper, section 4 and its model card)."""

    prompts: int = 2048  # N, drawn per iteration
    replacement: bool = True
    generations: int = 96  # G, per prompt
    temperature: float = 0.9
    top_p: float = 0.9
    max_new_tokens: int = 64
    group: int = 4  # prompts in a prompt group: the unit of batching (vLLM: so many in flight)
    engine: Literal["transformers", "vllm"] = "transformers"


@dataclass(frozen=True)
class Feedback:
    """The feedback texts, best first, and how generations are ranked into their quantiles."""

    quantiles: int = 5
    texts: list[str] = field(
        default_factory=lambda: ["Excellent.", "Good.", "Mediocre.", "Bad.", "Horrible."]
    )
    template: str = "{feedback} input: {prompt}"
    remainder: Literal["spread", "last"] = "spread"  # "last": the authors' code
    pool: Literal["prompt", "iteration"] = "prompt"  # "iteration": the original Quark
    per_quantile: int = 2  # generations kept of each quantile for training
    append_eos: bool = False  # the authors': EOS after unfinished generations that end in .?!


@dataclass(frozen=True)
class Training:
    """One optimisation: shared by `training`, `sft` and `reward_training`."""

    epochs: int = 2
    global_batch: int = 16  # sequences an optimiser step, whatever the number of processes
    micro_batch: int = 8  # sequences a process computes at once
    lr: float = 2e-5
    betas: list[float] = field(default_factory=lambda: [0.8, 0.999])
    eps: float = 1e-8
    weight_decay: float = 3e-7
    clip: float = 1.0
    warmup: float = 0.05  # share of all steps; then linear decay to 0
    entropy: float = 0.06  # coefficient of H in the loss (`training` alone)
    kl: float = 0.0  # coefficient of KL(reference || policy); the paper's KL variant: 0.05
    trained_blocks: float = 0.3  # top share of blocks that is trained; 1: all of them
    train_embeddings: bool = False  # the authors': true (see README, "Where it differs")
    share_prompts: bool = False  # `training`: a quantile's generations of a prompt in one row
    checkpoint_activations: bool = False  # compute them again in the backward pass: less memory
    precision: Dtype = "bfloat16"
    export_dtype: Dtype = "float32"  # the float32 master weights lose nothing between iterations
    deepspeed: str | None = None  # DeepSpeed JSON; none: as configs/deepspeed/zero2.json
    checkpoint_minutes: float = 15.0  # between DeepSpeed checkpoints
    head_only: bool = False  # `reward_training`: only the value head, on a frozen trunk
    max_length: int = 1024  # `sft`: tokens of a training sequence


@dataclass(frozen=True)
class Evaluation:
    """Greedy generations for held-out prompts, conditioned on quantile 0 and on the last one."""

    prompts: int | None = None  # rows of the valid split (none: all)
    test_prompts: int | None = None  # rows of the test split, evaluated at 0 and at the end
    max_new_tokens: int = 64
    group: int = 16


@dataclass(frozen=True)
class StageCluster:
    """What one stage asks of the cluster; `None` takes the cluster-wide setting."""

    shards: int = 1
    nodes: int = 1
    tasks_per_node: int = 1  # `train`, `sft`, `reward_model`: one process per GPU
    gpus: int = 0  # per task
    cpus: int | None = None  # per task; default: `threads`
    mem_gb: float | None = None  # per node
    minutes: int | None = None
    partition: str | None = None
    parallel: int = 256  # array elements that may run at once
    python: str | None = None  # another environment's interpreter
    container: str | None = None  # image for srun --container-image (pyxis)
    # any further sbatch option; false leaves out one that we would set
    sbatch: dict[str, str | int | bool] = field(default_factory=dict)


@dataclass(frozen=True)
class _Cluster:
    """Where and how jobs run. Free: it may change whenever a run is submitted again.

    `Cluster` has a key for each stage beside these.
    """

    backend: Literal["local", "slurm"] = "local"
    slots: int = 1  # local: tasks at once
    max_attempts: int = 3
    chain: Literal["controller", "presubmitted"] = "controller"  # the latter: nodes have no sbatch
    kill_invalid_dependencies: bool = True  # false where a site asks not to use that option
    hung_minutes: float = 60.0  # a task without progress for so long ends itself
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    minutes: int = 60
    sbatch: dict[str, str | int | bool] = field(default_factory=dict)
    controller: StageCluster = field(default_factory=StageCluster)

    def stage(self, name: str) -> StageCluster:
        """Settings of a stage by its name (`reward-model` is the key `reward_model`)."""
        settings: StageCluster = getattr(self, graph.STAGES[name].key)
        return settings

    def stages(self) -> dict[str, StageCluster]:
        """Settings of the controller and of every stage, by their keys."""
        keys = ["controller", *(stage.key for stage in graph.STAGES.values())]
        return {key: getattr(self, key) for key in keys}


if typing.TYPE_CHECKING:
    Cluster = _Cluster
else:
    Cluster = dataclasses.make_dataclass(
        "Cluster",
        [(s.key, StageCluster, field(default_factory=StageCluster)) for s in graph.STAGES.values()],
        bases=(_Cluster,),
        frozen=True,
    )


@dataclass(frozen=True)
class Config:
    """A whole run."""

    run: str  # the run folder
    policy: Policy
    data: Data
    seed: int = 0
    iterations: int = 10
    threads: int = 1  # CPU threads of a task: part of what decides content bit for bit
    reward_model: RewardModel = field(default_factory=RewardModel)
    sampling: Sampling = field(default_factory=Sampling)
    feedback: Feedback = field(default_factory=Feedback)
    training: Training = field(default_factory=Training)
    sft: Training | None = None
    reward_training: Training | None = None
    evaluation: Evaluation = field(default_factory=Evaluation)
    keep: int = 2  # last policies kept on disk, beside the best one and any still in use
    cluster: Cluster = field(default_factory=Cluster)

    FREE: typing.ClassVar[tuple[str, ...]] = ("run", "iterations", "keep", "cluster")

    def frozen(self) -> dict[str, Any]:
        """What decides content, as plain JSON values."""
        values = dataclasses.asdict(self)
        return {key: value for key, value in values.items() if key not in self.FREE}

    def fingerprint(self) -> str:
        """sha256 (hex) of `frozen`."""
        return digest(self.frozen())


def digest(value: Any) -> str:
    """sha256 (hex) of a JSON value in its canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def load(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML config and apply `key.sub=value` overrides.

    Raises
    ------
    InputError
        Unreadable file, YAML error, unknown or doubled key, wrong type, impossible value: with
        file, line and field.
    """
    reader, root = _read(path, overrides)
    config: Config = reader.build(Config, root, "")
    _check(config, reader)
    return config


def located(error: InputError, path: str | Path, overrides: typing.Sequence[str]) -> InputError:
    """An error found after loading, with the file and line where its field stands."""
    if not error.field:
        return error
    reader, root = _read(path, overrides)
    reader.build(Config, root, "")
    return reader.error(error.field, error.problem)


def _read(path: str | Path, overrides: typing.Sequence[str]) -> tuple[_Reader, yaml.Node]:
    """The config's YAML tree with the overrides in it."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise InputError(f"{path}: cannot read the config ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: the config is not UTF-8 text") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InputError(f"{path}:{line}: not valid YAML: {error.reason}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or "unreadable"
        raise InputError(f"{where}: not valid YAML: {problem}") from error
    except RecursionError as error:
        raise InputError(f"{path}: not valid YAML: nested too deeply") from error
    if root is None:
        raise InputError(f"{path}: the config is empty")
    for override in overrides:
        root = _override(root, override)
    return _Reader(str(path)), root


def from_json(values: dict[str, Any], name: str) -> Config:
    """The config of a run folder (in a file of this name), which `load` has checked before."""
    config: Config = _Reader(name).build(Config, _json_node(values), "")
    return config


def _json_node(value: Any) -> yaml.Node:
    """A JSON value as a YAML tree. Not through text: YAML reads "\\ud83d\\ude00" as two halves."""
    if isinstance(value, dict):
        pairs = [(_json_node(key), _json_node(child)) for key, child in value.items()]
        return yaml.MappingNode("tag:yaml.org,2002:map", pairs)
    if isinstance(value, list):
        return yaml.SequenceNode("tag:yaml.org,2002:seq", [_json_node(child) for child in value])
    if isinstance(value, str):
        return yaml.ScalarNode("tag:yaml.org,2002:str", value)
    kinds = {type(None): "null", bool: "bool", int: "int", float: "float"}
    return yaml.ScalarNode(f"tag:yaml.org,2002:{kinds[type(value)]}", json.dumps(value))


def _override(root: yaml.Node, override: str) -> yaml.Node:
    """Set one `a.b=value` in a YAML tree; the value is YAML itself."""
    name, equals, text = override.partition("=")
    if not equals or not name or not isinstance(root, yaml.MappingNode):
        raise InputError(f"--set {override}: expected key=value")
    try:
        value = yaml.compose(text, Loader=yaml.SafeLoader) if text.strip() else None
    except yaml.YAMLError as error:
        raise InputError(f"--set {override}: the value is not valid YAML") from error
    value = value or yaml.ScalarNode("tag:yaml.org,2002:null", "null")
    _mark(value, f"--set {name}")
    node = root
    *parents, last = name.split(".")
    for key in parents:
        child = next((v for k, v in node.value if k.value == key), None)
        if not isinstance(child, yaml.MappingNode):
            node.value = [pair for pair in node.value if pair[0].value != key]
            child = yaml.MappingNode("tag:yaml.org,2002:map", [])
            _mark(child, f"--set {name}")
            node.value.append((_key_node(key, f"--set {name}"), child))
        node = child
    node.value = [pair for pair in node.value if pair[0].value != last]
    node.value.append((_key_node(last, f"--set {name}"), value))
    return root


def _key_node(key: str, origin: str) -> yaml.ScalarNode:
    node = yaml.ScalarNode("tag:yaml.org,2002:str", key)
    _mark(node, origin)
    return node


def _mark(node: yaml.Node, origin: str) -> None:
    """Make errors in an override name the override instead of a line of the file."""
    node.origin = origin  # type: ignore[attr-defined]
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _mark(child, origin)
    if isinstance(node, yaml.MappingNode):
        for key, child in node.value:
            _mark(key, origin)
            _mark(child, origin)


class _Reader:
    """Builds dataclasses from a YAML node tree, remembering where each field stands."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.nodes: dict[str, yaml.Node] = {}

    def error(self, name: str, problem: str, node: yaml.Node | None = None) -> InputError:
        """An error at a field, or at the nearest parent that the file spells out."""
        at, parent = node, name
        while at is None and parent:
            at = self.nodes.get(parent)
            parent = parent.rpartition(".")[0]
        origin = getattr(at, "origin", None)
        if origin:
            return InputError(f"{origin}: {problem}")
        line = f":{at.start_mark.line + 1}" if at is not None and at.start_mark else ""
        return InputError(
            f"{self.path}{line}: {name}: {problem}" if name else f"{self.path}{line}: {problem}"
        )

    def build(self, cls: type, node: yaml.Node, name: str) -> Any:
        if not isinstance(node, yaml.MappingNode):
            raise self.error(name, "expected a mapping of keys to values", node)
        hints = typing.get_type_hints(cls)
        fields = {f.name: f for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "(not a word)"
            full = f"{name}.{key}" if name else key
            if key not in fields:
                near = difflib.get_close_matches(key, fields, n=1, cutoff=0)
                hint = f"; the nearest valid key is '{near[0]}'" if near else ""
                raise self.error(full, f"unknown key '{key}'{hint}", key_node)
            if key in values:
                raise self.error(full, f"key '{key}' is given twice", key_node)
            self.nodes[full] = value_node
            values[key] = self.value(hints[key], value_node, full)
        for key, f in fields.items():
            if key in values:
                continue
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                full = f"{name}.{key}" if name else key
                raise self.error(full, f"the key '{key}' is missing", node)
        return cls(**values)

    def value(self, hint: Any, node: yaml.Node, name: str) -> Any:
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if origin in (typing.Union, types.UnionType):
            return self._union(args, node, name)
        if origin is Literal:
            return self._literal(args, node, name)
        if origin is list:
            if not isinstance(node, yaml.SequenceNode):
                raise self.error(name, "expected a list", node)
            return [self.value(args[0], n, f"{name}[{i}]") for i, n in enumerate(node.value)]
        if origin is dict:
            if not isinstance(node, yaml.MappingNode):
                raise self.error(name, "expected a mapping of keys to values", node)
            return self._mapping(args[1], node, name)
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            return self.build(hint, node, name)
        return self._scalar(hint, node, name)

    def _mapping(self, hint: Any, node: yaml.MappingNode, name: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or not key:
                raise self.error(name, "expected a word as key", key_node)
            if key in values:
                raise self.error(f"{name}.{key}", f"key '{key}' is given twice", key_node)
            self._check_text(key, key_node, f"{name}.{one_line(key)}")
            self.nodes[f"{name}.{key}"] = value_node
            values[key] = self.value(hint, value_node, f"{name}.{key}")
        return values

    def _union(self, args: tuple[Any, ...], node: yaml.Node, name: str) -> Any:
        kinds = [a for a in args if a is not type(None)]
        plain = self._plain(node) if isinstance(node, yaml.ScalarNode) else ...
        if plain is None and type(None) in args:
            return None
        for kind in kinds:
            if kind in (str, int, float, bool) and type(plain) is kind:
                return self._scalar(kind, node, name)
        return self.value(kinds[0], node, name)

    def _literal(self, choices: tuple[Any, ...], node: yaml.Node, name: str) -> Any:
        plain = self._plain(node) if isinstance(node, yaml.ScalarNode) else None
        if plain not in choices:
            near = difflib.get_close_matches(str(plain), choices, n=1, cutoff=0)
            words = ", ".join(choices)
            raise self.error(name, f"expected one of {words} (nearest: {near[0]})", node)
        return plain

    def _scalar(self, kind: Any, node: yaml.Node, name: str) -> Any:
        words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
        plain: Any = self._plain(node) if isinstance(node, yaml.ScalarNode) else None
        if kind is float and type(plain) in (int, str):  # YAML 1.1 reads 2e-5 as a text
            with contextlib.suppress(ValueError, OverflowError):
                plain = float(plain)
        if type(plain) is not kind or (kind is float and not math.isfinite(plain)):
            given = node.value if isinstance(node, yaml.ScalarNode) else "a list or mapping"
            short = given if len(given) <= 60 else given[:60] + "..."
            raise self.error(name, f"expected {words[kind]}, not '{one_line(short)}'", node)
        if kind is int and abs(plain) > LARGEST:
            raise self.error(name, f"{plain} is too large (at most {LARGEST})", node)
        if kind is str:
            self._check_text(plain, node, name)
        return plain

    def _check_text(self, text: str, node: yaml.Node, name: str) -> None:
        """No text may hold NUL or half a character; what reaches Slurm must be one plain line."""
        if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
            raise self.error(name, "the text holds a character that no file can hold", node)
        slurm = name == "run" or name.startswith("cluster.")
        if slurm and not text.isprintable():
            raise self.error(name, "the text holds a line break or control character", node)

    @staticmethod
    def _plain(node: yaml.ScalarNode) -> Any:
        loader = yaml.SafeLoader("")
        try:
            value = loader.construct_object(node, deep=True)
            if isinstance(value, int | float) and ":" in node.value:
                return node.value  # YAML 1.1 reads 1:30:00 as 5400
            return value
        except (yaml.YAMLError, ValueError):  # such as an unknown !tag or an impossible date
            return ...


def _check(config: Config, reader: _Reader) -> None:
    """Values that are of the right type and still cannot be meant."""
    _check_numbers(config, reader)
    _check_data(config, reader)
    _check_cluster(config, reader)
    if not config.run.strip():
        raise reader.error("run", "the run folder's name is empty")
    feedback = config.feedback
    if len(feedback.texts) != feedback.quantiles:
        raise reader.error(
            "feedback.texts",
            f"{len(feedback.texts)} feedback texts for {feedback.quantiles} quantiles",
        )
    if len(set(feedback.texts)) != len(feedback.texts):
        raise reader.error("feedback.texts", "the feedback texts must differ from one another")
    for i, text in enumerate(feedback.texts):
        if not text.strip():
            raise reader.error(f"feedback.texts[{i}]", "the feedback text is empty")
    for part in ("{feedback}", "{prompt}"):
        if feedback.template.count(part) != 1:
            raise reader.error("feedback.template", f"must contain {part} once")
    if not feedback.template.endswith("{prompt}"):  # the generation continues the prompt
        raise reader.error("feedback.template", "must end in {prompt}")
    if config.policy.model is None and (config.sft is None or config.policy.base is None):
        raise reader.error(
            "policy.model", "give policy.model, or policy.base and an sft section that trains it"
        )
    if config.reward_model.model is None:
        if config.reward_training is None or config.reward_model.base is None:
            raise reader.error(
                "reward_model.model",
                "give reward_model.model, or reward_model.base and a reward_training section",
            )
        if config.data.comparisons is None:
            raise reader.error("data.comparisons", "needed to train the reward model")
    if feedback.quantiles > config.sampling.generations:
        raise reader.error(
            "sampling.generations",
            f"{config.sampling.generations} generations cannot fill {feedback.quantiles} quantiles",
        )
    for section, stage in trainings().items():
        training: Training | None = getattr(config, section)
        if training is not None:
            _check_training(config, reader, section, training, stage.name)


def _check_data(config: Config, reader: _Reader) -> None:
    known = {"prompts": ("prompt", "label"), "comparisons": ("prompt", "chosen", "rejected")}
    for section, names in known.items():
        source: Source | None = getattr(config.data, section)
        for name in source.columns if source else ():
            if name not in names:
                where = f"data.{section}.columns.{name}"
                raise reader.error(where, f"no such column (there are: {', '.join(names)})")
    if config.evaluation.test_prompts and config.data.prompts.test is None:
        raise reader.error("evaluation.test_prompts", "data.prompts.test names no test split")


def trainings() -> dict[str, graph.Stage]:
    """The stages that optimise something, by the section that says how."""
    return {stage.training: stage for stage in graph.STAGES.values() if stage.training}


_LEFT_OUT = ("requeue", "signal", "open-mode", "cpus-per-task")  # by false, where a site refuses
_OUR_SBATCH = [
    *("array", "cpus-per-task", "dependency", "error", "job-name", "nodes"),
    *("no-requeue", "ntasks", "ntasks-per-node", "open-mode", "output", "parsable", "requeue"),
    *("signal", "wait", "wrap"),
]


def _check_cluster(config: Config, reader: _Reader) -> None:
    """No setting of a stage that would do nothing, or break the chain of jobs."""
    cluster = config.cluster
    for key, settings in cluster.stages().items():
        stage = next((s for s in graph.STAGES.values() if s.key == key), None)
        field = f"cluster.{key}"
        many = stage is not None and stage.training is not None
        if settings.nodes * settings.tasks_per_node > 1 and not many:
            size = "nodes" if settings.nodes > 1 else "tasks_per_node"
            raise reader.error(f"{field}.{size}", "one process makes a shard: ask for more shards")
        cut = stage.cut if stage else None
        if settings.shards > 1 and cut is None:
            raise reader.error(f"{field}.shards", "this stage is not cut into shards")
        if cut and cut != key and settings.shards not in (1, cluster.stage(cut).shards):
            problem = f"this stage has the shards of {cut} ({cluster.stage(cut).shards})"
            raise reader.error(f"{field}.shards", problem)
    options = {"cluster": cluster.sbatch}
    options |= {f"cluster.{key}": settings.sbatch for key, settings in cluster.stages().items()}
    for section, given in options.items():
        for key, value in given.items():
            name = key.replace("_", "-")
            if name in _OUR_SBATCH and not (value is False and name in _LEFT_OUT):
                raise reader.error(f"{section}.sbatch.{key}", "alt_hpc sets this option itself")


_ONLY_IN = {  # keys of one kind of training alone
    "head_only": "reward_training",
    "entropy": "training",
    "kl": "training",
    "share_prompts": "training",
    "max_length": "sft",
}


def _check_training(
    config: Config, reader: _Reader, name: str, training: Training, stage: str
) -> None:
    for key, section in _ONLY_IN.items():
        if section != name and getattr(training, key) != getattr(Training(), key):
            raise reader.error(f"{name}.{key}", f"has no effect here (only in {section})")
    asked, key = config.cluster.stage(stage), graph.STAGES[stage].key
    world = asked.nodes * asked.tasks_per_node
    if training.global_batch % world:
        raise reader.error(
            f"{name}.global_batch",
            f"{training.global_batch} sequences cannot be divided among {world} processes"
            f" (cluster.{key}: {asked.nodes} nodes x {asked.tasks_per_node} tasks)",
            reader.nodes.get(f"{name}.global_batch") or reader.nodes.get(f"cluster.{key}"),
        )
    if name == "training" and training.share_prompts:
        size = config.feedback.per_quantile
        if training.global_batch % (world * size) or training.micro_batch % size:
            raise reader.error(
                f"{name}.global_batch",
                f"with training.share_prompts, {training.global_batch} sequences of {world}"
                f" processes, {training.micro_batch} at once, must be whole families of {size}"
                " (feedback.per_quantile)",
            )
    share = training.global_batch // world
    if share % min(training.micro_batch, share):
        raise reader.error(
            f"{name}.micro_batch",
            f"{share} sequences of a process cannot be divided into micro-batches"
            f" of {training.micro_batch}",
        )
    if len(training.betas) != 2:
        raise reader.error(f"{name}.betas", "expected two numbers")


_RANGES: list[tuple[str, Callable[[float], bool], str]] = [
    (
        "at least 1",
        lambda value: value >= 1,
        "iterations threads keep policy.max_length reward_model.max_length"
        " data.prompts.limit data.prompts.valid_limit"
        " data.comparisons.limit data.comparisons.valid_limit"
        " sampling.prompts sampling.generations sampling.max_new_tokens sampling.group"
        " evaluation.prompts evaluation.test_prompts evaluation.max_new_tokens evaluation.group"
        " feedback.per_quantile cluster.slots cluster.max_attempts cluster.minutes"
        " TRAINING.epochs TRAINING.global_batch TRAINING.micro_batch TRAINING.max_length"
        " STAGE.shards STAGE.nodes STAGE.tasks_per_node STAGE.parallel STAGE.cpus STAGE.minutes",
    ),
    ("at least 2", lambda value: value >= 2, "feedback.quantiles"),
    (
        "at least 0",
        lambda value: value >= 0,
        "seed TRAINING.weight_decay TRAINING.entropy TRAINING.kl TRAINING.checkpoint_minutes"
        " STAGE.gpus",
    ),
    (
        "more than 0",
        lambda value: value > 0,
        "sampling.temperature TRAINING.lr TRAINING.eps TRAINING.clip STAGE.mem_gb"
        " cluster.hung_minutes",
    ),
    (
        "a share above 0 and at most 1",
        lambda value: 0 < value <= 1,
        "sampling.top_p TRAINING.trained_blocks",
    ),
    ("a share from 0 to 1", lambda value: 0 <= value <= 1, "TRAINING.warmup"),
    ("at least 0 and less than 1", lambda value: 0 <= value < 1, "policy.dropout TRAINING.betas"),
]


def _check_numbers(config: Config, reader: _Reader) -> None:
    for words, holds, names in _RANGES:
        for name in names.split():
            for full in _spelled_out(name):
                given = _get(config, full)
                many = given if isinstance(given, list) else [given]
                for value in many:
                    if value is not None and not holds(value):
                        raise reader.error(full, f"expected {words}, not {value}")
    for room in ("policy.max_length", "reward_model.max_length"):
        longest = _get(config, room)
        for new in ("sampling.max_new_tokens", "evaluation.max_new_tokens"):
            if longest is not None and longest <= _get(config, new):
                raise reader.error(new, f"no room for a prompt in {room} ({longest})")


def _spelled_out(name: str) -> list[str]:
    """TRAINING and STAGE stand for each section of that kind."""
    kind, _, key = name.partition(".")
    keys = ["controller", *(stage.key for stage in graph.STAGES.values())]
    sections = {"TRAINING": [*trainings()], "STAGE": [f"cluster.{key}" for key in keys]}
    return [f"{section}.{key}" for section in sections[kind]] if kind in sections else [name]


def _get(config: Config, name: str) -> Any:
    """The value of a dotted name; None in a section that is absent."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part, None)
    return value
