"""What every recipe does with its command line: flags and YAML under one set of checks, mistakes in one sentence."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Collection, Sequence
from copy import copy
from dataclasses import fields
from difflib import get_close_matches
from functools import wraps
from io import TextIOWrapper
from math import isnan
from pathlib import Path
from signal import SIGINT
from typing import Any, NoReturn, ParamSpec, TypeVar, get_args

from zerosearch.errors import UserError
from zerosearch.files import read_yaml
from zerosearch.text import printable

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

BOUNDS = ("min", "max", "above")


def parse(*classes: type, argv: Sequence[str] | None = None, usage: str | None = None, rest: bool = False) -> Any:
    """Return an instance of each dataclass, from its defaults, then `--config FILE.yaml`, then flags.

    A value in YAML is treated as the same flag would be: types and choices hold for both. The metadata of a field may
    bound a number: `min`, `max`, or `above`. With `rest`, the flags that no class knows come last, as a list.
    Raises `UserError`, one sentence, for whatever is wrong with a flag, the file or a value.
    """
    from transformers import HfArgumentParser
    from yaml import YAMLError

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:  # argparse would print a page of usage first
            raise UserError(f"{message}; --help lists all flags")

        @staticmethod
        def _parse_dataclass_field(parser: Any, field: Any) -> None:  # argparse would take our bounds for its own
            field = copy(field)
            field.metadata = {name: value for name, value in field.metadata.items() if name not in BOUNDS}
            if type(None) in get_args(field.type):
                nullable.add(field.name)
            HfArgumentParser._parse_dataclass_field(parser, field)

    nullable: set[str] = set()
    parser = Parser(classes, usage=usage, allow_abbrev=False)
    try:
        flags = list(sys.argv[1:] if argv is None else argv)
        flags = _flags_of_config(flags, parser, nullable) + flags
        *values, unknown = parser.parse_args_into_dataclasses(
            flags, return_remaining_strings=True, look_for_args_file=False
        )
        if unknown and not rest:
            parser.error(f"unknown flag {unknown[0]}{_hint(unknown[0].lstrip('-').partition('=')[0], parser)}")
    # Of the file, or of a dataclass that checks itself.
    except (OSError, ValueError, ImportError, RecursionError, YAMLError) as error:
        raise UserError(str(error) or type(error).__name__) from error
    for value in values:
        check_bounds(value)
    return (*values, unknown) if rest else tuple(values)


def check_bounds(options: Any) -> None:
    """Raise `UserError` for NaN, and for a number outside the bounds in its field's metadata; `None` passes."""
    for field in fields(options):
        value, bounds = getattr(options, field.name), field.metadata
        if not isinstance(value, int | float):
            continue
        if isinstance(value, float) and isnan(value):
            raise UserError(f"{field.name} is nan: it must be a number")
        if "min" in bounds and not value >= bounds["min"]:
            raise UserError(f"{field.name} is {value}: it must be at least {bounds['min']}")
        if "above" in bounds and not value > bounds["above"]:
            raise UserError(f"{field.name} is {value}: it must be above {bounds['above']}")
        if "max" in bounds and not value <= bounds["max"]:
            raise UserError(f"{field.name} is {value}: it must be at most {bounds['max']}")


def say(text: str) -> None:
    """Print text that may hold words from outside: what a terminal would obey is shown, not sent."""
    print(printable(text), flush=True)


def exit_on_user_error(main: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Wrap a recipe's main: a `UserError` becomes `error: <message>` on stderr and exit status 2, no traceback.

    Ctrl-C becomes "stopped" and exit status 130. What a terminal's encoding lacks is written as an escape.
    """

    @wraps(main)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)
            raise SystemExit(128 + SIGINT) from None

    return wrapped


def _flags_of_config(flags: list[str], parser: ArgumentParser, nullable: Collection[str]) -> list[str]:
    """Take `--config FILE` out of the flags and return what the file says, as flags; `nullable` ones may be null."""
    places = [place for place, flag in enumerate(flags) if flag == "--config" or flag.startswith("--config=")]
    if not places:
        return []
    _, equals, path = flags.pop(places[0]).partition("=")
    if not equals:
        if places[0] == len(flags):
            raise UserError("--config needs the path of a YAML file")
        path = flags.pop(places[0])
    if len(places) > 1:
        raise UserError("--config stands twice; one file is read")
    if not Path(path).is_file():
        raise UserError(f"there is no config file {path}")
    config = read_yaml(Path(path))
    if not isinstance(config, dict):
        raise UserError(f"the config file {path} must hold names with values, a YAML mapping")
    known = {action.dest: action for action in parser._actions}
    for name, value in config.items():
        if name not in known:
            raise UserError(f"{path} names {name!r}, which is unknown{_hint(str(name), parser)}")
        if value is None and name not in nullable:
            raise UserError(f"{path} gives {name} no value: leave it out for the default")
        if isinstance(value, list) and known[name].nargs not in ("+", "*"):
            raise UserError(f"{path} gives {name} a list, {value}: it takes one value")
    parser.set_defaults(**{name: None for name, value in config.items() if value is None})
    return [part for name, value in config.items() if value is not None for part in _as_flag(name, value)]


def _as_flag(name: str, value: Any) -> list[str]:
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={json.dumps(value, default=str) if isinstance(value, bool | dict) else value}"]


def _hint(name: str, parser: ArgumentParser) -> str:
    close = get_close_matches(name, [action.dest for action in parser._actions], n=1)
    return f"; is it {close[0]}?" if close else ""
