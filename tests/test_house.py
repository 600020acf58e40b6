"""The house: what stands where, who may import whom, and that a stage is one file and one row."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers

from alt_hpc.graph import STAGES
from alt_hpc.run.folder import RunFolder
from alt_hpc.run.journal import Submitted

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "alt_hpc"


def words(file: Path) -> Iterator[tuple[int, str]]:
    """Every string of a module, its docstrings apart, with its line."""
    tree = ast.parse(file.read_text())
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            yield node.lineno, node.value


def found(pattern: str, but: str) -> list[str]:
    """Where a string of the package matches, one module apart."""
    modules = [file for file in PACKAGE.rglob("*.py") if file != PACKAGE / but]
    return [
        f"{file.relative_to(ROOT)}:{line}: {text!r}"
        for file in modules
        for line, text in words(file)
        if re.search(pattern, text)
    ]


# ---------------------------------------------------------------------- what stands where


def test_only_process_reads_the_variables_of_a_job() -> None:
    assert found(r"\bS(LURM|LURMD|BATCH|RUN)_", "process.py") == []


def test_only_the_layout_knows_names_below_a_run() -> None:
    """What it names stands as a string nowhere else: no path can be built beside it."""
    texts = {text for _, text in words(PACKAGE / "run/layout.py")}
    names = {text for text in texts if re.fullmatch(r"(?=.*\w{3})(?=.+[.-])[\w.*-]+", text)}
    names -= {"config.json"}  # every model's folder has one too
    assert {"manifest.json", "journal.jsonl", "attempt-", "controller.sh"} <= names
    spelt = "|".join(re.escape(name) for name in names)
    assert found(rf"^/?({spelt})", "run/layout.py") == []
    assert (
        found(r"(iterations|policies|checkpoints|steps|jobs|tensorboard)/", "run/layout.py") == []
    )


def test_only_the_graph_spells_out_which_stages_there_are() -> None:
    """By the graph's constant elsewhere; `train` is also a split, `judge` a kind of reward."""
    names = "|".join(name for name in STAGES if name not in ("train", "judge"))
    left = found(rf"^({names})$", "graph.py")
    commands_and_keys = (
        "__main__.py",
        "stages/report.py",
        "reader.py",
        "heads.py",
    )
    assert [place for place in left if not any(file in place for file in commands_and_keys)] == []


@pytest.mark.parametrize(
    "module",
    [
        *("control.chain", "control.start", "control.preview", "control.memory"),
        *("graph", "plan", "stages.work"),
    ],
)
def test_what_plans_and_starts_imports_no_torch(module: str) -> None:
    code = f"import sys, alt_hpc.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_readmes_tree_names_every_file() -> None:
    tree = (ROOT / "README.md").read_text().split("## The tree")[1].split("## ")[0]
    names = {file.stem for file in PACKAGE.rglob("*.py")} - {"__init__"}
    assert {name for name in names if not re.search(rf"\b{name}\b", tree)} == set()


def test_no_file_and_no_class_is_long() -> None:
    for file in PACKAGE.rglob("*.py"):
        text = file.read_text()
        assert len(text.splitlines()) <= 380, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                assert (node.end_lineno or 0) - node.lineno < 200, f"{file}: {node.name}"


# ---------------------------------------------------------------------- who may import whom


PLANTED = {  # module -> an import against the arrows, and of what
    "graph": ("import alt_hpc.plan", "plan"),
    "plan": ("from alt_hpc.run import files", "run.files"),
    "training.loop": ("from alt_hpc.run.folder import RunFolder", "run.folder"),
    "lm.load": ("def later() -> None:\n    import alt_hpc.training.loop", "training.loop"),
    "stages.sample": ("import alt_hpc.clusters.slurm", "clusters.slurm"),
    "stages.score": ("from alt_hpc.stages import sample", "stages.sample"),
    "run.layout": ("from alt_hpc.run import folder", "run.folder"),
    "errors": ("from alt_hpc import config", "config"),
    "process": ("from alt_hpc import task", "task"),
    "stages.work": ("import alt_hpc.control.step", "control.step"),
    "clusters.cluster": ("from alt_hpc import task", "task"),
    "methods.words": ("from alt_hpc import config", "config"),
    "rewards.model": ("from alt_hpc.stages import work", "stages.work"),
    "judges.compare": ("from alt_hpc.rewards import reward", "rewards.reward"),
    "domains.tldr": ("from alt_hpc.run import rows", "run.rows"),
    "settings": ("from alt_hpc.lm import load", "lm.load"),
}


