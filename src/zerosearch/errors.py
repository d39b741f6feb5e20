"""Mistakes of the user's, kept apart from mistakes of ours: the first get one sentence, the second a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from zerosearch.text import printable


class UserError(Exception):
    """A mistake of the user's; recipes print its message, one line, and exit with 2.

    >>> try:
    ...     RolloutSettings(max_turns=-1)
    ... except UserError as error:
    ...     print(error)
    max_turns is -1: it must be at least 0
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(message.split())))


@contextmanager
def user_mistakes(*more: type[Exception]) -> Iterator[None]:
    """Raise as `UserError` what a wrong path or value raises: `OSError`, `ValueError` and `more`.

    Keep the block small: around a whole run it would hide the traceback of a defect of ours.
    """
    mistakes: tuple[type[Exception], ...] = (OSError, ValueError, *more)
    try:
        yield
    except mistakes as error:
        raise UserError(str(error) or type(error).__name__) from error
