"""Reads a config: YAML with overrides into the schema, errors with file, line and nearest key."""

import difflib
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from alt_hpc.config import rules
from alt_hpc.config.schema import Config
from alt_hpc.errors import InputError, one_line
from alt_hpc.settings import KIND, LARGEST, Settings

_MOVED = ("model", "base", "tokenizer", "dtype", "template", "max_length")
RENAMED = {  # what a key is called now, by what it was called before
    "sampling": "sample",
    "feedback": "method",
    "training": "train",
    "evaluation": "evaluate",
    "reward_training": "reward_model",
    **{f"reward_model.{key}": f"reward.{key}" for key in _MOVED},
    "sample.engine": "engine.kind",
    "method.template": "domain.template",
    "train.head_only": "reward_model.head_only",
    "train.max_length": "sft.max_length",
}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """A config from YAML and `key.sub=value` overrides; InputError names file, line and field."""
    reader, values = _read(path, overrides)
    config = reader.config(values)
    try:
        rules.check(config)
    except InputError as error:
        raise reader.error(error.field, error.problem) from None
    return config


def located(error: InputError, path: str | Path, overrides: Sequence[str]) -> InputError:
    """An error found after loading, with the file and line where its field stands."""
    return _read(path, overrides)[0].error(error.field, error.problem) if error.field else error


def from_json(values: dict[str, Any], name: str) -> Config:
    """The config of a run folder (in a file of this name), which `load` has checked before."""
    return _Reader(name).config(values)


