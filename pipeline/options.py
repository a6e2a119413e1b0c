"""Options as frozen dataclasses: one field is one flag, one line of a YAML file and one sentence of ``--help``.

A command's options are a *tree*: a frozen dataclass whose fields are *sections*, frozen dataclasses beside the code
that uses them.  Flags are flat (``--batch_size``), files nested by section, and flags win over the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from pipeline.schema import UserError

T = TypeVar("T")

METAVARS: Final = {int: "N", float: "NUMBER", str: "NAME", Path: "PATH"}
TYPE_NAMES: Final = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
UNIONS: Final = (Union, types.UnionType)


def option(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    metavar: str | None = None,
    parse: Callable[[str], Any] | None = None,
) -> Any:
    """Declare a field of a section that is a flag.

    Args:
        default: the value where neither flag nor file gives one; ``dict`` for an empty one; ``dataclasses.MISSING``
            where one of them must.
        help: a sentence that can be read without its neighbours.
        minimum, maximum, above: bounds of a number, the first two included.
        metavar: what ``--help`` shows for the value.
        parse: makes the value of the flag's text, where its type does not say how; raises ValueError for a bad one.
    """
    bounds = {"minimum": minimum, "maximum": maximum, "above": above}
    metadata = {"help": help, "metavar": metavar, "parse": parse, **bounds}
    if default is dict:
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_section(section: Any) -> None:
    """Raise UserError, naming the flag, unless every field of a section has its type and is in its range."""
    hints = get_type_hints(type(section))
    for field in dataclasses.fields(section):
        value, kind = getattr(section, field.name), hints[field.name]
        if not _is_of(value, kind):
            raise UserError(f"--{field.name} must be {_type_name(kind)}, not {value!r}")
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, int | float) and not isinstance(item, bool):
                _check_number(field, item)


def _check_number(field: dataclasses.Field[Any], value: float) -> None:
    low, high, above = (field.metadata.get(name) for name in ("minimum", "maximum", "above"))
    if above is not None and not above < value < math.inf:
        raise UserError(f"--{field.name} must be above {above}, not {value}")
    if not ((low is None or value >= low) and (high is None or value <= high)):
        bound = f"at least {low}" if high is None else f"from {low} to {high}"
        raise UserError(f"--{field.name} must be {bound}, not {value}")


class Section:
    """Base of a section: a flag, a file and Python code are held to the same rules."""

    def __post_init__(self) -> None:
        check_section(self)


def parse_options(
    tree: type[T], arguments: Sequence[str] | None, *, prog: str, description: str, positional: str | None = None
) -> T:
    """Return the options of a command line; see :func:`parse_explicit_options`."""
    return parse_explicit_options(tree, arguments, prog=prog, description=description, positional=positional)[0]


def parse_explicit_options(
    tree: type[T], arguments: Sequence[str] | None, *, prog: str, description: str, positional: str | None = None
) -> tuple[T, frozenset[str]]:
    """Return the options of a command line, over those of ``--config FILE.yaml``, over the defaults.

    Beside it stand the names of the options that the command line or the file sets, also to the default.

    Args:
        tree: a frozen dataclass of sections.
        arguments: the command line; None = that of the process.
        prog: the command's name.
        description: its first line of help.
        positional: the name of a field that is given without a flag, or names of several in their order.
    """
    without_flag = (positional or "").split()
    usage = " ".join([prog, *map(str.upper, without_flag), "[--OPTION VALUE …]"])
    parser = OneLineParser(prog=prog, usage=usage, description=description, allow_abbrev=False)
    parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="Read options from this file; flags win.")
    sections = get_type_hints(tree)
    for section in sections.values():
        title = (section.__doc__ or section.__name__).splitlines()[0].rstrip(".")
        group = parser.add_argument_group(title, argument_default=argparse.SUPPRESS)
        hints = get_type_hints(section)
        for field in dataclasses.fields(section):
            _add_flag(group, field, hints[field.name], positional=field.name in without_flag)
    flags = {name: _to_tuple(value) for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    saved = read_options(flags["config"], sections) if "config" in flags else {}
    built: dict[str, Any] = {}
    explicit: set[str] = set()
    for name, section in sections.items():
        fields = dataclasses.fields(section)
        values = saved.get(name, {}) | {field.name: flags[field.name] for field in fields if field.name in flags}
        for field in fields:
            if field.name not in values and field.default is field.default_factory is dataclasses.MISSING:
                flag = field.metadata["metavar"] if field.name in without_flag else f"--{field.name}"
                parser.error(f"the following arguments are required: {flag}")
        built[name] = section(**values)
        explicit |= values.keys()
    return tree(**built), frozenset(explicit)


def read_options(path: Path, sections: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the values of a YAML file of options, by section and field.

    A list stands for a tuple, and text for whatever the flag would make of it.
    """
    import yaml  # noqa: PLC0415  # most command lines name no file

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: cannot be read ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict) or not all(isinstance(values, dict) for values in content.values()):
        raise UserError(f"--config {path}: not a file of options; give the config.yaml of a run")
    for name, values in content.items():
        known = {field.name: field for field in dataclasses.fields(sections[name])} if name in sections else {}
        unknown = [str(key) for key in values if key not in known] if known else ["*"]
        if unknown:
            raise UserError(f"--config {path}: there is no option {name}.{unknown[0]}; remove it from the file")
        hints = get_type_hints(sections[name])
        for key, value in values.items():
            try:
                values[key] = _from_yaml(value, known[key].metadata["parse"], _members(hints[key]))
            except ValueError as error:
                raise UserError(f"--config {path}: {name}.{key}: {error}") from None
    return content


