"""TinyWorld's tokenizer loses nothing, and its words are tokens."""

from __future__ import annotations

from zerosearch.tinyworld.tokenizer import build_tokenizer
from zerosearch.tinyworld.world import World


def test_the_tokenizer_loses_nothing() -> None:
    tokenizer = build_tokenizer()
    for text in (
        "Zoë's 3rd “quote”\n\n\t<think>",
        "</information>.</think>x</search>",
        "  two  spaces ",
        "日本語 Doc 12: ok",
    ):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tags_and_names_are_one_token_each_and_tags_are_ordinary_tokens() -> None:
    tokenizer = build_tokenizer()
    text = "<think> Look up Clara Voss. </think> <search> Clara Voss hails from </search>"
    assert len(tokenizer.tokenize(text)) == 13
    for row in World.draw(0, held_out=True).passages()[:200]:
        sentence = " " + row["contents"].split("\n")[1]
        assert len(tokenizer.tokenize(sentence)) == len(sentence.replace(".", " .").split())
    assert tokenizer.all_special_tokens == ["<|endoftext|>", "<|pad|>"]


def test_the_chat_template_passes_messages_through_and_ends_the_assistant_s() -> None:
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "Who?\n"}]
    tokenizer = build_tokenizer()
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == "Who?\n"
    messages.append({"role": "assistant", "content": "Ada"})
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "Who?\nAda<|endoftext|>"
