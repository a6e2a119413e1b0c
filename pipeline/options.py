"""Options as frozen dataclasses: one field is one flag, one line of a YAML file and one sentence of ``--help``.

A command's options are a *tree*: a frozen dataclass whose fields are *sections*, frozen dataclasses beside the code
that uses them.  Flags are flat (``--batch_size``), files nested by section, and flags win over the file.  ``argparse``
does the parsing: it needs nothing installed, groups ``--help`` by section and tells given flags from defaults.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from pipeline.schema import UserError

T = TypeVar("T")


def option(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    metavar: str | None = None,
    parse: Callable[[str], Any] | None = None,
) -> Any:
    """Declare a field of a section that is a flag.

    Args:
        default: the value where neither flag nor file gives one.
        help: a sentence that can be read without its neighbours.
        minimum, maximum: the range of a number, both ends included.
        metavar: what ``--help`` shows for the value.
        parse: makes the value of the flag's text, where its type does not say how; raises ValueError for a bad one.
    """
    metadata = {"help": help, "minimum": minimum, "maximum": maximum, "metavar": metavar, "parse": parse}
    return dataclasses.field(default=default, metadata=metadata)


def check_section(section: Any) -> None:
    """Raise UserError, naming the flag, unless every field of a section has its type and is in its range.

    Sections call this in ``__post_init__``, so that a flag, a file and Python code are held to the same rules.
    """
    hints = get_type_hints(type(section))
    for field in dataclasses.fields(section):
        value, kind = getattr(section, field.name), hints[field.name]
        if not _is_of(value, kind):
            raise UserError(f"--{field.name} must be {_type_name(kind)}, not {value!r}")
        low, high = field.metadata.get("minimum"), field.metadata.get("maximum")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and not ((low is None or value >= low) and (high is None or value <= high)):
            bound = f"at least {low}" if high is None else f"from {low} to {high}"
            raise UserError(f"--{field.name} must be {bound}, not {value}")


def parse_options(
    tree: type[T], arguments: Sequence[str] | None, *, prog: str, description: str, positional: str | None = None
) -> T:
    """Return the options of a command line, over those of ``--config FILE.yaml``, over the defaults.

    Args:
        tree: a frozen dataclass of sections.
        arguments: the command line; None = that of the process.
        prog: the command's name.
        description: its first line of help.
        positional: the name of a field that is given without a flag.

    Raises:
        UserError: a flag is unknown, given twice over with a bad value, or the file is not one of options.
    """
    parser = OneLineParser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="Read options from this file; flags win.")
    sections = get_type_hints(tree)
    for section in sections.values():
        title = (section.__doc__ or section.__name__).splitlines()[0].rstrip(".")
        group = parser.add_argument_group(title, argument_default=argparse.SUPPRESS)
        hints = get_type_hints(section)
        for field in dataclasses.fields(section):
            _add_flag(group, field, hints[field.name], positional=field.name == positional)
    given = vars(parser.parse_args(arguments))
    config = given.pop("config")
    saved = {} if config is None else read_options(config, sections)
    built = {}
    for name, section in sections.items():
        own = {field.name: given[field.name] for field in dataclasses.fields(section) if field.name in given}
        built[name] = section(**{**saved.get(name, {}), **own})
    return tree(**built)


def read_options(path: Path, sections: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the values of a YAML file of options, by section and field.

    Raises:
        UserError: the file cannot be read, or names a section or an option that there is not.
    """
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
        for key, value in values.items():
            if isinstance(value, list):  # YAML has no tuples
                values[key] = tuple(tuple(item) if isinstance(item, list) else item for item in value)
    return content


def to_dict(tree: Any) -> dict[str, dict[str, Any]]:
    """Return a tree of options as :func:`read_options` gives it: plain values, by section and field."""
    return {
        section.name: {
            field.name: _plain(getattr(getattr(tree, section.name), field.name))
            for field in dataclasses.fields(getattr(tree, section.name))
        }
        for section in dataclasses.fields(tree)
    }


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are a UserError of one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def _add_flag(group: Any, field: dataclasses.Field[Any], kind: Any, *, positional: bool) -> None:
    default = "" if field.default in (None, "", dataclasses.MISSING) else f" Default: {field.default}."
    help_ = (field.metadata["help"] + default).replace("%", "%%")
    if positional:
        group.add_argument(field.name, metavar=field.metadata["metavar"], help=help_)
        return
    members = [member for member in get_args(kind) if member is not type(None)] if _is_union(kind) else [kind]
    settings: dict[str, Any] = {"help": help_, "metavar": field.metadata["metavar"]}
    choices = [word for member in members if get_origin(member) is Literal for word in get_args(member)]
    if field.metadata["parse"] is not None:
        settings["type"] = _naming_errors(field.metadata["parse"])
    elif members == [bool]:
        settings = {"help": help_, "action": argparse.BooleanOptionalAction}
    elif choices and len(members) == 1:
        settings["choices"] = choices
    else:
        plain = next(member for member in members if get_origin(member) is not Literal)
        settings["type"] = lambda text: text if text in choices else plain(text)
        settings["type"].__name__ = plain.__name__  # argparse names it in errors
    group.add_argument(f"--{field.name}", **settings)


def _naming_errors(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _is_of(value: Any, kind: Any) -> bool:
    if _is_union(kind):
        return any(_is_of(value, member) for member in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, get_origin(kind) or kind) if kind is not Any else True


def _type_name(kind: Any) -> str:
    if _is_union(kind):
        return " or ".join(_type_name(member) for member in get_args(kind) if member is not type(None))
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))