def _package(place: Path) -> Path:
    """A copy of the package, to be changed."""
    shutil.copytree(PACKAGE, place / "alt_hpc", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.cfg", place)
    return place / "alt_hpc"


def _contract(place: Path) -> subprocess.CompletedProcess[str]:
    lint = Path(sys.executable).with_name("lint-imports")
    command = [str(lint), "setup.cfg", "--no-cache"]
    environment = os.environ | {"PYTHONPATH": str(place)}
    return subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, timeout=120
    )


def test_imports_against_the_arrows_are_found(tmp_path: Path) -> None:
    package = _package(tmp_path)
    for module, (text, _) in PLANTED.items():
        with (package / f"{module.replace('.', '/')}.py").open("a") as file:
            file.write(f"\n{text}\n")
    done = _contract(tmp_path)
    assert done.returncode != 0
    edges = [f"alt_hpc.{module} -> alt_hpc.{of} (l." for module, (_, of) in PLANTED.items()]
    assert [edge for edge in edges if edge not in done.stdout] == []


def test_a_module_in_no_layer_is_found(tmp_path: Path) -> None:
    (_package(tmp_path) / "strange.py").touch()
    done = _contract(tmp_path)
    assert done.returncode != 0
    assert "strange" in done.stdout


# ---------------------------------------------------------------------- a new stage or kind


NEW_STAGE = '''"""lengths: how long the held-out answers of an iteration are."""

from alt_hpc.graph import MEASURE
from alt_hpc.run import rows
from alt_hpc.stages.work import Work


def run(work: Work) -> None:
    """One row a post and variant."""
    found = rows.of_stage(work.run, work.piece.iteration, MEASURE)
    work.attempt.commit_rows([{"row": row["row"], "length": row["length"]} for row in found])
'''
NEW_ROW = """\
    Stage(
        "lengths",
        sources=lambda g, k, _: g.of(k, MEASURE),
        made=lambda graph, k: True,
        rows="lengths",
    ),
)
STAGES"""
NEW_METHOD = '''"""tokens: the better and the worse half of the answers get a new token in front."""

from typing import Literal

from alt_hpc.methods import quantiles
from alt_hpc.methods.method import Choice, Label, LossView, Method

TOKENS = ["<better>", "<worse>"]


class Settings(Method):
    kind: Literal["tokens"] = "tokens"

    @property
    def levels(self):
        return TOKENS

    @property
    def family(self):
        return 2

    def asked(self, iteration):
        return ("plain", "best", "worst") if iteration else ("plain",)

    def ask(self, how, row, known={}, seed=0):
        return {"plain": None, "best": TOKENS[0], "worst": TOKENS[1]}[how]

    def label(self, row):
        found = quantiles.quantiles(row["rewards"], 2)
        return Label(found, [None if q is None else TOKENS[q] for q in found])

    def select(self, label, finished, rng):
        some = quantiles.select(label.quantiles, finished, 2, rng)
        return [Choice(i, label.feedback[i], label.quantiles[i]) for i in some]

    adds_tokens = True

    def extend(self, tokenizer):
        return bool(tokenizer.add_tokens(TOKENS, special_tokens=True))

    def prepare(self, model, tokenizer, seed):
        model.resize_token_embeddings(len(tokenizer))

    def silent(self, tokenizer, rows):
        known = tokenizer.get_vocab()
        return [known[token] for token in TOKENS if known.get(token, rows) < rows]

    def loss_view(self, tokenizer):
        return LossView("plain", len(tokenizer) - len(TOKENS))
'''
NEW_REWARD = '''"""letters: how many different letters an answer has."""

from typing import Literal

from alt_hpc.rewards.reward import Reward, Scored


class Settings(Reward):
    kind: Literal["letters"] = "letters"
    most: float = 20.0

    def load(self, given):
        return self

    def score(self, groups):
        for answers in groups:
            yield Scored([min(float(len(set(text))), self.most) for text in answers.texts])
'''
NEW_ENGINE = '''"""dice: answers of random bytes."""

import random
from typing import Literal

from alt_hpc.engines.engine import Engine


class Settings(Engine):
    kind: Literal["dice"] = "dice"

    def load(self, model):
        return Dice(model)


class Dice:
    def __init__(self, model):
        self.model, self.together = model, True

    def sample(self, groups, decoding):
        for group in groups:
            yield [[self.answer(ask, i) for i in range(decoding.answers)] for ask in group]

    def answer(self, ask, number):
        from alt_hpc.lm.decode import Generation

        roll = random.Random(f"{ask.seed} {number} {sum(ask.ids)}")
        words = [roll.randrange(256) for _ in range(roll.randrange(1, 6))]
        return Generation([*words, self.model.ends[0]], "eos")
'''
NEW_DOMAIN = '''"""turn: a turn of a dialogue."""

from typing import Literal

from alt_hpc.domains.domain import Domain


class Settings(Domain):
    kind: Literal["turn"] = "turn"
    template: str = "{feedback}Q: {prompt}"

    def around(self, feedback):
        return super().around(feedback or "")
'''
NEW_KINDS = {  # table -> its file, the name of the new kind, and what stands in the kind's own file
    "METHODS": ("methods", "tokens", NEW_METHOD),
    "REWARDS": ("rewards", "letters", NEW_REWARD),
    "ENGINES": ("engines", "dice", NEW_ENGINE),
    "DOMAINS": ("domains", "turn", NEW_DOMAIN),
}


