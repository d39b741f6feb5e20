"""The tag grammar, on written-out turns; each rule at the top of protocol.py has its cases here."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zerosearch.protocol import (
    BARE_CALLS,
    STOP_STRINGS,
    TAGS,
    TOOL_CALLS,
    Action,
    Grammar,
    format_documents,
    format_observation,
    is_well_formed,
    parse_action,
    split_documents,
    titled_documents,
)

INVALID = Action("invalid", "")


def test_the_stop_strings_are_the_closing_tags_of_the_two_actions() -> None:
    assert STOP_STRINGS == ("</search>", "</answer>")


@pytest.mark.parametrize(
    ("turn", "action"),
    [
        # Plain actions; a sampled token may carry letters past the closing tag.
        ("<think> who? </think>\n<search> Emma author </search>", Action("search", "Emma author")),
        ("<think> known </think> <answer> Jane Austen </answer>", Action("answer", "Jane Austen")),
        ("<answer>Jane\nAusten</answer>", Action("answer", "Jane\nAusten")),
        ("no thought at all <search>x</search>", Action("search", "x")),
        ("<search> x </search>\n\n", Action("search", "x")),
        # The first closing tag ends the turn. The paper's code trains on the tail after an answer.
        ("<answer> X </answer> then <search> q </search>", Action("answer", "X")),
        ("<search> q </search> <answer> X </answer>", Action("search", "q")),
        ("<answer> X <search> q </search>", Action("search", "q")),
        ("</search> <answer> X </answer>", INVALID),
        # The content runs from the last matching opening tag, and other tags in it are text.
        ("<search> first try <search> second try </search>", Action("search", "second try")),
        ("<search> what does <answer> mean </search>", Action("search", "what does <answer> mean")),
        ("<answer> the <search> tag </answer>", Action("answer", "the <search> tag")),
        ("<search> <information>Doc 1: x </search>", Action("search", "<information>Doc 1: x")),
        # A turn without an action is invalid.
        ("", INVALID),
        ("I believe it is Jane Austen.", INVALID),
        ("<think> only thought </think>", INVALID),
        ("<search> never closed", INVALID),
        ("Emma author </search>", INVALID),
        ("<answer> X </search>", INVALID),
        ("<search></search>", INVALID),
        ("<answer> \n </answer>", INVALID),
        ("< search > q < /search >", INVALID),
        ("<SEARCH> q </SEARCH>", INVALID),
        # Tags in a closed thought are text.
        (
            "<think> I may put it between <search> and </search>. </think> <search> Emma author </search>",
            Action("search", "Emma author"),
        ),
        ("<think> <answer> Beijing </answer> was the example </think> <answer> X </answer>", Action("answer", "X")),
        ("<think> <search> a draft </search> </think> and no more", INVALID),
        ("<think> a </think> <think> <answer> b </answer> </think> <search> c </search>", Action("search", "c")),
        ("<sea<think> x </think>rch> q </search>", INVALID),
        ("<answer> a<think> x </think>b<think> y </think>c </answer>", Action("answer", "a b c")),
        ("<answer> a </think> b </answer>", Action("answer", "a </think> b")),
        # An action in an open thought acts: generation stopped at its closing tag, before the thought could be closed.
        ("<think> I should look. <search> Emma author </search>", Action("search", "Emma author")),
        ("<think> a </think> <think> so: <answer> X </answer>", Action("answer", "X")),
        ("a thought the prompt opened </think> <search> q </search>", Action("search", "q")),
        # But the instruction, quoted in an open thought, is no action.
        ("<think> I should put the query between <search> and </search>", INVALID),
        ("<think> I can answer inside <answer> and </answer>", INVALID),
    ],
)
def test_the_action_of_a_turn(turn: str, action: Action) -> None:
    assert parse_action(turn) == action


ALL_TAGS = ("<think>", "</think>", "<search>", "</search>", "<answer>", "</answer>", "<information>", "</information>")
TAGGED = st.lists(st.sampled_from([*ALL_TAGS, " ", "and", "x", "<", ">", "/", "Emma", "\n"])).map("".join)


@settings(max_examples=400)
@given(TAGGED | st.text())
def test_an_action_is_what_the_policy_wrote_before_its_first_closing_tag(text: str) -> None:
    action = parse_action(text)
    kind, content = action.kind, action.content
    assert bool(content) == (kind != "invalid") and content == content.strip() != "and"
    if "<think>" not in text and kind != "invalid":
        before = text.partition(f"</{kind}>")[0].rstrip()
        assert "</search>" not in before and "</answer>" not in before
        assert before.endswith(content) and before.removesuffix(content).rstrip().endswith(f"<{kind}>")


@given(TAGGED, TAGGED)
def test_nothing_behind_the_closing_tag_and_nothing_in_a_closed_thought_acts(text: str, other: str) -> None:
    without_end = other.replace("</think>", "")
    for stop in STOP_STRINGS:
        assert parse_action(text + stop + without_end) == parse_action(text + stop)
    thought = f"<think>{without_end}</think>"
    assert parse_action(f"{thought}{text}") == parse_action(f" {text}")


def test_documents_are_numbered_one_to_a_line() -> None:
    assert (
        format_documents(["Emma: a novel\nof 1815", " Jane  Austen "])
        == "Doc 1: Emma: a novel of 1815\nDoc 2: Jane Austen"
    )
    assert format_documents([]) == ""


def test_observation_to_the_letter() -> None:
    assert format_observation(["a", "b"]) == "\n\n<information>Doc 1: a\nDoc 2: b</information>\n\n"
    assert format_observation([]) == "\n\n<information></information>\n\n"


def test_a_title_is_what_an_engine_says_or_up_to_ten_words_before_a_colon() -> None:
    ten = "one two three four five six seven eight nine ten"
    assert titled_documents((f"{ten}: a", f"{ten} eleven: b"), ()) == (
        f'(Title: "{ten}") a',
        f"{ten} eleven: b",
    )
    assert titled_documents(("Emma: a", "Bath: b"), ("Emma",)) == ('(Title: "Emma") a', "Bath: b")
    assert titled_documents(("Emma: a novel: by Austen", "Rain"), ()) == ('(Title: "Emma") a novel: by Austen', "Rain")


FIVE = ("Emma is a novel.", "Austen wrote it.", "It came in 1815.", "Murray printed it.", "It has three volumes.")


@pytest.mark.parametrize(
    "reply",
    [
        format_documents(FIVE),
        "\n\n" + "\n\n".join(f"Doc {number}: {text}" for number, text in enumerate(FIVE, start=1)) + "\n\n",
        "\n".join(f"**Doc {number}:** {text}" for number, text in enumerate(FIVE, start=1)),
        "\n".join(f"**Doc {number}**: {text}" for number, text in enumerate(FIVE, start=1)),
        "\n".join(f"**Document {number}:**\n{text}" for number, text in enumerate(FIVE, start=1)),
        "Sure, here are five useful documents:\n\n" + format_documents(FIVE),
        format_documents((*FIVE, "A sixth.")),
        format_documents(FIVE) + "\n" + format_documents(FIVE),
        "\n".join(f"Doc: {text}" for text in FIVE),
        "\n".join(f"doc : {text}" for text in FIVE),
        " ".join(f"Doc {number}: {text}" for number, text in enumerate(FIVE, start=1)),
        # The reply goes on after a "Doc 1:" it took for said.
        format_documents(FIVE).removeprefix("Doc 1: "),
        "\n\n".join(FIVE),
        "\n".join(f"{number}. {text}" for number, text in enumerate(FIVE, start=1)),
        "\n".join(f"- {text}" for text in FIVE),
        "\n".join(f"### Document {number}\n{text}\n" for number, text in enumerate(FIVE, start=1)),
        "\n".join(f"[Doc {number}] {text}" for number, text in enumerate(FIVE, start=1)),
        "\n".join(f"[Doc {number}]: {text}" for number, text in enumerate(FIVE, start=1)),
        "\n".join(f"- **Doc {number}** - {text}" for number, text in enumerate(FIVE, start=1)),
        "\n".join(f"Doc {number} (useful): {text}" for number, text in enumerate(FIVE, start=1)),
        "\n".join(f"Doc #{number}. {text}" for number, text in enumerate(FIVE, start=1)),
        "\n".join(f"Document No. {number}：{text}" for number, text in enumerate(FIVE, start=1)),
        "\n---\n".join(f"Doc {number}:\n{text}" for number, text in enumerate(FIVE, start=1)).replace("---\n", ""),
        "Here are five documents:\n\n" + "\n".join(f"{number}) {text}" for number, text in enumerate(FIVE, start=1)),
        "Sure!\n\n" + "\n".join(f"* {text}" for text in FIVE) + "\n\nI hope this helps.",
        "\n".join(f"{number}. {text.replace(' ', chr(10), 1)}" for number, text in enumerate(FIVE, start=1)),
        "Five documents:\n" + "\n".join(FIVE),
    ],
)
def test_five_documents_are_found_however_the_reply_is_laid_out(reply: str) -> None:
    assert split_documents(reply, 5) == FIVE


@pytest.mark.parametrize(
    ("reply", "documents"),
    [
        ("Doc 1: whole.\nDoc 2: cut sh", ("whole.", "cut sh")),
        ("Doc 1: whole.\nDoc 2:", ("whole.",)),
        ("Doc 1: whole.\nDoc 2", ("whole.",)),
        ("Doc 1: whole.\nDo", ("whole. Do",)),
        ("Doc 1: I met Doc 2 years ago. Doc 7.", ("I met Doc 2 years ago. Doc 7.",)),
        ("Doc 1: **\n---\nDoc 2: b", ("b",)),
        ("one line\nand one\nDoc 3:", ("one line", "and one")),
        ("Doc 1: a line\u2028of two\x85halves", ("a line of two halves",)),
        ("1. one\n2. two\u2028lines", ("one", "two lines")),
        ("1. one\ntwo", ("one", "two")),  # one item makes no list
        ("I am sorry, I cannot do that.", ("I am sorry, I cannot do that.",)),
        ("Doc 1: two\nlines\n\nDoc 2: one", ("two lines", "one")),
        ("Doc 1: \nDoc 2: b\nDoc 4: d", ("b", "d")),
        ("Doc 1: **Emma** is a novel", ("Emma is a novel",)),
        ("\n**Here they are: **\nIt rains.\nIt snows.", ("It rains.", "It snows.")),
        ("Sure!\n1. It rains.\n2. It snows.", ("It rains.", "It snows.")),
        ("Doc 1: The Doc said so: yes", ("The Doc said so: yes",)),
        ("1815 was the year", ("1815 was the year",)),
        ("one line", ("one line",)),
    ],
)
def test_what_stands_in_a_damaged_reply_is_kept(reply: str, documents: tuple[str, ...]) -> None:
    assert split_documents(reply, 5) == documents


@pytest.mark.parametrize(
    "reply",
    [
        "",
        " \n\t\n",
        "Doc 1:",
        "Doc 1:\n**Doc 2:**\n",
        "Doc 1",
        "*" * 5000,
        "```\n---\n...",
        "Here they are:\n",
        "Here:\nDoc 1:",
    ],
)
def test_a_reply_without_text_gives_no_documents(reply: str) -> None:
    assert split_documents(reply, 5) == ()


def test_no_more_documents_than_asked_for() -> None:
    assert split_documents(format_documents(FIVE), 3) == FIVE[:3]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (format_documents(FIVE), True),
        ("\n" + format_documents(FIVE).replace("\n", "\n\n") + "\n", True),
        (
            format_documents(FIVE).replace("Austen wrote", "Austen\u2028wrote"),
            True,
        ),  # a line ends at the line feed alone
        (format_documents(FIVE[:4]), False),
        (format_documents((*FIVE, "A sixth.")), False),
        ("Sure:\n" + format_documents(FIVE), False),
        (format_documents(FIVE).replace("Doc 3:", "**Doc 3:**"), False),
        (format_documents(FIVE).replace("Doc 3:", "Doc 4:"), False),
        ("", False),
    ],
)
def test_a_well_formed_reply_is_five_numbered_lines(reply: str, expected: bool) -> None:
    assert is_well_formed(reply, 5) is expected


HEADERS = (
    "Doc {}: ", "Doc {}:", "**Doc {}:** ", "Document {}: ", "doc {} - ", "[Doc {}] ", "### Doc {}\n", "Doc: ", "{}. ",
    "- ", "", "\n", "Doc {} (noisy): ", "Doc{}:", "DOC {}：", "<Doc {}> ", "Doc {}", "{}) ", "Doc Doc {}: : ",
)  # fmt: skip
SNIPPETS = (
    "Emma is a novel by Jane Austen", "1815", "naïve Zürich 東京", "**bold** and `code`", "</information>", "🙂",
    "see Doc 3: there", "\x00\x1f", "{question} {}", "https://a.b/c?d=e:f", "...", "***", "\r\n", "\t",
    "\u2028", "Query: who?", "Useful Output:", '{"docs": ["a", "b"]}', "<|im_end|>", "I cannot help.", "|a|\n|-|",
)  # fmt: skip
WORDY = [snippet for snippet in SNIPPETS if snippet[0].isalpha() and snippet[-1].isalpha()]
WELL_FORMED = (
    st.text()
    .map(lambda text: " ".join(text.split()))
    .filter(lambda text: any(map(str.isalnum, text)) and "**" not in text and "doc" not in text.lower())
)


@settings(max_examples=400)
@given(st.lists(st.sampled_from(HEADERS + SNIPPETS)).map("".join) | st.text(), st.integers(1, 6))
def test_any_reply_is_split_into_at_most_so_many_documents_of_one_line_with_a_word(text: str, count: int) -> None:
    documents = split_documents(text, count)
    assert len(documents) <= count
    for document in documents:
        assert document == " ".join(document.split()) and any(map(str.isalnum, document))
    is_well_formed(text, count)


@given(
    st.sampled_from(("", "Sure, here are five documents:\n\n", "```\n", "# Results\n")),
    st.sampled_from(HEADERS),
    st.lists(st.lists(st.sampled_from(SNIPPETS), max_size=5).map(" ".join), min_size=1, max_size=6),
    st.sampled_from(("\n", "\n\n", " ", "", "\n---\n")),
    st.sampled_from(WORDY),
)
def test_a_reply_that_says_something_gives_a_document(
    preamble: str, header: str, texts: list[str], separator: str, words: str
) -> None:
    numbered = (header.format(number) + text for number, text in enumerate([*texts, words], start=1))
    assert split_documents(preamble + separator.join(numbered), 5)


@given(st.lists(WELL_FORMED, min_size=1, max_size=6))
def test_well_formed_documents_are_read_as_they_were_written(documents: list[str]) -> None:
    assert split_documents(format_documents(documents), 6) == tuple(documents)
    assert is_well_formed(format_documents(documents), len(documents))


UNITS = (
    "<think>", "</think>", "<think></think>", "<search>", "<", "</", "*", "** ", " ", "\n", "Doc", "Doc 1", "Doc 1 (",
    "[Doc 1", "\n[[[[Doc 1 ***", "\n####****[", "1. ", "- a\n", "- a\n" + "b\n" * 2**17,
)  # fmt: skip


@pytest.mark.parametrize("unit", UNITS)
def test_a_reply_of_256_kb_is_read_in_linear_time(unit: str) -> None:
    text = unit * max(1, 2**18 // len(unit))
    start = time.process_time()
    parse_action(text + "</search>")
    split_documents(text, 5)
    is_well_formed(text, 5)
    assert time.process_time() - start < 5.0  # some 1.5 s; by the square of the length it would be minutes


CALL = '<tool_call>\n{"name": "search", "arguments": {"query": "Emma author"}}\n</tool_call>'
BARE = '{"name": "search", "parameters": {"query": "Emma author"}}'


@pytest.mark.parametrize("grammar", [TAGS, TOOL_CALLS, BARE_CALLS])
@pytest.mark.parametrize("query", ["Emma author", 'a "quoted" \\ é\n</think>', "{}"])
def test_a_search_is_read_as_it_is_written(grammar: Grammar, query: str) -> None:
    assert parse_action(f"<think> Hm. </think>\n{grammar.write_search(query)}", grammar) == Action("search", query)


def test_calls_are_written_as_the_models_write_them() -> None:
    assert (TOOL_CALLS.write_search("Emma author"), BARE_CALLS.write_search("Emma author")) == (CALL, BARE)
    assert '"naïve"' in BARE_CALLS.write_search("naïve")
    assert TOOL_CALLS.stop_strings == ("</tool_call>", "</answer>") and BARE_CALLS.stop_strings == ("</answer>",)
    assert TAGS.tools is None and TOOL_CALLS.tools == BARE_CALLS.tools
    query = {"type": "string", "description": "What to search for."}
    parameters = {"type": "object", "properties": {"query": query}, "required": ["query"]}
    search = {"name": "search", "description": "Search for documents.", "parameters": parameters}
    assert TOOL_CALLS.tools == [{"type": "function", "function": search}]


def test_the_tags_of_a_grammar_are_what_its_policy_writes() -> None:
    always = ("<think>", "</think>", "<answer>", "</answer>")
    assert TAGS.tags == (*always, "<search>", "</search>") and BARE_CALLS.tags == always


@pytest.mark.parametrize(
    ("turn", "action"),
    [
        (f"{CALL}<|im_end|>", Action("search", "Emma author")),
        (f"I look it up. {CALL}{CALL.replace('Emma', 'Bath')}", Action("search", "Emma author")),
        (CALL.replace("\n", ""), Action("search", "Emma author")),
        ("<answer> X </answer>", Action("answer", "X")),
        (f"<answer> X </answer>{CALL}", Action("answer", "X")),
        (f"<think>{CALL}</think> <answer> X </answer>", Action("answer", "X")),
        (CALL.replace('"search"', '"browse"'), INVALID),
        (CALL.replace("query", "q"), INVALID),
        (CALL.replace('"Emma author"', "[1]"), INVALID),
        (CALL.replace('"Emma author"', '" "'), INVALID),
        (CALL.replace('{"query": "Emma author"}', '"Emma author"'), INVALID),
        (CALL.replace("}}", "}"), INVALID),
        (CALL.replace("{", "["), INVALID),
        (CALL.replace("<tool_call>", ""), INVALID),
        (CALL.replace("</tool_call>", ""), INVALID),
        ("<tool_call></tool_call>", INVALID),
        ("<tool_call>" + "{" * 100_000 + "</tool_call>", INVALID),
        ("<tool_call>" + '{"a":' * 100_000 + "</tool_call>", INVALID),
        ("<search> Emma </search>", INVALID),
        (BARE, INVALID),
    ],
)
def test_calls_between_tags(turn: str, action: Action) -> None:
    assert parse_action(turn, TOOL_CALLS) == action


@pytest.mark.parametrize(
    ("turn", "action"),
    [
        (f"{BARE}<|eot_id|>", Action("search", "Emma author")),
        (f"<|python_tag|>{BARE}<|eom_id|>", Action("search", "Emma author")),
        (f"<think>{BARE.replace('Emma', 'Bath')}</think>{BARE}", Action("search", "Emma author")),
        ("<answer> X </answer>", Action("answer", "X")),
        (BARE.replace("parameters", "arguments"), INVALID),
        (BARE.replace('"name"', '"tool"'), INVALID),
        ("It is Jane Austen.<|eot_id|>", INVALID),
        ("", INVALID),
    ],
)
def test_a_call_that_is_the_whole_message(turn: str, action: Action) -> None:
    assert parse_action(turn, BARE_CALLS) == action
