"""Mistakes of the user's, kept apart from mistakes of ours: the first get one sentence, the second a traceback."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import NoReturn, ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class UserError(Exception):
    """A mistake of the user's; recipes print its message, one line, and exit with 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


@contextmanager
def user_mistakes() -> Iterator[None]:
    """Raise as `UserError` what parsing arguments or opening a file raises (`OSError`, `ValueError`, `YAMLError`).

    argparse would print a page of usage before its one sentence; the page is what --help is for.
    Keep the block small: around a whole run it would hide the traceback of a defect of ours.
    """
    from yaml import YAMLError

    print_usage, ArgumentParser.error = ArgumentParser.error, _without_usage  # type: ignore[method-assign,assignment]
    try:
        yield
    except (OSError, ValueError, YAMLError) as error:
        raise UserError(str(error) or type(error).__name__) from error
    finally:
        ArgumentParser.error = print_usage  # type: ignore[method-assign]


def _without_usage(parser: ArgumentParser, message: str) -> NoReturn:
    raise UserError(f"{message}; --help lists all flags")


def exit_on_user_error(main: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Wrap a recipe's main: a `UserError` becomes `error: <message>` on stderr and exit status 2, no traceback."""

    @wraps(main)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None

    return wrapped
