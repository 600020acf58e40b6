"""The sections of a config, their keys, ranges and defaults (the paper's, arXiv 2407.16970)."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, create_model, model_validator

from alt_hpc import graph
from alt_hpc.config.sources import Data, HeldOut
from alt_hpc.domains import DOMAINS, Domain
from alt_hpc.engines import ENGINES, Engine
from alt_hpc.judges import AnyJudge, Judge
from alt_hpc.methods import METHODS, Method
from alt_hpc.rewards import REWARDS, AnyReward, Reward
from alt_hpc.settings import (
    KIND,
    LARGEST,
    BelowOne,
    Count,
    Dtype,
    Natural,
    Number,
    Positive,
    Settings,
    Share,
    digest,
    key,
    one_of,
)
from alt_hpc.training.settings import PolicyTraining, RewardModelTraining, Sft

# What may change when a run is submitted again: no training depends on it.
_SIDE = (graph.EVALUATE, graph.MEASURE, graph.JUDGE, graph.REPORT)
FREE = ("run", "start_from", "iterations", "keep", "cluster", *_SIDE)
SbatchValue = str | int | bool

if not TYPE_CHECKING:  # what pydantic reads: a section is one of its kinds
    Domain, Method = one_of(DOMAINS, "tldr"), one_of(METHODS, "words")
    Reward, Engine, Judge = AnyReward, one_of(ENGINES, "exact"), AnyJudge


class Policy(Settings):
    """The model that is aligned."""

    model: str | None = key(None, "Hub name or folder; none: the `sft` stage makes it.")
    base: str | None = key(None, "What `sft` starts from.")
    tokenizer: str | None = key(None, "Where the model's folder has none.")
    dtype: Dtype = key("bfloat16", "Of sampling and evaluation.")
    max_length: Count | None = None
    """Tokens of prompt + generation; default: the model's context."""
    dropout: BelowOne = key(0.0, "While training.")


class Sample(Settings):
    """Drawing prompts and sampling generations (paper, section 4 and its model card)."""

    prompts: Count = key(2048, "N, drawn per iteration.")
    replacement: bool = True
    generations: Count = key(96, "G, per prompt.")
    temperature: Positive = 0.9
    top_p: Share = 0.9
    max_new_tokens: Count = 64
    group: Count = 4
    """Prompts in a prompt group: the unit of batching (vLLM: so many in flight)."""


class External(Settings):
    """A policy that the run did not make, evaluated beside its own."""

    model: str
    tokenizer: str | None = key(None, "Where the model's folder has none.")
    ask: str = key("{prompt}", "How it is asked.")


class BestOf(Settings):
    """The best of several answers of a policy, sampled as `sample` does: what `reward` picks."""

    best_of: Annotated[int, Field(ge=2, le=LARGEST)]
    of: str = key(graph.START, "Another of these policies, asked as it is; or the starting policy.")


def _sort(value: Any) -> str:
    """What tells the two sorts of policies apart that a run did not make."""
    given = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    return KIND + ("best_of" if "best_of" in given else "model")


class Drawn(Settings):
    """Answers to valid posts that are sampled as `sample` does: what the words' diagnosis reads.

    Of the starting policy plainly, the same set for every policy; of the others half for the best
    feedback, half for the worst.
    """

    posts: Natural = key(200, "The first so many; 0: no diagnosis.")
    answers: Annotated[int, Field(ge=2, multiple_of=2)] = key(16, "To each, an even number.")


if TYPE_CHECKING:
    Other = External | BestOf
else:  # what pydantic reads
    _named, _best = (
        Annotated[External, Tag(f"{KIND}model")],
        Annotated[BestOf, Tag(f"{KIND}best_of")],
    )
    Other = Annotated[_named | _best, Discriminator(_sort)]


class Evaluate(Settings):
    """Greedy answers to held-out prompts: asked plain, for the best and for the worst."""

    prompts: Count | None = None
    """Rows of the valid split, evaluated at each iteration; none: all."""
    test_prompts: Count | None = None
    """Rows of the test split, evaluated at 0 and at the end; none: no test split."""
    sets: dict[str, HeldOut] = key({}, "Further sets, by name.")
    references: bool = key(False, "The labels too, as if a policy had written them.")
    policies: dict[str, Other] = Field({})
    """Policies that the run did not make, by name: evaluated once, on every set."""
    every_word: bool = key(False, "Ask with every word, not with the best and the worst alone.")
    max_new_tokens: Count | None = key(None, "Default: as sampled.")
    group: Count = key(16, "Prompts that are computed together.")
    drawn: Drawn = Field(Drawn())

    @property
    def all_sets(self) -> list[str]:
        """The names of all sets that are evaluated, in order."""
        return [graph.VALID, *([graph.TEST] if self.test_prompts else []), *self.sets]


