"""The config: strict, located errors, and what is frozen."""

from __future__ import annotations

import json
import re
import typing
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from alt_hpc import config as configs
from alt_hpc.config import Config
from alt_hpc.errors import InputError
from alt_hpc.settings import Settings
from alt_hpc.training.settings import ZERO2

ROOT = Path(__file__).resolve().parent.parent
SMALLEST = """\
run: runs/x
policy: {model: policy}
reward: {model: judge}
data: {prompts: {path: rows}}
"""

# Every option there is. A new one is a deliberate act: add it here, to the docs, and think about
# whether it decides content (frozen) or not.
_SIDE = ("evaluate", "measure", "judge", "report")
FREE = ("run", "start_from", "iterations", "keep", "cluster", *_SIDE)
OPTIONS = {
    "": "run start_from policy data seed iterations threads keep domain method reward engine sft"
    " reward_model sample train evaluate measure judge report cluster",
    "policy": "model base tokenizer dtype max_length dropout",
    "data": "prompts sft comparisons",
    "data.prompts": "path name train columns longest half without limit valid test valid_limit",
    "data.sft": "path name train columns longest half without limit",
    "domain": "kind template",
    "method": "kind quantiles remainder pool history per_quantile only_finished trained append_eos"
    " texts",
    "reward": "kind model base tokenizer template max_length dtype",
    "engine": "kind",
    "sample": "prompts replacement generations temperature top_p max_new_tokens group",
    "train": "epochs global_batch micro_batch lr betas eps weight_decay clip warmup"
    " trained_blocks train_embeddings checkpoint_activations precision export_dtype"
    " deepspeed checkpoint_minutes entropy kl share_prompts carry_moments",
    "evaluate": "prompts test_prompts sets references policies every_word max_new_tokens group"
    " drawn",
    "evaluate.drawn": "posts answers",
    "evaluate.sets": "path name split columns prompts seed template",
    "measure": "reward further",
    "judge": "judge pairs iterations posts set comparisons prompt max_tokens tries",
    "judge.judge": "kind model tokenizer dtype max_length group engine",
    "judge.judge.engine": "kind",
    "report": "published",
    "report.published": "of set rows",
    "cluster": "backend slots max_attempts chain kill_invalid_dependencies hung_minutes"
    " partition account qos minutes sbatch"
    " controller sft reward_model sample score train evaluate measure judge win_rates report",
    "cluster.sample": "shards nodes tasks_per_node gpus cpus mem_gb minutes partition parallel"
    " python container sbatch",
}
TRAINED = OPTIONS["train"].replace(" entropy kl share_prompts carry_moments", "")
OPTIONS |= {"sft": f"{TRAINED} max_length", "reward_model": f"{TRAINED} head_only"}


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, text: str = "", *overrides: str) -> Config:
    return configs.load(write(folder, SMALLEST + text), overrides)


def refused(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        configs.load(write(folder, text), overrides)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.name)
def test_the_configs_that_we_ship_can_be_loaded(path: Path) -> None:
    config = configs.load(path)
    for training in filter(None, (config.train, config.sft, config.reward_model)):
        assert training.deepspeed is None or (ROOT / training.deepspeed).is_file()


def test_defaults_are_the_papers(tmp_path: Path) -> None:
    config = load(tmp_path)
    sample, train, method = config.sample, config.train, config.method
    assert (sample.prompts, sample.generations, sample.max_new_tokens) == (2048, 96, 64)
    assert (sample.temperature, sample.top_p) == (0.9, 0.9)
    assert (train.lr, train.entropy, train.epochs) == (2e-5, 0.06, 2)
    assert train.betas == [0.8, 0.999]
    assert method.levels == ["Excellent.", "Good.", "Mediocre.", "Bad.", "Horrible."]
    assert (config.iterations, method.family) == (10, 2)
    assert train.trains_embeddings
    assert not load(tmp_path, "", "train.kl=0.05").train.trains_embeddings  # METHOD, Frozen


def test_the_options_are_these() -> None:
    found: dict[str, str] = {}

    def walk(cls: type[Settings], name: str) -> None:
        found[name] = " ".join(cls.model_fields)
        for key, field in cls.model_fields.items():
            full = f"{name}.{key}".strip(".")
            for kind in sections(field.annotation):
                if full in OPTIONS:
                    walk(kind, full)

    walk(Config, "")
    assert found == OPTIONS


def sections(hint: Any) -> list[type[Settings]]:
    """The first section of a type, whatever stands around it."""
    inner = [kind for arg in typing.get_args(hint) for kind in sections(arg)]
    mine = [hint] if isinstance(hint, type) and issubclass(hint, Settings) else []
    return [*mine, *inner][:1]


