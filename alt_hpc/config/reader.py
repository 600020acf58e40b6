"""Reads a config: YAML with overrides into the schema, errors with file, line and nearest key."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from alt_hpc.config import rules
from alt_hpc.config.schema import Config
from alt_hpc.errors import InputError, one_line
from alt_hpc.settings import LARGEST, Settings

RENAMED = {  # what a key is called now, by what it was called before
    "sampling": "sample",
    "sampling.engine": "engine.kind",
    "feedback": "method",
    "feedback.template": "domain.template",
    "training": "train",
    "evaluation": "evaluate",
    "reward_training": "reward_model",
    "reward_model.model": "reward.model",
    "reward_model.base": "reward.base",
    "reward_model.tokenizer": "reward.tokenizer",
    "reward_model.template": "reward.template",
    "reward_model.max_length": "reward.max_length",
    "reward_model.dtype": "reward.dtype",
    "sample.engine": "engine.kind",
    "method.template": "domain.template",
    "train.head_only": "reward_model.head_only",
    "train.max_length": "sft.max_length",
}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config and apply `key.sub=value` overrides.

    Raises
    ------
    InputError
        Unreadable file, YAML error, unknown or doubled key, wrong type, impossible value: with
        file, line and field.
    """
    reader, root = _read(path, overrides)
    config = reader.config(reader.plain(root, ""))
    try:
        rules.check(config)
    except InputError as error:
        raise reader.error(error.field, error.problem) from None
    return config


def located(error: InputError, path: str | Path, overrides: Sequence[str]) -> InputError:
    """An error found after loading, with the file and line where its field stands."""
    if not error.field:
        return error
    reader, root = _read(path, overrides)
    reader.plain(root, "")
    return reader.error(error.field, error.problem)


def _read(path: str | Path, overrides: Sequence[str]) -> tuple[_Reader, yaml.Node]:
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
    return _Reader(name).config(values)


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


class Unreadable(str):
    """A scalar that is no YAML value, such as an unknown !tag or an impossible date: no text."""