class Measure(Settings):
    """What answers are measured with."""

    reward: Reward | None = key(None, "Default: `reward`, which the policy was trained for.")
    further: dict[str, Reward] = Field({})
    """Further rewards, by names of your own: a column each. A gain in `reward` alone is none."""


class Judging(Settings):
    """Win rates: a judge compares answers to the same posts, two at a time, in both orders."""

    judge: Judge
    pairs: list[Annotated[list[str], Field(min_length=2, max_length=2)]] | None = None
    """Rows: `best` (the run's policy), `start`, `references`, or names of `evaluate.policies`.
    Default: `[best, start]`, and `[best, references]` where `evaluate.references` are there."""
    iterations: Literal["end", "all"] = key("end", "After which `best` is judged.")
    posts: Count = key(256, "The first so many of the set.")
    set: str | None = key(None, "Default: test where it is evaluated and judged, else valid.")
    comparisons: Natural = key(500, "Held-out ones of people, for the judge's accuracy; 0: none.")
    prompt: str | None = key(None, "A file, with {post}, {a} and {b}; none: our own.")
    max_tokens: Count = key(160, "Of a reply.")
    tries: Count = key(3, "Of a question whose reply cannot be read; the further ones sampled.")

    @property
    def content(self) -> dict[str, Any]:
        """What decides the verdict on two texts."""
        its = ("judge", "prompt", "max_tokens", "tries")
        return {key: self.plain(getattr(self, key)) for key in its}


class Figures(Settings):
    """What was published of a policy."""

    reward: Number | None = None
    perplexity: Number | None = key(None, "Mean.")
    length: Number | None = None


class Published(Settings):
    """Figures that tables show beside ours, with the difference."""

    of: str = key("published", "Whose they are.")
    set: str = key(graph.TEST, "The set that they are of.")
    rows: dict[str, Figures]
    """By row: `start`, `references`, `best` (of the run's own policy), or a name of `policies`."""


class Report(Settings):
    """What `alt-hpc report` shows."""

    published: Published | None = None


class StageCluster(Settings):
    """What one stage asks of the cluster; `null` takes the cluster-wide setting."""

    shards: Count = 1
    nodes: Count = 1
    tasks_per_node: Count = key(1, "`train`, `sft`, `reward_model`: one process per GPU.")
    gpus: Natural = key(0, "Per task.")
    cpus: Count | None = key(None, "Per task; default: `threads`.")
    mem_gb: Positive | None = key(None, "Per node.")
    minutes: Count | None = None
    partition: str | None = None
    parallel: Count = key(256, "Array elements that may run at once.")
    python: str | None = key(None, "Another environment's interpreter.")
    container: str | None = key(None, "Image for srun --container-image (pyxis).")
    sbatch: dict[str, SbatchValue] = Field({})
    """Any further sbatch option; false leaves out one that we would set."""


class Cluster(Settings):
    """Where and how jobs run. Free: it may change whenever a run is submitted again."""

    backend: Literal["local", "slurm"] = "local"
    slots: Count = key(1, "local: tasks at once.")
    max_attempts: Count = 3
    chain: Literal["controller", "presubmitted"] = "controller"
    """presubmitted: where nodes have no sbatch."""
    kill_invalid_dependencies: bool = key(True, "false where a site asks not to use that option.")
    hung_minutes: Positive = key(60.0, "A task without progress for so long ends itself.")
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    minutes: Count = 60
    sbatch: dict[str, SbatchValue] = Field({})
    controller: StageCluster = Field(StageCluster())

    def stage(self, name: str) -> StageCluster:
        """Settings of a stage by its name (`reward-model` is the key `reward_model`)."""
        return self.stages()[graph.STAGES[name].key]

    def stages(self) -> dict[str, StageCluster]:
        """Settings of the controller and of every stage, by their keys."""
        return {name: value for name, value in self if isinstance(value, StageCluster)}


if not TYPE_CHECKING:  # what pydantic reads: a key for each stage
    _keys = {stage.key: (StageCluster, StageCluster()) for stage in graph.STAGES.values()}
    Cluster = create_model("Cluster", __base__=Cluster, __doc__=Cluster.__doc__, **_keys)