def _from_yaml(value: Any, parse: Callable[[str], Any] | None, kinds: Sequence[Any]) -> Any:
    if isinstance(value, str) and parse is not None:
        return parse(value)
    return Path(value) if isinstance(value, str) and Path in kinds else _to_tuple(value)


def _to_tuple(value: Any) -> Any:
    return tuple(map(_to_tuple, value)) if isinstance(value, list) else value


def from_dict(section: type[T], values: Mapping[str, Any]) -> T:
    """Return a section of the values that :func:`to_dict` gave."""
    return section(**{name: _to_tuple(value) for name, value in values.items()})


def to_dict(tree: Any) -> dict[str, dict[str, Any]]:
    """Return a tree of options as :func:`read_options` reads it: values of JSON, by section and field."""
    values: dict[str, dict[str, Any]] = json.loads(json.dumps(dataclasses.asdict(tree), default=str))
    return values


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are a UserError of one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


class _Collect(argparse.Action):
    """Takes the one value of a flag as it is, and those of a flag that is given several times as a tuple."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        before = getattr(namespace, self.dest, ())
        before = before if isinstance(before, tuple) else (before,)
        setattr(namespace, self.dest, (*before, values) if before else values)


def _add_flag(group: Any, field: dataclasses.Field[Any], kind: Any, *, positional: bool) -> None:
    is_plain = field.default is False or field.default in (None, "", (), dataclasses.MISSING)
    default = "" if is_plain else f" Default: {_shown(field.default)}."
    help_ = (field.metadata["help"] + default).replace("%", "%%")
    members = _members(kind)
    choices = [word for member in members if get_origin(member) is Literal for word in get_args(member)]
    metavar = field.metadata["metavar"] or (None if choices else METAVARS.get(members[0]))
    settings: dict[str, Any] = {"help": help_, "metavar": metavar}
    if field.metadata["parse"] is not None:
        settings["type"] = _naming_errors(field.metadata["parse"])
    elif members == [bool]:
        settings = {"help": help_, "action": argparse.BooleanOptionalAction}
    elif get_origin(kind) is tuple:
        settings |= {"type": get_args(kind)[0], "nargs": "+"}
    elif choices and len(members) == 1:
        settings["choices"] = choices
    elif any(get_origin(member) is tuple for member in members):
        settings |= {"type": members[0], "action": _Collect}
    else:
        plain = next(member for member in members if get_origin(member) is not Literal)
        settings["type"] = lambda text: text if text in choices else plain(text)
        settings["type"].__name__ = plain.__name__  # argparse names it in errors
    if positional:
        group.add_argument(field.name, nargs="?", default=None, **settings)  # argparse would parse SUPPRESS
    else:
        group.add_argument(f"--{field.name}", **settings)


def _shown(value: Any) -> str:
    """Return a default as one would type it."""
    if not isinstance(value, tuple):
        return str(value)
    separator = " " if all(isinstance(item, str) for item in value) else ","
    return separator.join("=".join(item) if isinstance(item, tuple) else str(item) for item in value)


def _naming_errors(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


def _members(kind: Any) -> list[Any]:
    """Return the types of a union other than None; of any other type the type itself."""
    return [member for member in get_args(kind) if member is not type(None)] if get_origin(kind) in UNIONS else [kind]


def _is_of(value: Any, kind: Any) -> bool:
    if get_origin(kind) in UNIONS:
        return any(_is_of(value, member) for member in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    if get_origin(kind) is tuple and isinstance(value, tuple):
        kinds = get_args(kind)
        items = kinds[:1] * len(value) if kinds[1:] == (...,) else kinds
        return len(items) == len(value) and all(map(_is_of, value, items))
    return isinstance(value, get_origin(kind) or kind) if kind is not Any else True


def _type_name(kind: Any) -> str:
    if get_origin(kind) in UNIONS:
        return " or ".join(map(_type_name, _members(kind)))
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    return "a list" if get_origin(kind) is tuple else TYPE_NAMES.get(kind, getattr(kind, "__name__", str(kind)))
