"""Mistakes of the user's, kept apart from mistakes of ours: the first get one sentence, the second a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class UserError(Exception):
    """A mistake of the user's; recipes print its message, one line, and exit with 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


@contextmanager
def user_mistakes() -> Iterator[None]:
    """Raise as `UserError` what parsing arguments or opening a file raises (`OSError`, `ValueError`).

    Keep the block small: around a whole run it would hide the traceback of a defect of ours.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(str(error) or type(error).__name__) from error


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