class Config(Settings, title="alt_hpc"):
    """A whole run.

    Everything but `FREE` decides content that training depends on: it is *frozen* at the first
    submission and fingerprinted.
    """

    model_config = ConfigDict(serialize_by_alias=True)

    run: str
    """The run folder."""
    start_from: str | None = Field(None, alias="from")
    """Another run's folder: what it has made that this run would make alike is taken from there."""
    policy: Policy
    data: Data
    seed: Natural = 0
    iterations: Natural = 10
    """0: only the start is made, and evaluated."""
    threads: Count = key(1, "CPU threads of a task: part of what decides content bit for bit.")
    keep: Count = key(2, "Last policies kept on disk, beside the best one and any still in use.")
    domain: Domain = Field(DOMAINS["tldr"].Settings())
    method: Method = Field(METHODS["words"].Settings())
    reward: Reward = Field(REWARDS["model"].Settings())
    engine: Engine = Field(ENGINES["exact"].Settings())
    sft: Sft | None = None
    reward_model: RewardModelTraining | None = None
    sample: Sample = Field(Sample())
    train: PolicyTraining = Field(PolicyTraining())
    evaluate: Evaluate = Field(Evaluate())
    measure: Measure = Field(Measure())
    judge: Judging | None = None
    report: Report = Field(Report())
    cluster: Cluster = Field(Cluster())

    @model_validator(mode="before")
    @classmethod
    def _as_the_method_has_it(cls, values: Any) -> Any:
        """Fill in what the method's paper decides of other sections, where it is left out."""
        given = values.get("method") if isinstance(values, dict) else None
        kind = given.get("kind") if isinstance(given, dict) else None
        module = METHODS.get(kind) if isinstance(kind, str) else None
        for name, value in module.Settings.defaults.items() if module else ():
            section, _, its = name.partition(".")
            if isinstance(now := values.get(section, {}), dict):
                values = {**values, section: {its: value, **now}}
        return values

    def behind(self, name: str) -> "Config":
        """The same run in a folder with this behind its name."""
        return self.model_copy(update={"run": f"{self.run.rstrip('/')}{name}"}) if name else self

    def frozen(self) -> dict[str, Any]:
        """What decides content that training depends on, as plain JSON values."""
        return {name: self.plain(value) for name, value in self if name not in FREE}

    def fingerprint(self) -> str:
        """sha256 (hex) of `frozen`."""
        return digest(self.frozen())

    @property
    def evaluated_tokens(self) -> int:
        """The most tokens of an answer that is evaluated."""
        return self.evaluate.max_new_tokens or self.sample.max_new_tokens

    @property
    def shares_prompts(self) -> bool:
        """Whether training computes a prompt once for its generations (see `family`)."""
        given = self.train.share_prompts
        return self.domain.is_behind if given is None else given

    @property
    def family(self) -> int:
        """Generations that can share one computed prompt in training: all where the feedback
        stands behind it, else those with the same feedback.
        """
        return self.method.family * (self.method.taught if self.domain.is_behind else 1)

    @property
    def title(self) -> str:
        """What tables call the method; where its words stand, if it has any."""
        return self.method.title + (self.domain.variant if "best" in self.method.asked(1) else "")

    @property
    def judged_set(self) -> str:
        """The set whose answers are judged."""
        given, ends = self.judge and self.judge.set, self.judge and self.judge.iterations == "end"
        return given or (graph.TEST if ends and self.evaluate.test_prompts else graph.VALID)

    @property
    def judges_humans(self) -> bool:
        """Whether the judge is asked about comparisons of people too."""
        return bool(self.judge and self.judge.comparisons and self.data.comparisons)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The pairs of rows that are compared."""
        if self.judge is None:
            return []
        others = [graph.START, *([graph.REFERENCES] if self.evaluate.references else [])]
        pairs = self.judge.pairs or [[graph.BEST, other] for other in others]
        return [(a, b) for a, b in pairs]

    def judged(self, iteration: int) -> list[tuple[str, str]]:
        """Those that are due after an iteration; those without `best` at iteration 0."""
        each = self.judge is not None and self.judge.iterations == "all"
        due = each or iteration in (0, self.iterations)
        return [pair for pair in self.pairs if due and (graph.BEST in pair) == bool(iteration)]

    @property
    def measured_by(self) -> Reward:
        """The reward that evaluations are measured with."""
        return self.measure.reward or self.reward
