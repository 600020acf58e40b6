"""What a report over several runs reads of each of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alt_hpc.config import BestOf
from alt_hpc.data.texts import PROMPTS
from alt_hpc.graph import DRAWN, OWN, SAMPLE, SCORE, TRAIN, Piece
from alt_hpc.methods.method import QUANTILE
from alt_hpc.report import judged, results
from alt_hpc.report.judged import Judged
from alt_hpc.report.results import Rows
from alt_hpc.rewards import Reward
from alt_hpc.run import models
from alt_hpc.run import rows as rows_of
from alt_hpc.run.files import read_json
from alt_hpc.run.folder import RunFolder
from alt_hpc.run.layout import MODEL_FOLDER, POLICY_FOLDER
from alt_hpc.settings import digest

COSTS = ("train_prompts", "tokens_sampled", "tokens_scored", "tokens_trained")
REWARD_IS, PERPLEXITY_IS, TOKENS_ARE = "evaluation reward", "reference policy", "tokens of answers"
FURTHER = "reward "  # begins the name of one of `measure.further`
TRAINED = ", as the run trained it"  # ends the name of what each seed makes anew


@dataclass(frozen=True)
class Run:
    """A run as far as it has been evaluated: settings, answers with their measures, costs."""

    folder: RunFolder
    title: str  # of its method
    seed: int
    last: int  # the last iteration that is reported
    alike: str  # the same for runs that differ in nothing but their seeds
    words: Mapping[str, str]  # what each variant was asked with at `last`, the best first
    evaluations: Mapping[int, Rows]  # by iteration
    costs: Mapping[str, int | None]  # of COSTS, up to `last`; None: not known
    measured: Mapping[str, str]  # what decides measures -> digest
    best_of: Mapping[str, str]  # policies that are chosen among answers -> how
    published: Mapping[str, Any] | None  # of `report.published`
    learned: Mapping[str, Any] | None  # the words' diagnosis
    judged: Judged

    @property
    def name(self) -> str:
        return str(self.folder.path)

    @property
    def start(self) -> Rows:
        return self.evaluations[0]

    @property
    def end(self) -> Rows:
        return self.evaluations[self.last]

    @property
    def shown(self) -> str:
        """The variant that its policy is known by."""
        return "best" if "best" in self.words else "plain"

    def asked(self, variant: str) -> str:
        """How its policy was asked, in a word: `'Excellent.'`, or `plain`."""
        return f"'{self.words[variant]}'" if variant in self.words else variant


def read(folder: RunFolder) -> Run | None:
    """A run's rows, every checksum verified; None where its start has not been evaluated."""
    config, whole = folder.config(), results.whole(folder)
    reports = {k: report for k, report in results.reports(folder).items() if k in whole}
    if 0 not in reports:
        return None
    last = max(reports)
    evaluations = {k: _kept(results.evaluated(folder, k)) for k in reports}
    published = config.report.published
    best_of = {
        name: f"best of {policy.best_of} by the reward"
        for name, policy in config.evaluate.policies.items()
        if isinstance(policy, BestOf)
    }
    measured = _measured(folder)
    start = [row for row in evaluations[0] if (row["policy"], row["variant"]) == (OWN, "plain")]
    # In an order of their own: posts that were added later stand behind other sets.
    posts = sorted((row["set"], row["row"], row["prompt"]) for row in start)
    alike = [config.frozen() | {"seed": 0}, measured, last, posts]
    return Run(
        folder,
        config.title,
        config.seed,
        last,
        digest(alike),
        _words(folder, evaluations[last], last),
        evaluations,
        _costs(folder, last),
        measured | _made(folder),
        best_of,
        published.model_dump(mode="json") if published else None,
        reports[last]["words"]["fixed"],
        judged.of(folder, last),
    )


def _kept(rows: Rows) -> Rows:
    """The greedy answers, without what nothing here reads: there are many."""
    greedy = (row for row in rows if not row["variant"].startswith(DRAWN))
    return [{k: row[k] for k in row if k not in ("ids", "fixed", "word", "lost")} for row in greedy]


