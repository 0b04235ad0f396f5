"""Reading, overriding and writing `unitdist.config.Config` as YAML.

Plain YAML reads `5e-5` as text, `on` as true, and lets the last of two equal keys win. Here numbers are what a
reader takes for numbers, only `true` and `false` are booleans, and a key given twice is an error. A file may name
another one under `base:`; its own keys then replace that file's.
"""

import ast
import dataclasses
import difflib
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from unitdist.config import Config
from unitdist.errors import ConfigError

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "configs"


class _Yaml(yaml.SafeLoader):
    """YAML with booleans `true`/`false` only, and floats such as `5e-5`."""


_Yaml.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag == "tag:yaml.org,2002:null"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))
_Yaml.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)
_Yaml.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Yaml.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(node.value))


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` overrides, and check everything.

    A bare name (`imagenet_r101_unit.yaml`, with or without the ending) is found in configs/.
    Raises ConfigError naming file, line and dotted key.
    """
    file = find_config(path)
    tree = _read_tree(file, seen=())
    for override in overrides:
        key, value = parse_override(override)
        _merge(tree, _nest(key, (value, f"command line: {key}")))
    config = _build(tree)
    if config.run.name is None:
        return dataclasses.replace(config, run=dataclasses.replace(config.run, name=file.stem))
    return config


def find_config(path: Path | str) -> Path:
    """The file itself, or the one of that name under configs/. Raises ConfigError with the nearest name."""
    path = Path(path)
    candidates = [path, CONFIG_FOLDER / path, CONFIG_FOLDER / f"{path}.yaml"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = sorted(str(file.relative_to(CONFIG_FOLDER)) for file in CONFIG_FOLDER.rglob("*.yaml"))
    raise ConfigError(f"no such config: {path}{_nearest(str(path), known)}; configs/ holds: {', '.join(known)}")


def parse_override(text: str) -> tuple[str, Any]:
    """`section.key=value` -> (dotted key, typed value). Raises ConfigError."""
    key, equals, value = text.partition("=")
    if not equals or key.count(".") != 1:
        raise ConfigError(
            f"cannot read the argument {text!r}; overrides look like section.key=value, e.g. train.epochs=90"
        )
    if value != "null" and _is_text(key):
        return key, value
    try:
        return key, yaml.load(value, Loader=_Yaml)
    except yaml.YAMLError:
        raise ConfigError(f"{key}: cannot read the value {value!r} as YAML") from None


def _is_text(key: str) -> bool:
    """True for a key whose value is free text: `run.name=1` means the text "1"."""
    section, name = key.split(".")
    kinds = {part.name: typing.cast(type, part.type) for part in dataclasses.fields(Config)}
    if section not in kinds:
        return False
    kind = {part.name: part.type for part in dataclasses.fields(kinds[section])}.get(name)
    return kind is str or kind == (str | None)


def config_from_dict(tree: dict[str, Any]) -> Config:
    """Nested plain dict (as stored in a checkpoint) -> Config, as strictly as from a file."""
    return _build({section: {key: (value, "") for key, value in fields.items()} for section, fields in tree.items()})


def config_to_dict(config: Config) -> dict[str, Any]:
    """Config -> nested dict of plain values (tuples become lists), the inverse of `config_from_dict`."""
    return {
        section: {key: _plain(value) for key, value in fields.items()}
        for section, fields in dataclasses.asdict(config).items()
    }


def dump_config(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal Config."""
    lines = []
    for section, fields in config_to_dict(config).items():
        lines.append(f"{section}:")
        lines += [f"  {key}: {_scalar(value)}" for key, value in fields.items()]
    return "\n".join(lines) + "\n"


def describe_keys() -> str:
    """Every dotted key with its type, default and meaning, for `--help`."""
    lines = []
    for section in dataclasses.fields(Config):
        kind = typing.cast(type, section.type)
        lines.append(f"{section.name}: {inspect.getdoc(kind)}")
        meanings = field_meanings(kind)
        for key in dataclasses.fields(kind):
            head = f"  {section.name}.{key.name} = {plain_default(key)}"
            lines.append(f"{head}  ({type_name(key.type)})")
            lines.append(textwrap.indent(textwrap.fill(meanings[key.name], 110), " " * 6))
    return "\n".join(lines)


def plain_default(key: "dataclasses.Field[Any]") -> str:
    """The default of a key as it would stand in YAML."""
    return _scalar(_plain(key.default))


def field_meanings(kind: type) -> dict[str, str]:
    """The docstring line that follows each field of a config dataclass."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    meanings = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            assert isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant), statement.target.id
            meanings[statement.target.id] = str(following.value.value)
    return meanings


# A tree is {section: {key: (value, where)}}; `where` is "file:line" or "command line: key", for messages.
_Tree = dict[str, dict[str, tuple[Any, str]]]


def _read_tree(file: Path, seen: tuple[Path, ...]) -> _Tree:
    if file.resolve() in seen:
        raise ConfigError(f"{file}: base: leads back to this file")
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=_Yaml)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{file}:{line}: not valid YAML: {error.problem}") from None
    tree: _Tree = {}
    base: str | None = None
    for name, where, node in _pairs(root, file, ""):
        if name == "base":
            base = str(_value(node, file))
            continue
        tree[name] = {key: (_value(child, file), place) for key, place, child in _pairs(node, file, f"{name}.")}
        if not tree[name]:
            tree[name][""] = ({}, where)
    if base is None:
        return tree
    merged = _read_tree(
        find_config(file.parent / base if (file.parent / base).is_file() else base), (*seen, file.resolve())
    )
    _merge(merged, tree)
    return merged


def _pairs(node: Any, file: Path, prefix: str) -> Iterator[tuple[str, str, Any]]:
    """(key, place, value node) of a mapping; an empty file or section has none. Refuses duplicates."""
    if node is None or (isinstance(node, yaml.ScalarNode) and node.value == ""):
        return
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            f"{file}:{node.start_mark.line + 1}: {prefix.rstrip('.') or 'a config'} must hold `key: value` lines"
        )
    seen: set[str] = set()
    for key_node, value_node in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in seen:
            raise ConfigError(f"{file}:{line}: duplicate key {prefix}{key}")
        seen.add(key)
        yield key, f"{file}:{line}", value_node


def _value(node: Any, file: Path) -> Any:
    loader = _Yaml("")
    try:
        return loader.construct_object(node, deep=True)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{file}:{node.start_mark.line + 1}: {error.problem}") from None


def _nest(key: str, leaf: tuple[Any, str]) -> _Tree:
    section, name = key.split(".")
    return {section: {name: leaf}}


def _merge(into: _Tree, other: _Tree) -> None:
    for section, fields in other.items():
        into.setdefault(section, {}).update(fields)


def _build(tree: _Tree) -> Config:
    sections = {section.name: typing.cast(type, section.type) for section in dataclasses.fields(Config)}
    built = {}
    for name, fields in tree.items():
        places = [place for _, place in fields.values()]
        if name not in sections:
            raise ConfigError(
                f"{_at(places)}unknown section {name}{_nearest(name, list(sections))}; sections: {', '.join(sections)}"
            )
        kind = sections[name]
        keys = {field.name: field.type for field in dataclasses.fields(kind)}
        values = {}
        for key, (value, place) in fields.items():
            if key == "":
                continue
            if key not in keys:
                raise ConfigError(f"{_at([place])}unknown key {name}.{key}{_nearest(key, list(keys))}")
            values[key] = _typed(value, keys[key], f"{_at([place])}{name}.{key}")
        try:
            built[name] = kind(**values)
        except ConfigError as error:
            guilty = [place for key, (_, place) in fields.items() if str(error).startswith(f"{name}.{key}:")]
            raise ConfigError(f"{_at(guilty)}{error}") from None
    return Config(**built)


def _at(places: Sequence[str]) -> str:
    place = next((place for place in places if place), "")
    return "" if not place or place.startswith("command line") else f"{place}: "


def _nearest(given: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def _typed(value: Any, kind: Any, key: str) -> Any:
    """`value` as the annotated type; int is taken for float, a list for a tuple. Raises ConfigError."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _typed(value, next(part for part in arguments if part is not type(None)), key)
    if origin is Literal:
        if value in arguments and not isinstance(value, bool):
            return value
        raise ConfigError(
            f"{key}: expected one of {', '.join(map(str, arguments))}, got {value!r}{_nearest(str(value), list(map(str, arguments)))}"
        )
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{key}: expected a list, got {value!r}")
        variadic = len(arguments) == 2 and arguments[1] is Ellipsis
        if not variadic and len(value) != len(arguments):
            raise ConfigError(f"{key}: expected {len(arguments)} values, got {len(value)}: {value!r}")
        kinds = [arguments[0]] * len(value) if variadic else list(arguments)
        return tuple(
            _typed(item, item_kind, f"{key}[{i}]") for i, (item, item_kind) in enumerate(zip(value, kinds, strict=True))
        )
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise ConfigError(f"{key}: expected {type_name(kind)}, got {value!r}")


def type_name(kind: Any) -> str:
    """A field's type in words, for users."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if part is type(None) else type_name(part) for part in arguments)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is tuple:
        return (
            f"list of {type_name(arguments[0])}"
            if arguments[-1] is Ellipsis
            else f"list of {len(arguments)}, each {type_name(arguments[0])}"
        )
    return names[kind]


def _plain(value: Any) -> Any:
    """Tuples, also within tuples, as lists."""
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _scalar(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_scalar(item) for item in value) + "]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return (
            value
            if re.fullmatch(r"[A-Za-z_./][\w./:-]*", value) and value not in ("true", "false", "null")
            else repr(value)
        )
    return repr(value)
