"""Document sets: from judged searches to what the simulator should write, split by question, nothing twice."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import datasets
import pytest
from hub_stub import HubStub
from jsonl_files import rows_of, write_rows
from recipe_modules import Refusal, load_recipe

from zerosearch.data import Passage
from zerosearch.errors import UserError
from zerosearch.files import sole_writer
from zerosearch.metrics import holds_answer, normalize_answer
from zerosearch.simulator.dataset import SetOptions, build_sets, excerpt, split_of, statistics, statistics_table
from zerosearch.simulator.examples import load_examples, simulator_example
from zerosearch.simulator.judge import rule_verdict, rule_verdicts
from zerosearch.simulator.traces import read_traces

ROOT = Path(__file__).parents[2]
TRACES = ROOT.parent / "shared/data/search_traces.jsonl"
real_data = pytest.mark.skipif(not TRACES.is_file(), reason="no real data here")


def trace(query: str, *documents: str, verdicts: list[bool | None], **columns: Any) -> dict[str, Any]:
    given = {"question": "Who wrote Emma?", "golden_answers": ["Jane Austen"], "query": query} | columns
    return given | {"documents": list(documents), "verdicts": {"rule": verdicts, "judge-1": verdicts}}


EMMA = [
    trace("Emma author", "By Jane Austen.", "It rains.", "It snows.", "?", verdicts=[True, False, False, None]),
    trace("emma  Author", "By Jane Austen.", "Jane Austen wrote it.", verdicts=[True, True]),  # the same query
    trace("Austen novels", "It hails.", "Emma, by Jane Austen.", verdicts=[False, True]),
    trace("weather", "It thaws.", verdicts=[False]),
]


def contents(sets: list[dict[str, Any]]) -> dict[tuple[str, bool], list[str]]:
    return {(row["query"], row["useful"]): row["documents"] for row in sets}


def test_a_query_gives_a_set_of_each_label() -> None:
    sets = build_sets(EMMA, SetOptions())
    assert contents(sets) == {
        ("Emma author", True): ["By Jane Austen.", "Jane Austen wrote it."],
        ("Emma author", False): ["It rains.", "It snows."],
        ("Austen novels", True): ["Emma, by Jane Austen."],
        ("Austen novels", False): ["It hails."],
        ("weather", False): ["It thaws."],
    }
    assert {(row["question"], row["judge"], *row["golden_answers"]) for row in sets} == {
        ("Who wrote Emma?", "rule", "Jane Austen")
    }


def test_sets_can_be_filled_up_from_the_question_but_not_made_of_it_and_small_ones_left_out() -> None:
    sets = contents(build_sets(EMMA, SetOptions(fill_from_question=True, num_documents=3)))
    assert sets[("Austen novels", True)] == ["Emma, by Jane Austen.", "By Jane Austen.", "Jane Austen wrote it."]
    assert sets[("weather", False)] == ["It thaws.", "It rains.", "It snows."]
    assert ("weather", True) not in sets
    assert set(contents(build_sets(EMMA, SetOptions(min_documents=2)))) == {("Emma author", x) for x in (True, False)}


def test_useful_sets_can_be_filled_up_with_noisy_documents_behind_them() -> None:
    search = trace("q", "It rains.", "By Jane Austen.", "It snows.", "?", verdicts=[False, True, False, None])
    assert contents(build_sets([search], SetOptions(fill_useful=True))) == {
        ("q", True): ["By Jane Austen.", "It rains.", "It snows."],
        ("q", False): ["It rains.", "It snows."],
    }
    sets = contents(build_sets([search], SetOptions(fill_useful=True, num_documents=2)))
    assert sets["q", True] == ["By Jane Austen.", "It rains."]
    options = SetOptions(fill_useful=True, fill_from_question=True, num_documents=3)
    filled = contents(build_sets(EMMA, options))
    assert filled["Austen novels", True] == ["Emma, by Jane Austen.", "By Jane Austen.", "Jane Austen wrote it."]
    assert ("weather", True) not in filled  # noisy documents alone are no useful set


def test_a_set_keeps_what_its_search_says_and_the_first_wording_of_a_document() -> None:
    search = {"id": "nq_0", "dataset": "nq", "golden_answers": ["Jane Austen", "Austen"]}
    (built,) = build_sets([trace("q", "It rains.", "it  RAINS", verdicts=[False, False], **search)], SetOptions())
    assert {name: built[name] for name in search} == search
    assert built["documents"] == ["It rains."]


def test_a_set_holds_no_more_than_it_may_and_no_document_twice() -> None:
    documents = [f"Document {n // 2}." for n in range(20)]
    (built,) = build_sets([trace("q", *documents, verdicts=[False] * 20)], SetOptions())
    assert built["documents"] == [f"Document {n}." for n in range(5)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_words": 0}, "num_words is 0"),
        ({"min_documents": 0}, "min_documents is 0"),
        ({"min_documents": 6}, "num_documents is 5, less than min_documents 6"),
        ({"p_test": 1.0}, "p_test is 1.0"),
        ({"p_test": -0.1}, "p_test is -0.1"),
        ({"fill_from_question": True, "judge": "judge-1"}, "needs the verdicts of the rule: those of 'judge-1'"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SetOptions(**options)
    SetOptions(num_documents=5, min_documents=5, num_words=1, p_test=0.0, fill_from_question=True)


def test_verdicts_that_are_missing_are_named() -> None:
    with pytest.raises(UserError, match=r"search 1 has no verdicts of 'judge-2'; it was judged by: rule, judge-1"):
        build_sets(EMMA, SetOptions(judge="judge-2"))
    with pytest.raises(UserError, match="it was judged by: nobody"):
        build_sets([{name: value for name, value in EMMA[0].items() if name != "verdicts"}], SetOptions())
    with pytest.raises(UserError, match="search 1 has 1 verdicts of 'rule' on 2 documents"):
        build_sets([trace("q", "a", "b", verdicts=[True])], SetOptions())
    with pytest.raises(UserError, match="search 1 has 2 verdicts of 'rule' on 1 documents"):
        build_sets([trace("q", "a", verdicts=[True, False])], SetOptions())


def test_all_queries_of_a_question_are_in_one_split() -> None:
    traces = [
        trace(f"query {n} of {m}", "It rains.", verdicts=[False], question=f"Question {m}?")
        for m in range(20)
        for n in range(10)
    ]
    splits: dict[str, set[str]] = {}
    for row in build_sets(traces, SetOptions(p_test=0.5)):
        splits.setdefault(row["question"], set()).add(row["split"])
    assert len(splits) == 20 and set(map(len, splits.values())) == {1}
    assert set.union(*splits.values()) == {"train", "test"}


def test_only_useful_documents_are_cut_around_the_answer() -> None:
    weather = "The weather is much discussed in it. "
    text = weather * 6 + "It is by Jane Austen, who lived in Hampshire. " * 6
    traces = [trace("weather", text, text, verdicts=[True, False])]
    sets = contents(build_sets(traces, SetOptions()))
    assert "Jane Austen" in sets["weather", True][0]
    assert sets["weather", False] == [
        "The weather is much discussed in it. " * 4 + "The weather is much discussed in it."
    ]


def test_the_split_is_the_questions_own() -> None:
    assert [split_of(f"Question {n}?", 0.1) for n in range(1000)].count("test") == 104  # 10 %, by a hash
    assert {split_of(text, 0.5) for text in ("Who wrote  Emma?", "who wrote emma")} == {
        split_of("Who wrote Emma", 0.5)
    }
    assert split_of("x", 0.0) == "train"
    # What is in the test set with 5 % stays there with 10 %.
    assert all(split_of(f"{n}", 0.1) == "test" for n in range(500) if split_of(f"{n}", 0.05) == "test")


def test_statistics_count_what_went_in_and_came_out() -> None:
    sets = build_sets(EMMA, SetOptions(p_test=0.0))
    found = statistics(EMMA, sets, "rule")
    assert found["documents"] == {"useful": 4, "noisy": 4, "no_verdict": 1}
    assert (found["searches"], found["questions"]) == (4, 1)
    train, test = found["sets"]["train"], found["sets"]["test"]
    assert train["questions"] == 1 and test["questions"] == 0 and test["useful"]["words"] is None
    assert (train["useful"]["sets"], train["useful"]["documents"]) == (2, {"1": 1, "2": 1})
    assert train["useful"]["answer_rate"] == 1.0 and train["noisy"]["answer_rate"] == 0.0
    mixed = [{**sets[0], "split": "test", "documents": ["By Jane Austen.", "It rains."]}]
    mixed.append({**sets[0], "split": "test", "golden_answers": ["yes"]})
    test = statistics(EMMA, mixed, "rule")["sets"]["test"]["useful"]
    assert (test["sets"], test["answer_rate"]) == (2, 1.0)  # one document is enough; a yes cannot be looked for
    assert train["noisy"]["words"] == {"mean": 2.0, "p5": 2.0, "p50": 2.0, "p95": 2.0}


def test_the_table_of_the_statistics() -> None:
    documents = ["By Jane Austen.", "It rains and it snows."]
    sets = [{"question": "Q?", "golden_answers": ["Jane Austen"], "documents": documents, "useful": True}]
    sets = [{**sets[0], "split": "train"}, {**sets[0], "split": "train", "documents": documents[1:]}]
    lines = statistics_table(statistics([], sets, "rule")).split("\n")
    assert lines[2:] == [
        "| train | 2 useful | 1 | 0.500 | 1: 1, 2: 1 | 4.3 (3, 5, 5) |",
        "| train | 0 noisy | 1 |  |  |  |",
        "| test | 0 useful | 0 |  |  |  |",
        "| test | 0 noisy | 0 |  |  |  |",
    ]


NOVEL = Passage(
    "Emma (novel)",
    "Emma is set in the village of Highbury. It was written by Jane Austen from January 1814. It is about a "
    "matchmaker who is wrong. The rain in it is much discussed. It came out in December 1815, in three volumes, with "
    "a title page that names 1816. John Murray of Albemarle St. in London published it.",
)


FOUR = "One two three four. Five six seven eight. Nine ten eleven twelve. Here it rains indeed."
LETTERS = "a b c d e f g h i j k l m n o p q r s t"
SPLIT = "a b c d e f g h i j k l one two three. Four words are here. "


@pytest.mark.parametrize(
    ("passage", "num_words", "query", "answers", "expected"),
    [
        (Passage("Emma", "It is a novel."), 30, "Emma", [], "Emma: It is a novel."),  # short: kept whole
        (
            *(NOVEL, 16, "Emma author", ["Jane Austen"]),  # the sentence with the answer, and what follows it
            "Emma (novel): It was written by Jane Austen from January 1814. It is about a matchmaker who is wrong.",
        ),
        (
            *(NOVEL, 10, "who published it in London", []),  # the sentence nearest to the query
            "Emma (novel): John Murray of Albemarle St. in London published it.",
        ),
        (
            Passage("", FOUR),
            10,
            "rain rains",
            [],
            FOUR.partition(". ")[2],
        ),  # what is before fills the room of 12 words
        (
            *(Passage("", "One two three. It rains here. And so on, and on, and on it goes then."), 5, "rains", []),
            "One two three. It rains here.",  # back to the first sentence
        ),
        (
            *(Passage("", "One two three four five six seven. It rains here. And so on."), 5, "rains", []),
            "It rains here. And so on.",  # up to the last sentence
        ),
        # What fits is kept whole, whatever its title. Else a title takes half of the room at most.
        (Passage("A1 B2 C3 D4 E5 F6 G7", "a b c d e"), 10, "q", [], "A1 B2 C3 D4 E5 F6 G7: a b c d e"),
        (Passage("A1 B2 C3 D4 E5 F6", LETTERS), 10, "q", [], "A1 B2 C3 D4 E5 F6: a b c d e f ..."),
        (Passage("A1 B2 C3 D4 E5 F6 G7", LETTERS), 10, "q", [], "a b c d e f g h i j k l ..."),
        (
            *(
                Passage("Numbers", SPLIT + "And no more. " * 9),
                8,
                "else",
                ["three four"],
            ),  # over the end of a sentence
            "Numbers: ... l one two three. Four words are here. ...",
        ),
        *(
            (Passage("", f"One two three four five six seven. {sentence} It rains."), 7, word, [], sentence)
            for sentence, word in (
                ("It is by J. Austen of Steventon.", "Steventon"),  # no end: an initial or an abbreviation
                ("He lived close to St. Louis then.", "then"),
                ("There came with Mrs. Austen at last.", "last"),
            )
        ),
    ],
)
def test_an_excerpt_is_the_sentences_that_matter(
    passage: Passage, num_words: int, query: str, answers: list[str], expected: str
) -> None:
    assert excerpt(passage, num_words, query, answers) == expected


@pytest.mark.parametrize(
    ("answers", "window"),
    [
        (["w49 W50"], range(44, 56)),  # in the middle of it
        (["w11"], range(12)),  # the beginning, where that holds it
        (["w12"], range(7, 19)),
        (["w40 w41 w42 w43 w44 w45 w46 w47 w48 w49 w50 w51"], range(40, 52)),  # just room for it
        (["w98"], range(88, 100)),
        (["w10 w11 w12 w13 w14 w15 w16 w17 w18 w19 w20 w21 w22"], range(12)),  # no room for it
        ([], range(12)),
    ],
)
def test_a_long_sentence_is_cut_around_the_answer_and_says_so(answers: list[str], window: range) -> None:
    sentence = " ".join(f"w{n}" for n in range(100))
    start, end = "... " if window[0] else "", "" if window[-1] == 99 else " ..."
    assert excerpt(Passage("", sentence), 10, "q", answers) == start + " ".join(f"w{n}" for n in window) + end


def test_of_an_answer_that_comes_twice_the_first_place_is_kept() -> None:
    sentence = " ".join(["Austen", *(f"w{n}" for n in range(20)), "Austen", *(f"w{n}" for n in range(21, 40))])
    assert excerpt(Passage("", sentence), 10, "q", ["Austen"]).startswith("Austen w0 w1")


@pytest.mark.parametrize(
    ("passage", "answer"),
    [
        (Passage("", "one two three four five. " + "Six words are in here now. " * 9), "five six"),  # over a full stop
        (Passage("Pride and Prejudice", "A novel of manners. " * 20), "Pride and Prejudice"),  # in the title
        (
            Passage("The great Jane", "Austen wrote it. " + "There is more to say of her. " * 20),
            "Jane Austen",
        ),  # in both
    ],
)
def test_an_answer_in_an_odd_place_is_kept(passage: Passage, answer: str) -> None:
    assert holds_answer(passage.document, [answer])
    assert holds_answer(excerpt(passage, 8, "something else", [answer]), [answer])


def test_an_excerpt_of_anything_is_short_and_keeps_the_answer() -> None:
    rng, held = random.Random(0), 0.0
    words = [*"a b. c! The Dr. J. St. U.S. d? e, 1999 Über".split(), "  ", "\n"]
    for _ in range(500):
        text = " ".join(rng.choices(words, k=rng.randint(1, 120)))
        if not text.strip():
            continue
        passage = Passage(rng.choice(["", "A title", "The very long title of a work in many words"]), text.strip())
        start = rng.randrange(len(passage.document.split()))
        answer = " ".join(passage.document.split()[start : start + rng.randint(1, 4)])
        result = excerpt(passage, 15, "c d", [answer])
        assert 1 <= len(result.split()) <= 18 + 2
        held += holds_answer(passage.document, [answer])  # "The" alone counts as no word, so it occurs nowhere
        assert holds_answer(result, [answer]) == holds_answer(passage.document, [answer])
    assert held > 375


@pytest.mark.slow
@real_data
def test_real_searches_keep_their_answers_and_leak_neither_answers_nor_questions() -> None:
    traces = [{**row, "verdicts": {"rule": rule_verdicts(row)}} for row in read_traces(TRACES)[:500]]
    sets = build_sets(traces, SetOptions())
    for row in sets:
        assert 1 <= len(row["documents"]) <= 5
        assert all(0 < len(text.split()) <= 38 for text in row["documents"])
        assert all(rule_verdict(text, row["golden_answers"]) is row["useful"] for text in row["documents"])
    asked = {
        name: {normalize_answer(row["question"]) for row in sets if row["split"] == name} for name in ("train", "test")
    }
    assert asked["train"] and asked["test"] and not asked["train"] & asked["test"]
    keys = {(normalize_answer(row["question"]), normalize_answer(row["query"]), row["useful"]) for row in sets}
    assert len(keys) == len(sets) > 500


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    rows = [
        {
            "question": f"Who wrote book {n}?",
            "golden_answers": [f"Author {n}"],
            "query": f"book {n}",
            "documents": [{"title": f"Book {n}", "text": f"It is by Author {n}."}, "Rain: It rains.", "It snows."],
        }
        for n in range(30)
    ]
    return write_rows(tmp_path / "traces.jsonl", rows)


@pytest.fixture
def command(traces: Path, tmp_path: Path) -> list[str]:
    return ["--traces", str(traces), "--output_dir", str(tmp_path / "sft")]


def test_the_recipe_makes_a_dataset_that_loads(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sft"
    load_recipe("build_simulator_data").main([*command, "--p_test", "0.3"])
    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert len(loaded["train"]) + len(loaded["test"]) == 60
    row = next(row for row in loaded["train"] if row["useful"])
    n = row["query"].split()[1]
    assert (row["judge"], row["split"]) == ("rule", "train") and "prompt" not in row, "the tuning recipe writes it"
    example = simulator_example(row)
    assert example in load_examples(str(folder)).to_list()
    assert f'"Who wrote book {n}?" whose answer is Author {n}.' in example["prompt"][1]["content"]
    assert example["completion"] == [{"role": "assistant", "content": f"Doc 1: Book {n}: It is by Author {n}."}]
    assert len(load_examples(str(folder), "test")) == len(loaded["test"])
    found = json.loads((folder / "statistics.json").read_text())
    assert found["documents"] == {"useful": 30, "noisy": 60, "no_verdict": 0}
    assert f"| train | {found['sets']['train']['useful']['sets']} useful |" in capsys.readouterr().out
    card = (folder / "README.md").read_text()
    assert "by a rule: a golden answer" in card and "Useful Output:\n\nDoc 1: Book" in card


def test_overwriting_clears_the_earlier_dataset_and_nothing_else(
    command: list[str], tmp_path: Path, refusal: Refusal
) -> None:
    folder = tmp_path / "sft"
    load_recipe("build_simulator_data").main([*command, "--p_test", "0.5"])
    (folder / "notes.txt").write_text("mine")
    assert "is not empty" in refusal("build_simulator_data", command)
    command += ["--p_test", "0", "--overwrite_output_dir", "true"]
    with sole_writer(folder):
        assert "another run is writing to" in refusal("build_simulator_data", command)
    assert (folder / "test.jsonl").exists()
    load_recipe("build_simulator_data").main(command)
    left = {path.name for path in folder.iterdir()}
    assert left == {"train.jsonl", "statistics.json", "README.md", "notes.txt", "_lock"}
    assert len((folder / "train.jsonl").read_bytes().split(b"\n")) == 60 + 1
    assert "split: test" not in (folder / "README.md").read_text()


def test_the_card_of_a_models_verdicts_names_the_model(traces: Path, command: list[str], tmp_path: Path) -> None:
    rows = [row | {"verdicts": {"qwen-max": [True, False, None]}} for row in rows_of(traces)]
    write_rows(traces, rows)
    load_recipe("build_simulator_data").main([*command, "--judge", "qwen-max", "--prompt", "tinyworld"])
    card = (tmp_path / "sft/README.md").read_text()
    assert card.startswith("---\ntask_categories:\n- text-generation\n") and "split: train" in card
    assert "labelled by `qwen-max`, asked whether it alone suffices to answer the query" in card
    assert "30 are useful, 30 noisy;\n30 have no verdict and are left out" in card
    assert "Write five useful documents." in card and "called `tinyworld`" in card and '"judge": "qwen-max"' in card


def test_the_recipe_pushes_the_folder_with_its_card(
    hub: HubStub, refusal: Refusal, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, command = tmp_path / "sft", [*command, "--push_to_hub", "someone/sft"]
    load_recipe("build_simulator_data").main(command)
    assert hub.seen[0].path == "/api/repos/create"
    assert set(hub.committed) == {"train.jsonl", "test.jsonl", "README.md", "statistics.json"}
    assert hub.committed["train.jsonl"] == (folder / "train.jsonl").read_bytes()
    assert hub.committed["README.md"].startswith(b"---\ntask_categories:")
    output = capsys.readouterr().out
    assert "pushed to" in output and "/someone/sft" in output
    hub.refuse = True
    error = refusal("build_simulator_data", [*command, "--overwrite_output_dir", "true"])
    assert "the dataset 'someone/sft' cannot be made on the Hub" in error
    assert (folder / "test.jsonl").exists()  # nothing is cleared before the Hub agrees


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--judge", "qwen-max"], "search 1 has no verdicts of 'qwen-max'; it was judged by: rule"),
        (["--min_documents", "4"], "makes a set: see --judge and --min_documents"),
        (["--num_words", "0"], "num_words is 0"),
        (["--traces", "none.jsonl"], "there is no file none.jsonl"),
    ],
)
def test_a_mistake_gets_one_sentence(refusal: Refusal, command: list[str], flags: list[str], message: str) -> None:
    assert message in refusal("build_simulator_data", [*command, *flags])