def _with_new_ones(place: Path) -> list[str]:
    """A copy of the package with all of these in it; what a config says to use them."""
    package = _package(place)
    graph = (package / "graph.py").read_text()
    assert graph.count(")\nSTAGES") == 1
    (package / "graph.py").write_text(graph.replace(")\nSTAGES", NEW_ROW))
    (package / "stages/lengths.py").write_text(NEW_STAGE)
    chosen = []
    for table, (folder, kind, text) in NEW_KINDS.items():
        (package / folder / f"{kind}.py").write_text(text)
        init = package / folder / "__init__.py"
        before, row = init.read_text(), f'{table}: dict[str, ModuleType] = {{"{kind}": {kind}, '
        after = before.replace(f"{table}: dict[str, ModuleType] = {{", row)
        assert after != before
        imports = f"\nfrom alt_hpc.{folder} import {kind}\nfrom alt_hpc"
        init.write_text(after.replace("\nfrom alt_hpc", imports, 1))
        chosen.append(f"{folder.removesuffix('s')}={{kind: {kind}}}")
    return chosen


@pytest.mark.parametrize("backend", ["local", pytest.param("slurm", marks=pytest.mark.faults)])
def test_a_stage_and_a_kind_of_each_table_are_one_file_and_one_row(
    request: pytest.FixtureRequest, tiny_config: Path, tmp_path: Path, backend: str
) -> None:
    """All of them at once; the method is Quark's, but for its pool."""
    if backend == "slurm":
        request.getfixturevalue("slurm")
    chosen = [*_with_new_ones(tmp_path), f"cluster.backend={backend}", f"run={tmp_path}/run"]
    chosen += ["iterations=1", "train.kl=0.05", "cluster.train.nodes=1", "cluster.lengths.cpus=2"]
    chosen += ["train.train_embeddings=true"]
    assert _contract(tmp_path).returncode == 0

    def alt_hpc(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "alt_hpc", *command],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    settings = [word for value in chosen for word in ("--set", value)]
    assert "run-lengths-1" in alt_hpc("plan", str(tiny_config), *settings)
    start = ["run"] if backend == "local" else ["submit", "--wait"]
    alt_hpc(*start, str(tiny_config), *settings)

    run = RunFolder(tmp_path / "run")
    keys = [entry.key for entry in run.journal.of(Submitted)]
    assert {"0:lengths:1", "1:lengths:1"} <= set(keys)
    for k, ways in ((0, 1), (1, 3)):  # the method asks in one way at 0
        (file,) = run.path.glob(f"iterations/00{k}/lengths/00000/attempt-1/lengths.jsonl")
        assert len(file.read_text().splitlines()) == 6 * ways + 4 * 4  # and those drawn
    assert re.search(r"lengths 1 +shards 1/1 +whole", alt_hpc("status", str(run.path)))
    by_hand = alt_hpc("stage", "lengths", str(run.path), "--iteration", "1")
    assert "lengths 1 shard 0: whole already" in by_hand

    (scores,) = run.path.glob("iterations/001/score/00000/attempt-1/scores.jsonl")
    row = json.loads(scores.read_text().splitlines()[0])
    assert set(row["feedback"]) == {"<better>", "<worse>"}
    assert all(reward == int(reward) for reward in row["rewards"])
    table = run.layout.table.read_text()
    assert re.search(r"1 \| +<better> \|", table)
    assert not re.search(r"0 \| +<better> \|", table)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.path / "policies/001")
    model = transformers.AutoModelForCausalLM.from_pretrained(run.path / "policies/001")
    new = tokenizer.convert_tokens_to_ids(["<better>", "<worse>"])
    assert tokenizer("<better>Q: x")["input_ids"][0] == new[0]
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert model.generation_config.suppress_tokens == new