def test_editors_complete_configs_from_the_schema(tmp_path: Path) -> None:
    """It is what the code says now, knows every key, and accepts what we ship."""
    schema = json.loads((ROOT / "configs/schema.json").read_text())
    assert schema == Config.model_json_schema(), "python -m alt_hpc.config > configs/schema.json"
    validator = jsonschema.Draft202012Validator(schema)
    for path in (ROOT / "configs").glob("*.yaml"):
        text = path.read_text()
        assert text.startswith("# yaml-language-server: $schema=schema.json\n")
        validator.validate(yaml.safe_load(re.sub(r"(\d)e-", r"\1.0e-", text)))  # as YAML 1.2
    for wrong in ("seed: -1", "sampel: {}", "engine: {kind: tgi}", "train: {head_only: true}"):
        given = yaml.safe_load(SMALLEST) | yaml.safe_load(wrong)
        assert list(validator.iter_errors(given)), wrong
    assert "N, drawn per iteration" in json.dumps(schema)  # what an editor shows


# ---------------------------------------------------------------------- reading

WRONG = {
    "unknown key": ("iteration: 3\n", 5, "unknown key 'iteration'", "'iterations'"),
    "unknown key below": ("sample:\n  top_P: 1\n", 6, "unknown key 'top_P'", "'top_p'"),
    "unknown key of a stage": ("cluster:\n  sample:\n    shard: 1\n", 7, "'shard'", "'shards'"),
    "key given twice": ("seed: 1\nseed: 2\n", 6, "seed", "given twice"),
    "sbatch option twice": ("cluster: {sbatch: {a: 1, a: 2}}\n", 5, "sbatch.a", "given twice"),
    "text for a number": ("seed: many\n", 5, "seed", "a whole number, not 'many'"),
    "fraction for a whole number": ("seed: 1.5\n", 5, "seed", "a whole number, not '1.5'"),
    "true for a whole number": ("seed: true\n", 5, "seed", "a whole number"),
    "number for a text": ("policy2: 1\n", 5, "unknown key 'policy2'", "'policy'"),
    "number for true or false": ("sample: {replacement: 1}\n", 5, "replacement", "true or false"),
    "list for a section": ("sample: [1]\n", 5, "sample", "mapping"),
    "text for a section": ("sample: yes\n", 5, "sample", "mapping"),
    "text for a list": ("method: {texts: Good.}\n", 5, "method.texts", "a list"),
    "empty section": ("cluster:\n", 5, "cluster", "mapping"),
    "not a choice": ("policy3: {}\n", 5, "unknown key", "'policy'"),
    "a wrong engine": ("engine: {kind: vlm}\n", 5, "engine.kind", "nearest: vllm"),
    "a time of YAML 1.1": ("cluster: {minutes: 1:30}\n", 5, "cluster.minutes", "'1:30'"),
    "infinite": ("train: {lr: .inf}\n", 5, "train.lr", "a number, not '.inf'"),
    "not a number": ("train: {lr: .nan}\n", 5, "train.lr", "a number, not '.nan'"),
    "overflow": (f"train: {{lr: {'9' * 400}}}\n", 5, "train.lr", "a number"),
    "too large": ("seed: 99999999999999999999\n", 5, "seed", "too large"),
    "NUL in a path": ('data2: "x"\n', 5, "unknown key 'data2'", "'data'"),
    "unclosed bracket": ("method: {texts: [a\n", 6, "not valid YAML", ""),
    "tab": ("sample:\n\tgroup: 1\n", 6, "not valid YAML", ""),
    "control character": ("# \x07\n", 5, "not valid YAML", ""),
    "a key that is a list": ("cluster: {sbatch: {[a]: 1}}\n", 5, "cluster.sbatch", "word"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG.keys())
def test_wrong_config_names_file_line_and_field(
    tmp_path: Path, case: tuple[str, int, str, str]
) -> None:
    text, line, field, problem = case
    sentence = refused(tmp_path, SMALLEST + text)
    assert sentence.startswith(f"{tmp_path}/config.yaml:{line}: ")
    assert field in sentence
    assert problem in sentence


def test_missing_keys_and_files_that_are_no_config(tmp_path: Path) -> None:
    assert "the key 'run' is missing" in refused(tmp_path, "policy: {model: x}\n")
    assert "empty" in refused(tmp_path, "# nothing\n")
    assert "mapping" in refused(tmp_path, "- a\n- b\n")
    assert "not valid YAML" in refused(tmp_path, "[" * 700)
    (tmp_path / "config.yaml").write_bytes(b"run: \xff\n")
    with pytest.raises(InputError, match="not UTF-8"):
        configs.load(tmp_path / "config.yaml")
    with pytest.raises(InputError, match="cannot read the config"):
        configs.load(tmp_path)


RANGES = [
    "iterations=-1", "threads=0", "keep=0", "seed=-1", "policy.max_length=0", "policy.dropout=1",
    "policy.dropout=-0.1", "data.prompts.limit=0", "data.prompts.valid_limit=0",
    "sample.prompts=0", "sample.generations=0",
    "sample.temperature=0", "sample.top_p=0", "sample.top_p=1.1", "sample.group=-1",
    "method.quantiles=1", "method.per_quantile=0", "evaluate.prompts=0",
    "evaluate.test_prompts=0", "train.lr=0", "train.lr=-1e-5", "train.epochs=0",
    "train.eps=0", "train.clip=0", "train.weight_decay=-1", "train.entropy=-0.1",
    "train.kl=-0.1", "train.warmup=1.5", "train.warmup=-0.1", "train.betas=[0.9, 1]",
    "train.betas=[-0.1, 0.9]", "train.betas=[0.9]", "train.trained_blocks=0",
    "train.trained_blocks=1.5", "train.checkpoint_minutes=-1", "sft={max_length: 0}",
    "cluster.slots=0", "cluster.max_attempts=0", "cluster.minutes=0", "cluster.sample.shards=0",
    "cluster.sample.gpus=-1", "cluster.score.mem_gb=0", "cluster.train.cpus=0",
    "cluster.train.minutes=0", "cluster.evaluate.parallel=0", "cluster.train.nodes=0",
]  # fmt: skip


@pytest.mark.parametrize("override", RANGES)
def test_numbers_that_cannot_be_meant(tmp_path: Path, override: str) -> None:
    sentence = refused(tmp_path, SMALLEST, override)
    assert sentence.startswith(f"--set {override.partition('=')[0]}: expected ")


def test_an_error_in_a_section_given_twice_over_names_its_own_line(tmp_path: Path) -> None:
    text = SMALLEST + "train:\n  lr: 1e-4\n  warmup: 2\n"
    assert refused(tmp_path, text).startswith(f"{tmp_path}/config.yaml:7: train.warmup: ")


RULES = {
    "quantiles": (["method.quantiles=4"], "5 feedback texts for 4 quantiles"),
    "texts": (["method.texts=[a, b]"], "2 feedback texts for 5 quantiles"),
    "equal texts": (["method.texts=[a, b, c, d, a]"], "must differ"),
    "empty text": (["method.texts=[a, b, c, d, ' ']"], "empty"),
    "template without prompt": (["domain.template='{feedback} x'"], "must contain {prompt} once"),
    "template without feedback": (["domain.template='{prompt}'"], "must contain {feedback} once"),
    "text after the prompt": (["domain.template='{feedback} {prompt} go'"], "end in {prompt}"),
    "families that do not fit": (["domain.template='{prompt} {feedback}'"], "families of 10"),
    "too few generations": (["sample.generations=4"], "cannot fill 5 quantiles"),
    "no room": (["policy.max_length=64"], "no room for a prompt"),
    "batch over processes": (["cluster.train={nodes: 3}"], "divided among 3 processes"),
    "micro-batch": (["train.micro_batch=5"], "micro-batches of 5"),
    "no policy": (["policy.model=null"], "give policy.model"),
    "no sft": (["policy.model=null", "policy.base=x"], "an sft section"),
    "no reward model": (["reward.model=null"], "give reward.model"),
    "comparisons": (
        ["reward.model=null", "reward.base=b", "reward_model={}"],
        "needed to train the reward model",
    ),
    "column": (["data.prompts.columns={lable: x}"], "prompt, label"),
    "test split": (["evaluate.test_prompts=5"], "data.prompts.test names no test split"),
    "run": (["run=' '"], "empty"),
    "newline in run": (['run="a\\nb"'], "line break or control character"),
    "newline in account": (['cluster.account="a\\n#SBATCH -x"'], "line break or control"),
    "escape in partition": (['cluster.train.partition="\\e[0m"'], "line break or control"),
    "newline in an sbatch option": (['cluster.sbatch.nice="1\\n2"'], "line break or control"),
    "NUL in a path": (['data.prompts.path="a\\0b"'], "no file can hold"),
    "half a character": (['policy.model="\\ud800"'], "no file can hold"),
    "set without value": (["seed"], "expected key=value"),
    "set of bad YAML": (["seed=[1"], "not valid YAML"),
    "set of an unknown key": (["sample.prompt=1"], "the nearest valid key is 'prompts'"),
}


@pytest.mark.parametrize("case", RULES.values(), ids=RULES.keys())
def test_values_that_contradict_each_other(tmp_path: Path, case: tuple[list[str], str]) -> None:
    overrides, problem = case
    assert problem in refused(tmp_path, SMALLEST, *overrides)


def test_overrides_are_yaml_and_reach_every_depth(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "seed: 1\ncluster: {train: {gpus: 1}}\n",
        "seed=5",
        "cluster.train.minutes=7",
        "cluster.sample.sbatch={nice: 3}",
        "policy.model=null",
        "policy.base=b",
        "sft={lr: 1e-3}",
        "sft.lr=2e-3",
    )
    assert config.seed == 5
    assert (config.cluster.train.gpus, config.cluster.train.minutes) == (1, 7)
    assert config.cluster.sample.sbatch == {"nice": 3}
    assert config.policy.model is None
    assert config.sft is not None
    assert config.sft.lr == 2e-3


def test_times_of_sbatch_stay_text_and_numbers_stay_numbers(tmp_path: Path) -> None:
    config = load(tmp_path, "cluster: {sbatch: {time: 01:30:00, nice: 5, exclusive: true}}\n")
    assert config.cluster.sbatch == {"time": "01:30:00", "nice": 5, "exclusive": True}


# ---------------------------------------------------------------------- frozen and free


def leaves(value: Settings, name: str = "") -> list[str]:
    """Dotted names of all fields that hold no further section."""
    found = []
    for key, child in value:
        full = f"{name}.{key}".strip(".")
        found += leaves(child, full) if isinstance(child, Settings) else [full]
    return found


def changed(value: Any, name: str) -> Any:
    """The same section with another value at a dotted name."""
    key, _, rest = name.partition(".")
    child = getattr(value, key)
    other = {
        bool: lambda: not child,
        int: lambda: child + 1,
        float: lambda: child / 2 + 0.01,
        str: lambda: child + "x",
        list: lambda: [*child[1:], *(child[:1] or ["x"])],
        dict: lambda: {**child, "x": "y"},
        type(None): lambda: "x",
    }
    return value.model_copy(update={key: changed(child, rest) if rest else other[type(child)]()})


def full_config(folder: Path) -> Config:
    return load(folder, "sft: {}\nreward_model: {}\n", "data.comparisons={path: pairs}")


def test_every_field_is_either_frozen_or_free(tmp_path: Path) -> None:
    config = full_config(tmp_path)
    for name in leaves(config):
        free = name.split(".")[0] in FREE
        same = changed(config, name).fingerprint() == config.fingerprint()
        assert same == free, name


def test_fingerprint_does_not_depend_on_how_the_config_is_written(tmp_path: Path) -> None:
    plain = load(tmp_path, "train: {lr: 2e-5}\nseed: 0\n")
    assert plain.fingerprint() == load(tmp_path, "", "train.lr=0.00002").fingerprint()


def test_the_key_from_is_called_so_everywhere(tmp_path: Path) -> None:
    """It is no word for Python."""
    config = load(tmp_path, "from: runs/a\n")
    assert config == load(tmp_path, "", "from=runs/a")
    assert config.start_from == "runs/a"
    assert config.model_dump(mode="json")["from"] == "runs/a"
    assert "start_from" not in json.dumps([config.model_dump(), Config.model_json_schema()])
    said = refused(tmp_path, SMALLEST + "start_from: runs/a\n")
    assert "config.yaml:5: start_from: unknown key 'start_from'" in said
    assert "'from'" in refused(tmp_path, SMALLEST + "form: runs/a\n")
    where = "config.yaml:5: from: expected a text, not '1'"
    assert where in refused(tmp_path, SMALLEST + "from: 1\n")


@pytest.mark.parametrize(
    "text", ["\U0001f600", "a\u2028b", "\x85", "null", "1:30", "{prompt}", '"']
)
def test_a_config_comes_back_from_the_run_folder_as_it_was(tmp_path: Path, text: str) -> None:
    config = full_config(tmp_path)
    method = config.method.model_copy(update={"texts": [text, "b", "c", "d", "e"]})
    config = config.model_copy(update={"method": method})
    written = json.loads(json.dumps(config.model_dump(mode="json")))
    assert configs.from_json(written, "config.json") == config


def test_the_default_deepspeed_settings_are_those_of_the_json() -> None:
    assert json.loads((ROOT / "configs/deepspeed/zero2.json").read_text()) == ZERO2