def _read(path: str | Path, overrides: Sequence[str]) -> "tuple[_Reader, Any]":
    """The config's plain values with the overrides in them, and who knows where each stands."""
    reader = _Reader(str(path))
    try:
        text = Path(path).read_text(encoding="utf-8")
        root = _compose(text, str(path))
        if root is None:
            raise InputError(f"{path}: the config is empty")
        for override in overrides:
            _override(root, override)
        return reader, reader.plain(root, "")
    except OSError as error:
        raise InputError(f"{path}: cannot read the config ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: the config is not UTF-8 text") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InputError(f"{path}:{line}: not valid YAML: {error.reason}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"{path}:{line}: not valid YAML: {error.problem}") from error
    except RecursionError as error:
        raise InputError(f"{path}: not valid YAML: nested too deeply") from error


def _compose(text: str, origin: str) -> Any:
    """The YAML tree of a text, or None; every node's mark names its origin."""
    loader = yaml.SafeLoader(text)
    loader.name = origin
    return loader.get_single_node()


def _override(root: yaml.Node, override: str) -> None:
    """Set one `a.b=value` in a YAML tree; the value is YAML itself."""
    name, equals, text = override.partition("=")
    if not equals or not name or not isinstance(root, yaml.MappingNode):
        raise InputError(f"--set {override}: expected key=value")
    origin = f"--set {name}"
    try:
        value = _compose(text, origin) or _compose("null", origin)
    except yaml.YAMLError as error:
        raise InputError(f"--set {override}: the value is not valid YAML") from error
    keys = name.split(".")
    for depth, key in enumerate(keys, start=1):
        below = next((child for k, child in root.value if k.value == key), None)
        if depth == len(keys) or not isinstance(below, yaml.MappingNode):
            below = yaml.MappingNode("tag:yaml.org,2002:map", [], value.start_mark)
            below = value if depth == len(keys) else below
            node = yaml.ScalarNode("tag:yaml.org,2002:str", key, value.start_mark)
            root.value = [pair for pair in root.value if pair[0].value != key] + [(node, below)]
        root = below


class _Reader:
    """A YAML tree as plain values, then as a config, remembering where each field stands."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.keys: dict[str, yaml.Node] = {}  # by dotted name
        self.nodes: dict[str, yaml.Node] = {}  # of the values

    def error(self, name: str, problem: str, node: yaml.Node | None = None) -> InputError:
        """An error at a field, or at the nearest parent that the file spells out."""
        parent = name
        while node is None and parent:
            node, parent = self.nodes.get(parent), parent.rpartition(".")[0]
        if node is not None and node.start_mark.name != self.path:  # an override has no lines
            return InputError(f"{node.start_mark.name}: {problem}")
        place = f"{self.path}:{node.start_mark.line + 1}" if node is not None else self.path
        return InputError(f"{place}: {name}: {problem}" if name else f"{place}: {problem}")

    def plain(self, node: yaml.Node, name: str) -> Any:
        """Mappings, lists and scalars as Python has them; keys are texts, none given twice."""
        self.nodes[name] = node
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(child, f"{name}[{i}]") for i, child in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            values: dict[str, Any] = {}
            for key_node, child in node.value:
                key = key_node.value
                if not isinstance(key_node, yaml.ScalarNode) or not key:
                    raise self.error(name, "expected a word as key", key_node)
                full = f"{name}.{key}".removeprefix(".")
                if key in values:
                    raise self.error(full, f"key '{key}' is given twice", key_node)
                self._check_text(key, key_node, one_line(full))
                self.keys[full] = key_node
                values[key] = self.plain(child, full)
            return values
        try:
            value = yaml.SafeLoader("").construct_object(node, deep=True)
        except (yaml.YAMLError, ValueError):  # such as an unknown !tag or an impossible date
            value = node.value
        if isinstance(value, int | float) and ":" in node.value:
            value = node.value  # YAML 1.1 reads 1:30:00 as 5400
        if isinstance(value, str):
            self._check_text(value, node, name)
        return value

    def _check_text(self, text: str, node: yaml.Node, name: str) -> None:
        """No text may hold NUL or half a character; what reaches Slurm must be one plain line."""
        if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
            raise self.error(name, "the text holds a character that no file can hold", node)
        if (name in ("run", "from") or name.startswith("cluster.")) and not text.isprintable():
            raise self.error(name, "the text holds a line break or control character", node)

    def config(self, values: Any) -> Config:
        """The config; InputError at the first value that the schema refuses."""
        try:
            return Config.model_validate(values)
        except ValidationError as wrong:
            found = [self._located(error) for error in wrong.errors(include_url=False)]
            found.sort(key=lambda one: one[2].start_mark.line if one[2] else LARGEST)
            raise self.error(*found[0]) from None

    def _located(self, error: Any) -> tuple[str, str, yaml.Node | None]:
        """Name, problem and node of what pydantic refuses."""
        name, below, key, value = "", "", "", error["input"]
        for key in error["loc"]:  # the kind of a section stands in there too: it is no key
            below = f"{name}[{key}]" if isinstance(key, int) else f"{name}.{key}".removeprefix(".")
            name = below if below in self.nodes or not self.nodes else name
        if error["type"] == "extra_forbidden":
            near = _nearest(key, sorted(set(_keys(Config, error["loc"][:-1]))))
            now = RENAMED.get(name)
            hint = f"it is called '{now}' now" if now else f"the nearest valid key is '{near}'"
            return name, f"unknown key '{key}'; {hint}", self.keys.get(name)
        if error["type"] == "missing":
            return below, f"the key '{key}' is missing", self.nodes.get(name)
        if error["type"] == "union_tag_invalid":
            name, value = f"{name}.kind", value["kind"]
        node = self.nodes.get(name)
        value = node.value if isinstance(node, yaml.ScalarNode) else value  # as it is written
        return name, _problem(error, value), node


def _nearest(word: Any, known: Sequence[str]) -> str:
    return difflib.get_close_matches(str(word), known, n=1, cutoff=0)[0]


def _keys(hint: Any, loc: Sequence[int | str]) -> Iterator[str]:
    """The keys of the sections that can stand at a place (pydantic's `loc`) within a type."""
    if isinstance(hint, type) and issubclass(hint, Settings):
        fields: dict[Any, Any] = hint.model_fields
        if not loc:
            yield from (field.alias or name for name, field in fields.items())
        elif str(loc[0]).startswith(KIND):
            if "kind" not in fields or f"{KIND}{fields['kind'].default}" == loc[0]:
                yield from _keys(hint, loc[1:])
        elif loc[0] in fields:
            yield from _keys(fields[loc[0]].annotation, loc[1:])
    elif typing.get_origin(hint) in (dict, list):
        yield from _keys(typing.get_args(hint)[-1], loc[1:])
    else:  # a union, or what annotates one
        for option in typing.get_args(hint):
            yield from _keys(option, loc)


_EXPECTED = {  # by pydantic's type of error, or its first word
    "model": "a mapping of keys to values",
    "dict": "a mapping of keys to values",
    "int": "a whole number, not '{short}'",
    "float": "a number, not '{short}'",
    "finite": "a number, not '{short}'",
    "string": "a text, not '{short}'",
    "bool": "true or false, not '{short}'",
    "list": "a list, not '{short}'",
    "too_short": "{min_length} values",
    "too_long": "{max_length} values",
    "greater_than_equal": "at least {ge:g}, not {value}",
    "greater_than": "more than {gt:g}, not {value}",
    "less_than_equal": "at most {le:g}, not {value}",
    "less_than": "less than {lt:g}, not {value}",
}


def _problem(error: Any, value: Any) -> str:
    kind, about = error["type"], error.get("ctx", {})
    expected = about.get("expected", about.get("expected_tags", ""))
    if choices := [one.removeprefix(KIND) for one in re.findall(r"'([^']*)'", expected)]:
        return f"expected one of {', '.join(choices)} (nearest: {_nearest(value, choices)})"
    if about.get("le") == LARGEST:
        return f"{value} is too large (at most {LARGEST})"
    expected = _EXPECTED.get(kind) or _EXPECTED.get(kind.partition("_")[0])
    if expected is None:
        return str(error["msg"])
    text = "a list or mapping" if isinstance(value, dict | list) else str(value)
    short = one_line(text if len(text) <= 60 else text[:60] + "...")
    return "expected " + expected.format(value=value, short=short, **about)
