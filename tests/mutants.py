"""Plants faults in the core, one at a time, and counts those that the tests catch.

    python tests/mutants.py plan --count 40 --seed 1

A fault is a small change of one place: another comparison, a number a little larger, a condition
turned round, a statement left out. Each is planted in a copy of the package; the tests of that
module then run in a process forked from this one, which has imported torch once. Faults that no
test catches are printed. tests/mutants.md has what was found.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORE = {  # module -> the tests that are to catch its faults
    "methods/quantiles.py": ["test_methods.py"],
    "methods/words.py": ["test_methods.py"],
    "plan.py": ["test_plan.py"],
    "lm/decode.py": ["test_generate.py"],
    "lm/prefix.py": ["test_generate.py"],
    "training/losses.py": ["test_losses.py"],
    "training/examples.py": ["test_losses.py"],
    "report/measures.py": ["test_metrics.py"],
    "rewards/heads.py": ["test_reward.py"],
    "run/manifests.py": ["test_runfolder.py"],
}
WITHIN_S = 300.0
COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
COMPUTED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "sorted": "list"}


def mutated(node: ast.AST) -> Iterator[ast.AST]:
    """Small changes of one node."""
    new = copy.deepcopy(node)
    match new:
        case ast.Compare(ops=[operator]) if type(operator) in COMPARED:
            new.ops = [COMPARED[type(operator)]()]
        case ast.BinOp(op=operator) | ast.AugAssign(op=operator) if type(operator) in COMPUTED:
            new.op = COMPUTED[type(operator)]()
        case ast.BoolOp(op=ast.And()):
            new.op = ast.Or()
        case ast.BoolOp(op=ast.Or()):
            new.op = ast.And()
        case ast.UnaryOp(op=ast.Not()):
            new = new.operand
        case ast.If() | ast.IfExp() | ast.While():
            new.test = ast.UnaryOp(ast.Not(), new.test)
        case ast.Constant(value=bool(value)):
            new.value = not value
        case ast.Constant(value=int(value)):
            new.value = value + 1
        case ast.Constant(value=float(value)):
            new.value = value * 1.02 + 0.01
        case ast.Call(func=ast.Name(id=name)) if name in NAMES:
            new.func = ast.Name(NAMES[name], ast.Load())
        case ast.Expr(value=ast.Call()) | ast.AugAssign():
            new = ast.Pass()
        case _:
            return
    yield new


def sites(tree: ast.Module) -> list[tuple[ast.AST, str, int | None]]:
    """(parent, field, index) of every node that may be changed: no annotation, no sentence."""
    found: list[tuple[ast.AST, str, int | None]] = []

    def visit(node: ast.AST) -> None:
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list", "type_params", "type_ignores"):
                continue
            if isinstance(node, ast.keyword) and node.arg == "strict":  # of zip: a guard
                continue
            for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if not isinstance(child, ast.AST) or isinstance(child, ast.Raise | ast.JoinedStr):
                    continue
                if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                    continue
                if any(mutated(child)):
                    found.append((node, field, index))
                visit(child)

    visit(tree)
    return found


def plant(source: str, number: int) -> tuple[str, int, str, str]:
    """The source with its fault of that number; its line, and the place before and after."""
    tree = ast.parse(source)
    parent, field, index = sites(tree)[number]
    value = getattr(parent, field)
    node = value if index is None else value[index]
    (new,) = mutated(node)
    before, after = ast.unparse(node).split("\n")[0], ast.unparse(new).split("\n")[0]
    if index is None:
        setattr(parent, field, new)
    else:
        value[index] = new
    return ast.unparse(ast.fix_missing_locations(tree)), node.lineno, before, after  # type: ignore[attr-defined]


def is_caught(module: str, source: str) -> bool:
    """Whether the module's tests fail, or do not end, with this source in its place."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as place:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "alt_hpc", f"{place}/alt_hpc", ignore=ignored)
        Path(place, "alt_hpc", module).write_text(source)
        child = os.fork()
        if not child:
            _run_tests(module, place)
        deadline = time.monotonic() + WITHIN_S
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return True
            time.sleep(0.05)
        return os.waitstatus_to_exitcode(ended[1]) != 0


def _run_tests(module: str, place: str) -> None:
    import pytest

    os.setsid()
    os.chdir(ROOT)
    sys.path.insert(0, place)
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
        files = [f"tests/{name}" for name in CORE[module]]
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={place}/t"]
        os._exit(int(pytest.main([*files, *options])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("modules", nargs="*", help="parts of names; none: the whole core")
    parser.add_argument("--count", type=int, default=20, help="faults of each module")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    import hypothesis  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    chosen = [m for m in CORE if not options.modules or any(n in m for n in options.modules)]
    for module in chosen:
        source = (ROOT / "alt_hpc" / module).read_text()
        assert not is_caught(module, source), f"{module}: its tests fail without any fault"
        total = len(sites(ast.parse(source)))
        picked = sorted(random.Random(options.seed).sample(range(total), min(total, options.count)))
        missed = []
        for number in picked:
            text, line, before, after = plant(source, number)
            if not is_caught(module, text):
                missed.append(f"{module}:{line}: `{before}` -> `{after}`")
                print("missed:", missed[-1], flush=True)
        caught = len(picked) - len(missed)
        print(f"{module}: {caught} of {len(picked)} caught ({total} places)", flush=True)


if __name__ == "__main__":
    main()