def _words(folder: RunFolder, rows: Rows, last: int) -> dict[str, str]:
    levels = folder.config().method.levels if last else []
    there = {row["variant"] for row in rows}
    middle = {f"{QUANTILE}{i}": text for i, text in enumerate(levels)}
    ends = {how: results.asked(folder, how) for how in ("best", "worst") if how in there}
    order = {"best": ends.get("best", ""), **middle, "worst": ends.get("worst", "")}
    return {variant: text for variant, text in order.items() if variant in there}


def _costs(folder: RunFolder, last: int) -> dict[str, int | None]:
    ks = range(1, last + 1)
    drawn = {row for k in ks for row in folder.draw(k)["rows"]}
    texts = {row["prompt"] for row in rows_of.frozen(folder, PROMPTS, sorted(drawn))}
    found: dict[str, int | None] = {COSTS[0]: len(texts) if last else None}
    for name, stage in zip(COSTS[1:], (SAMPLE, SCORE, TRAIN), strict=True):
        pieces = [piece for k in ks for piece in folder.graph().of(k, stage)]
        made = map(folder.manifests.get, pieces)
        tokens = [manifest.facts.get("tokens") if manifest else None for manifest in made]
        known = [count for count in tokens if count is not None]
        found[name] = sum(known) if known and len(known) == len(tokens) else None
    return found


def _rewards(folder: RunFolder) -> dict[str, Reward]:
    config = folder.config()
    more = config.measure.further.items()
    return {REWARD_IS: config.measured_by, **{f"{FURTHER}{name}": r for name, r in more}}


def _measured(folder: RunFolder) -> dict[str, str]:
    """What decides measures, but for models that the run itself has trained."""
    config, frozen = folder.config(), _files(folder)
    found = {name: _identity(folder, reward, frozen) for name, reward in _rewards(folder).items()}
    if model := config.policy.model:
        found[PERPLEXITY_IS] = digest(frozen.get(model))
    return found | {TOKENS_ARE: str(config.evaluated_tokens)}


def _identity(folder: RunFolder, reward: Reward, frozen: Mapping[str, Any]) -> str:
    """Of a reward: its settings, the bytes of its models, wherever they lie, and of its files."""
    named, files = reward.named(), reward.files()
    settings = _without(reward.model_dump(mode="json"), named)
    keys = [models.key(one.name, whole=one.whole) for _, one in sorted(named.items())]
    copies = [read_json(folder.layout.user_file(f)[1])["sha256"] for _, f in sorted(files.items())]
    return digest([settings, [frozen.get(key) for key in keys], copies])


def _without(settings: dict[str, Any], keys: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """Settings without some keys, which are dotted."""
    return {
        key: _without(value, keys, f"{at}{key}.") if isinstance(value, dict) else value
        for key, value in settings.items()
        if f"{at}{key}" not in keys
    }


def _files(folder: RunFolder) -> dict[str, dict[str, str]]:
    """The checksums of each model's files."""
    path = folder.layout.models
    known = read_json(path) if path.exists() else {}
    return {
        name: {file: entry["checksum"] for file, entry in about["files"].items()}
        for name, about in known.items()
    }


def _made(folder: RunFolder) -> dict[str, str]:
    """What decides measures and was trained by the run: with each seed another."""
    graph, found = folder.graph(), dict[str, str]()
    if folder.config().policy.model is None:
        found[f"{PERPLEXITY_IS}{TRAINED}"] = _bytes(folder, graph.policy(0), POLICY_FOLDER)
    trained = [name for name, reward in _rewards(folder).items() if reward.trained]
    for name in trained:
        found[f"{name}{TRAINED}"] = _bytes(folder, graph.reward_model(), MODEL_FOLDER)
    return found


def _bytes(folder: RunFolder, piece: Piece | None, inner: str) -> str:
    made = folder.manifests.get(piece) if piece else None
    files = made.files if made else {}
    names = sorted(name for name in files if name.startswith(inner) and not name.endswith(".md"))
    return digest([files[name]["sha256"] for name in names])
