"""Text from outside is made fit for use."""

from __future__ import annotations

import time

import pytest

from zerosearch.errors import UserError
from zerosearch.evaluation.tables import aligned, markdown
from zerosearch.text import clean_json, clean_text, printable, without_thoughts

ATTACK = "\x1b]0;OWNED\x07\x1b[2J \u202egnp.exe \x9b31m \x00\r\x7f\ud83d end"
SHOWN = r"\x1b]0;OWNED\x07\x1b[2J \u202egnp.exe \x9b31m \x00\r\x7f\ud83d end"


def test_what_no_tokenizer_takes_is_replaced() -> None:
    assert clean_text("caf\ud83d \x00 😀 \udfff") == "caf\ufffd \ufffd 😀 \ufffd"
    assert clean_json({"\ud800": [1, None, True, 0.5, {"a": "\ud800"}]}) == {
        "\ufffd": [1, None, True, 0.5, {"a": "\ufffd"}]
    }


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("Doc 1: a", "Doc 1: a"),
        ("<think>Doc 1: no</think>\n\nDoc 1: a", "\n\nDoc 1: a"),
        ("The answer is Lisbon.\nDoc 1: no</think>\nDoc 1: a", "\nDoc 1: a"),  # the template opened the thought
        ("<think>The answer is Lisbon", ""),  # cut off
        ("Sure. <think>The answer is Lisbon", ""),
        ("<think>one</think> hm <think>two</think>Doc 1: a", "Doc 1: a"),
        ("<think>one</think>Doc 1: a <think>two", ""),
        ("", ""),
    ],
)
def test_thoughts_are_removed_in_all_their_shapes(reply: str, answer: str) -> None:
    assert without_thoughts(reply) == answer


def test_a_reply_of_nothing_but_tags_takes_linear_time() -> None:
    start = time.perf_counter()
    assert without_thoughts("<think>" * 200_000) == ""
    assert time.perf_counter() - start < 1.0


def test_what_a_terminal_obeys_is_shown() -> None:
    assert printable(ATTACK) == SHOWN
    plain = "a\tb\nc é 日本 \U0001f468\u200d\U0001f33e می\u200cخواهم"  # joiners are part of words and emoji
    assert printable(plain) == plain


def test_messages_and_tables_show_it() -> None:
    assert str(UserError(ATTACK)) == SHOWN.replace(r"\r", " ")
    assert aligned([["dataset", "n"], ["\x1b[2J\nnq", "3"]]) == "dataset     n\n\\x1b[2J nq  3"
    assert markdown([["method", "n"], ["a|\x1b[2J\nb", "3"]]) == "| method | n |\n|---|---:|\n| a\\|\\x1b[2J b | 3 |"
