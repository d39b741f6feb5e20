"""Text from outside is made fit for use."""

from __future__ import annotations

import time

import pytest

from zerosearch.text import clean_json, clean_text, without_thoughts


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