class _Reader:
    """A YAML tree as plain values, then as a config, remembering where each field stands."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.nodes: dict[str, yaml.Node] = {}  # of the values, by dotted name
        self.keys: dict[str, yaml.Node] = {}

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

    # ------------------------------------------------------------------ nodes to plain values

    def plain(self, node: yaml.Node, name: str) -> Any:
        """Mappings, lists and scalars as Python has them; keys are texts, none given twice."""
        self.nodes[name] = node
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, name)
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(child, f"{name}[{i}]") for i, child in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        value = self._scalar(node)
        if isinstance(value, str):
            self._check_text(value, node, name)
        return value

    def _mapping(self, node: yaml.MappingNode, name: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or not key:
                raise self.error(name, "expected a word as key", key_node)
            full = f"{name}.{key}" if name else key
            if key in values:
                raise self.error(full, f"key '{key}' is given twice", key_node)
            self._check_text(key, key_node, one_line(full))
            self.keys[full] = key_node
            values[key] = self.plain(value_node, full)
        return values

    def _check_text(self, text: str, node: yaml.Node, name: str) -> None:
        """No text may hold NUL or half a character; what reaches Slurm must be one plain line."""
        if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
            raise self.error(name, "the text holds a character that no file can hold", node)
        slurm = name == "run" or name.startswith("cluster.")
        if slurm and not text.isprintable():
            raise self.error(name, "the text holds a line break or control character", node)

    @staticmethod
    def _scalar(node: yaml.ScalarNode) -> Any:
        loader = yaml.SafeLoader("")
        try:
            value = loader.construct_object(node, deep=True)
            if isinstance(value, int | float) and ":" in node.value:
                return node.value  # YAML 1.1 reads 1:30:00 as 5400
            return value
        except (yaml.YAMLError, ValueError):  # such as an unknown !tag or an impossible date
            return Unreadable(node.value)

    # ------------------------------------------------------------------ plain values to a config

    def config(self, values: Any) -> Config:
        """The config; raises InputError at the first value that the schema refuses."""
        try:
            return Config.model_validate(values)
        except ValidationError as wrong:
            found = [self._located(one, values) for one in wrong.errors(include_url=False)]
            name, problem, node = min(found, key=lambda one: _line(one[2]))
            raise self.error(name, problem, node) from None

    def _located(self, error: Any, values: Any) -> tuple[str, str, yaml.Node | None]:
        """Name, problem and node of what pydantic refuses."""
        name, at = "", values
        for part in error["loc"]:  # the kind of a section stands in there too: it is no key
            if isinstance(at, dict) and part in at:
                name, at = f"{name}.{part}" if name else str(part), at[part]
            elif isinstance(at, list) and isinstance(part, int):
                name, at = f"{name}[{part}]", at[part]
        key = error["loc"][-1] if error["loc"] else ""
        if error["type"] == "extra_forbidden":
            return name, _unknown(name, str(key), error["loc"]), self.keys.get(name)
        node = self.nodes.get(name)
        if error["type"] == "missing":
            return f"{name}.{key}" if name else key, f"the key '{key}' is missing", node
        if error["type"].startswith("union_tag"):
            name, at = f"{name}.kind", at["kind"]
            node = self.nodes.get(name)
        written = node.value if isinstance(node, yaml.ScalarNode) else at
        return name, _problem(error, at, written), node


def _line(node: yaml.Node | None) -> int:
    return LARGEST if node is None or node.start_mark is None else int(node.start_mark.line)


def _unknown(name: str, key: str, loc: Sequence[int | str]) -> str:
    """That a section has no such key, and the nearest that it has."""
    now = RENAMED.get(name)
    if now:
        return f"unknown key '{key}'; it is called '{now}' now"
    owner: Any = Config
    for part in loc[:-1]:
        owner = _within(owner, part)
    fields = {name for kind in _kinds(owner) for name in kind.model_fields}
    near = difflib.get_close_matches(key, sorted(fields), n=1, cutoff=0)
    return f"unknown key '{key}'" + (f"; the nearest valid key is '{near[0]}'" if near else "")


def _within(hint: Any, part: int | str) -> Any:
    """The type that stands at a place within another."""
    for kind in _kinds(hint):
        if part in kind.model_fields:
            return kind.model_fields[str(part)].annotation
        if "kind" in kind.model_fields and kind.model_fields["kind"].default == part:
            return kind
    values = [a for h in _options(hint) if typing.get_origin(h) in (dict, list) for a in [h]]
    return typing.get_args(values[0])[-1] if values else None


def _options(hint: Any) -> list[Any]:
    """The types of a union, what annotates them taken off."""
    if typing.get_origin(hint) is typing.Annotated:
        return _options(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [option for arg in typing.get_args(hint) for option in _options(arg)]
    return [hint]


def _kinds(hint: Any) -> list[type[Settings]]:
    options = _options(hint)
    return [
        option for option in options if isinstance(option, type) and issubclass(option, Settings)
    ]


_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a number",
    "string": "a text",
    "bool": "true or false",
    "list": "a list",
}


def _problem(error: Any, value: Any, written: Any) -> str:
    """What is wrong with a value, in words; `written` is as the file has it."""
    kind, about = error["type"], error.get("ctx", {})
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        return "expected a mapping of keys to values"
    if kind in ("literal_error", "union_tag_invalid", "union_tag_not_found"):
        choices = re.findall(r"'([^']*)'", about.get("expected") or about.get("expected_tags", ""))
        near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0)
        return f"expected one of {', '.join(choices)} (nearest: {near[0]})"
    if kind in ("too_short", "too_long"):
        return f"expected {about.get('min_length') or about.get('max_length')} values"
    if "le" in about and about["le"] == LARGEST:
        return f"{value} is too large (at most {LARGEST})"
    for limit, words in (
        ("ge", "at least"),
        ("gt", "more than"),
        ("le", "at most"),
        ("lt", "less than"),
    ):
        if limit in about:
            return f"expected {words} {about[limit]:g}, not {value}"
    expected = _EXPECTED.get(kind.partition("_")[0])
    if expected is None:
        return str(error["msg"])
    given = "a list or mapping" if isinstance(value, dict | list) else str(written)
    short = given if len(given) <= 60 else given[:60] + "..."
    return f"expected {expected}, not '{one_line(short)}'"
