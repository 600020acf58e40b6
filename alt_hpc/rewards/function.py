"""function: a Python function of the user's rates the answers to a prompt."""

import ast
import contextlib
import copy
import importlib
import inspect
import itertools
import math
import numbers
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from alt_hpc.errors import InputError, blaming, one_line, said
from alt_hpc.rewards.reward import Answers, File, Found, Given, Reward, Scored, Scorer
from alt_hpc.settings import GIVES_KIND


class Settings(Reward):
    """`NAME(prompt, answers, row)` gives a list of numbers; None sets an answer aside.

    The file is copied into the run. `row` is the data row with all its columns.
    """

    model_config = GIVES_KIND

    kind: Literal["function"] = "function"
    function: str
    """FILE.py:NAME, the file relative to the folder in which the run is submitted."""

    @property
    def split(self) -> tuple[str, str]:
        """File and name."""
        file, _, name = self.function.rpartition(":")
        return file, name

    @property
    def rates(self) -> None:
        return None

    def files(self) -> dict[str, str]:
        return {"function": self.split[0]}

    def check_keys(self) -> None:
        file, name = self.split
        if not (Path(file).suffix == ".py" and name.isidentifier()):
            problem = f"expected FILE.py:NAME, not '{one_line(self.function)}'"
            raise InputError(problem, ".function")

    def check(self, found: Found) -> None:
        with blaming(".function"):
            Function(*self.split, found.file("function"))

    def load(self, given: Given) -> Scorer:
        made = Function(*self.split, given.file("function"))
        if beside := ", ".join(made.beside.names()):
            place = made.beside.folder
            print(f"{made.said} imports {beside} from {place}: not kept in the run", flush=True)
        return made


class Beside:
    """The folder of a user's file, to import from; what came from there is known only within."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.modules = folder, dict[str, ModuleType]()
        self.own = ""  # the name of the user's file itself

    def __enter__(self) -> None:
        self.before = set(sys.modules)
        self.hidden = {name: sys.modules[name] for name in self.modules if name in sys.modules}
        sys.modules.update(self.modules)
        sys.path.insert(0, str(self.folder))

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(self.folder))
        for name in sys.modules.keys() - self.before - self.modules.keys():
            root = name.partition(".")[0]
            if root not in self.before and self._has(sys.modules.get(root)):
                self.modules[name] = sys.modules[name]
        for name in self.modules:
            sys.modules.pop(name, None)
        sys.modules.update(self.hidden)

    def _has(self, module: ModuleType | None) -> bool:
        spec = getattr(module, "__spec__", None)
        places = [spec.origin or "", *(spec.submodule_search_locations or ())] if spec else []
        return any(Path(place).parent == self.folder for place in places)

    def add(self, name: str, module: ModuleType) -> None:
        """The user's file itself, which has no other name than that of its copy."""
        taken = name in sys.modules or name in sys.stdlib_module_names
        self.own = f"{name}_of_the_user" if taken else name
        module.__name__ = self.own
        self.modules[self.own] = module

    def names(self) -> list[str]:
        """Modules and packages that came from the folder."""
        return sorted({name.partition(".")[0] for name in self.modules} - {self.own})


class Function:
    """A user's function, loaded: the scorer of kind `function`."""

    def __init__(self, file: str, name: str, place: File) -> None:
        """InputError where the file cannot be imported, or has no such function.

        `file` is what sentences call it.
        """
        self.said, self.name, self.original = file, name, str(place.original)
        self.beside, self.line = Beside(place.original.parent), 1
        importlib.invalidate_caches()
        found = self._import(place.kept).__dict__
        if name not in found:
            names = [key for key, value in found.items() if inspect.isfunction(value)]
            raise InputError(f"{file}: no function '{name}' (there are: {', '.join(names) or '-'})")
        self.function = found[name]
        if not callable(self.function):
            raise InputError(f"{self._here}: {name} is {_kind(self.function)}, not a function")
        with contextlib.suppress(ValueError):  # one in C may not say what it takes
            try:
                inspect.signature(self.function).bind("", [], {})
            except TypeError:
                problem = "cannot take three arguments (prompt, answers, row)"
                raise InputError(f"{self._here}: {name} {problem}") from None

    @property
    def _here(self) -> str:
        return f"{self.said}:{self.line}"

    def _import(self, place: Path) -> ModuleType:
        """Run the file, as if it stood where it was."""
        try:
            text = place.read_bytes()
            tree = ast.parse(text, self.original)
            compiled = compile(text, self.original, "exec", dont_inherit=True)
        except OSError as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
            raise InputError(f"{self.said}: {reason}") from error
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            line, reason = getattr(error, "lineno", None), getattr(error, "msg", None)
            problem = f"not valid Python ({one_line(reason or said(error))})"
            raise InputError(f"{self.said}:{line or 1}: {problem}") from error
        self.line = _line(tree, self.name)
        module = ModuleType(place.stem)
        module.__file__ = self.original
        self.beside.add(place.stem, module)
        try:
            with self.beside:
                exec(compiled, module.__dict__)
        except (Exception, SystemExit) as error:
            where = f"{self.said}:{self._last_line(error)}"
            raise InputError(f"{where}: cannot be imported: {_why(error)}") from error
        return module

    def _last_line(self, error: BaseException) -> int:
        """Of the traceback, in the user's file; else that of the function."""
        frames = traceback.walk_tb(error.__traceback__)
        lines = [line for frame, line in frames if frame.f_code.co_filename == self.original]
        return lines[-1] if lines else self.line

    def score(self, groups: Iterable[Answers]) -> Iterator[Scored]:
        for answers in groups:
            yield Scored(self._rewards(answers))

    def _rewards(self, answers: Answers) -> list[float]:
        """The numbers that the function gives, NaN for None; InputError where it gives others."""
        wanted, row = len(answers.texts), copy.deepcopy(dict(answers.row))
        at_row = f"(row {answers.number}{answers.of and f' of {answers.of}'})"
        try:
            with self.beside:
                given = self.function(answers.prompt, list(answers.texts), row)
                found, problem = _listed(given, wanted)
                rewards = [_number(value) for value in found]
        except (Exception, SystemExit) as error:
            where = f"{self.said}:{self._last_line(error)}"
            raise InputError(f"{where}: {self.name} raised {_why(error)} {at_row}") from error
        if not problem and None in rewards:
            at = rewards.index(None)
            problem = f"gave {_kind(found[at])} for answer {at + 1} of {wanted}, not a number"
        if problem:
            raise InputError(f"{self._here}: {self.name} {problem} {at_row}")
        return [reward for reward in rewards if reward is not None]


def _listed(given: Any, wanted: int) -> tuple[list[Any], str]:
    """What a function gave as a list of so many, or what is wrong with it."""
    dimensions = getattr(given, "ndim", 1)
    if dimensions != 1:
        return [], f"gave an array of {dimensions} dimensions, not {wanted} rewards"
    if hasattr(given, "tolist"):
        given = given.tolist()
    no_sequence = isinstance(given, str | bytes | Mapping | set | frozenset)
    if no_sequence or not isinstance(given, Iterable):
        return [], f"gave {_kind(given)}, not a list of {wanted} rewards"
    sized = hasattr(given, "__len__")
    found = list(given) if sized else list(itertools.islice(given, wanted + 1))
    if len(found) == wanted:
        return found, ""
    count = len(found) if sized or len(found) < wanted else f"more than {wanted}"
    return [], f"gave {count} reward{'s' * (count != 1)} for {wanted} answers"


def _kind(value: Any) -> str:
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _number(value: Any) -> float | None:
    """A reward as a float, NaN for None; None for what is no number."""
    if value is None:
        return math.nan
    if getattr(value, "ndim", None) == 0:  # a number of numpy or torch
        value = value.item()
    if not isinstance(value, numbers.Number) or isinstance(value, complex):
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError:
        return math.inf


def _line(tree: ast.Module, name: str) -> int:
    """Where a name is given its value for the last time, at the top level of a file."""
    found = [1]
    for node in tree.body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names = [node.name]
            case ast.Assign() | ast.AnnAssign():
                found_names = (one for one in ast.walk(node) if isinstance(one, ast.Name))
                names = [one.id for one in found_names if isinstance(one.ctx, ast.Store)]
            case ast.Import() | ast.ImportFrom():
                names = [alias.asname or alias.name for alias in node.names]
            case _:
                names = []
        found += [node.lineno] if name in names else []
    return found[-1]


def _why(error: BaseException) -> str:
    """An exception's name and what it says, on one line."""
    name = text = type(error).__name__
    with contextlib.suppress(Exception):  # it may not be able to say
        text = one_line(said(error))
    return name if text == name else f"{name}: {text}"
