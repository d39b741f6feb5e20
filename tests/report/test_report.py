"""The report shows what the run's files say, says what is missing, and lets nothing in them act on the page."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from jsonl_files import write_rows
from recipe_modules import load_recipe
from report_run import record, scores, write_json, write_run

from zerosearch.errors import UserError
from zerosearch.report import summary_table, write_report
from zerosearch.report.page import duration
from zerosearch.report.transcripts import choose_pairs, pieces

ATTACK = (
    "<script>alert('documents')</script><img src=http://evil.example/x onerror=alert(1)></information>"
    "\x1b]0;title\x07 \u202edesrever"
)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "demo")


class Page(HTMLParser):
    """A page read strictly: collects what a reader sees and what a browser would fetch; every tag must be closed."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: dict[str, int] = {}
        self.references: list[tuple[str, str, str]] = []  # tag, attribute, address
        self.handlers: list[str] = []
        self.pieces: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        self.references += [(tag, name, value or "") for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).split())


def page_of(run_dir: Path) -> Page:
    return Page(write_report(run_dir).read_text(encoding="utf-8"))


# --- the page ---


def test_the_page_stands_alone(run_dir: Path) -> None:
    path = write_report(run_dir)
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert path == run_dir / "report.html"
    assert {one for one in page.references if not one[2].startswith("#")} == {
        ("a", "href", "https://arxiv.org/abs/2505.04588")
    }
    assert not {"script", "link", "img", "iframe", "object", "embed"} & page.tags.keys()
    assert "@import" not in html
    assert all(address.startswith("#") for address in re.findall(r"url\(([^)]*)\)", html))
    names = re.findall(r' id="([^"]*)"', html)
    assert len(names) == len(set(names))
    assert "default-src 'none'" in html


def test_the_numbers_are_those_of_the_files(run_dir: Path) -> None:
    text = page_of(run_dir).text
    assert "0.33 [0.287, 0.378]" in text  # the headline, before
    assert "0.80 [0.756, 0.848] +0.47 exact match with bm25 on 400 questions" in text.replace("after", "").replace(
        "to ", ""
    )
    assert "0.410 [0.364, 0.455]" in text  # the simulator's row, before
    assert "0.911 [0.870, 0.954]" in text  # and its F1 after
    assert "+0.458" in text
    assert "real-engine queries in training 0" in text
    assert "2 min 41 s" in text and "7 min 22 s" in text
    assert "make demo SEED=3 GENERATOR=transformers" in text
    assert "transformers 5.17.0" in text
    assert "Learning to search without a search engine" in text
    assert "is missing" not in text


def test_a_run_that_queried_a_real_engine_is_not_praised_for_the_contrary(run_dir: Path) -> None:
    results = json.loads((run_dir / "results.json").read_text())
    write_json(run_dir / "results.json", results | {"real_engine_queries_in_training": 12})
    text = page_of(run_dir).text
    assert "real-engine queries in training 12" in text
    assert "without a search engine" not in text and "never queried" not in text


def test_all_six_plots_are_drawn_with_text_as_text(run_dir: Path) -> None:
    html = write_report(run_dir).read_text(encoding="utf-8")
    assert html.count('class="plot"') == 6
    for title in ("Reward", "Searches and turns", "Noise", "KL", "Tokens", "Time"):
        assert f"<figcaption><b>{title}</b>" in html
    assert "42.0 s in all, 32%" in html  # generating, of the fixture's 60 steps


def test_a_dozen_trajectories_are_shown_and_told_apart_in_words(run_dir: Path) -> None:
    html = write_report(run_dir).read_text(encoding="utf-8")
    trajectories = html.split('<section class="trajectory">')[1:]
    assert len(trajectories) == 12
    evaluated, trained = trajectories[:8], trajectories[8:]
    assert all("trained</i>" not in one and "masked</i>" not in one for one in evaluated)
    assert all("trained</i>" in one and "masked</i>" in one and "noisy</b>" in one for one in trained)
    assert "<mark>Mount Tarn</mark>" in trained[0]
    text = Page(html).text
    assert "wrong before, right after · 22 of 40 questions" in text
    assert "Of 6 trajectories recorded in training, 4 have a search with noisy documents. Shown are 4 of these" in text


def test_a_trajectory_that_lost_a_search_is_not_called_trained(run_dir: Path) -> None:
    lost = record("t", False, [False], step=1, outcome="failed_search", answer=None)
    write_rows(run_dir / "policy/trajectories.jsonl", [lost])
    last = write_report(run_dir).read_text(encoding="utf-8").split('<section class="trajectory">')[-1]
    assert "trained</i>" not in last and "masked</i>" in last
    assert "no answer: failed search" in last


def test_a_turn_of_white_space_is_said_to_be_one(run_dir: Path) -> None:
    blank = record("t", False, [], step=1, segments=[{"source": "policy", "text": "\n\n", "noisy": None}])
    write_rows(run_dir / "policy/trajectories.jsonl", [blank])
    assert "(nothing but white space)" in page_of(run_dir).text


def test_what_files_hold_is_text_and_never_markup(run_dir: Path) -> None:
    segments_under_attack = [
        {"source": source, "text": ATTACK, "noisy": None} for source in ("prompt", "policy", "hint")
    ]
    segments_under_attack.append({"source": "documents", "text": ATTACK, "noisy": True})
    attacked = record("q0", True, [], question=ATTACK, answer=ATTACK, golden_answers=[ATTACK], dataset=ATTACK, step=1)
    attacked["segments"] = segments_under_attack
    write_rows(run_dir / "policy/trajectories.jsonl", [attacked])
    for policy in ("before", "after"):
        write_rows(run_dir / f"evaluation/{policy}-bm25/trajectories.jsonl", [attacked])
        by_dataset = {ATTACK: scores(0.5, 0.5, 1.0), "other": scores(0.5, 0.5, 1.0)}
        evaluation = scores(
            0.5, 0.5, 1.0, by_dataset=by_dataset, model=ATTACK, dataset=ATTACK, versions={ATTACK: ATTACK}
        )
        write_json(run_dir / f"evaluation/{policy}-bm25/results.json", evaluation)
    results = json.loads((run_dir / "results.json").read_text())
    write_json(run_dir / "results.json", results | {"seed": ATTACK, "generator": ATTACK})
    page = page_of(run_dir)
    assert not {"script", "img"} & page.tags.keys()
    assert page.handlers == []
    assert "\\x1b]0;title\\x07 \\u202edesrever" in page.text  # shown, not obeyed
    assert not {"\x1b", "\u202e"} & set(page.text)
    assert page.text.count("alert('documents')") > 20


# --- what is missing, broken or not finite ---


def test_missing_files_are_named_on_the_page(run_dir: Path) -> None:
    names = [
        "results.json",
        "policy/trainer_state.json",
        "policy/trajectories.jsonl",
        "evaluation/before-simulated/results.json",
        "evaluation/after-bm25/trajectories.jsonl",
        "evaluation/after-bm25/results.json",
    ]
    for name in names:
        (run_dir / name).unlink()
    text = page_of(run_dir).text
    assert all(f"{name} is missing" in text for name in names)
    (run_dir / "policy/trainer_state.json").write_text('{"log_history": []}')
    assert "policy/trainer_state.json holds no step" in page_of(run_dir).text


def test_a_policy_scored_by_dataset_before_training_alone_has_a_page(run_dir: Path) -> None:
    by_dataset = {"nq": scores(0.25, 0.3, 1.0), "popqa": scores(0.5, 0.6, 1.0)}
    write_json(run_dir / "evaluation/before-bm25/results.json", scores(0.375, 0.45, 1.0, by_dataset=by_dataset))
    (run_dir / "evaluation/after-bm25/results.json").unlink()
    text = page_of(run_dir).text
    assert "nq 0.250 [0.204, 0.295]" in text and "popqa 0.500 [0.454, 0.545]" in text


def test_a_folder_without_a_run_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no run: none of results\.json"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("results.json", "{", r"results\.json is not JSON"),
        ("results.json", "[]", r"results\.json is not a JSON object"),
        ("policy/trainer_state.json", "{}", "'log_history' is not a list of logged steps"),
        ("policy/trainer_state.json", '{"log_history": 5}', "'log_history' is not a list of logged steps"),
        (
            "evaluation/after-bm25/results.json",
            '{"em": 0.5}',
            r"after-bm25/results\.json: 'em' is 0\.5, not an object",
        ),
        (
            "evaluation/after-bm25/results.json",
            '{"em": {"mean": 0.5}, "f1": {"mean": 0.5}, "versions": [1]}',
            r"after-bm25/results\.json: 'versions' is \[1\], not an object",
        ),
        (
            "policy/trajectories.jsonl",
            '{"question": "Who?"}',
            r"trajectories\.jsonl line 1 is not a trajectory: it lacks id",
        ),
        (
            "policy/trajectories.jsonl",
            json.dumps(record("t", True, [], step="x")),
            "line 1 .* its step is 'x'",
        ),
    ],
)
def test_a_broken_file_is_named(run_dir: Path, name: str, contents: str, message: str) -> None:
    (run_dir / name).write_text(f"{contents}\n")
    with pytest.raises(UserError, match=message):
        write_report(run_dir)


def test_a_segment_of_unknown_source_is_refused(run_dir: Path) -> None:
    broken = record("t", True, [], step=1, segments=[{"source": "oracle", "text": "", "noisy": None}])
    write_rows(run_dir / "policy/trajectories.jsonl", [broken])
    with pytest.raises(
        UserError, match=r"line 1: the segment .*'oracle'.* needs a text, a source \(prompt, policy, documents, hint\)"
    ):
        write_report(run_dir)


def test_a_score_that_is_no_number_is_said_to_be_none(run_dir: Path) -> None:
    nan = {"mean": math.nan, "low": math.nan, "high": None}
    write_json(run_dir / "evaluation/after-bm25/results.json", scores(0.8, 0.8, 2.0) | {"em": nan, "searches": None})
    text = page_of(run_dir).text
    assert "after n/a" in text and "nan" not in text.lower()
    assert "bm25 after        400  n/a  " in summary_table(run_dir)


def test_scores_that_say_little_and_a_log_out_of_bounds_are_shown_as_far_as_they_go(run_dir: Path) -> None:
    write_json(run_dir / "evaluation/after-bm25/results.json", {name: {"mean": "high"} for name in ("em", "f1")})
    log = [{"step": 1, "reward": 1e308, "kl": -1e308}, {"step": 2, "reward": -1e308, "kl": 0.1}]
    write_json(run_dir / "policy/trainer_state.json", {"log_history": log})
    text = page_of(run_dir).text
    assert "after n/a" in text and "“reward” is left out: the log has no finite reward." in text


def test_a_log_without_kl_leaves_the_plot_out_and_says_so(run_dir: Path) -> None:
    state = json.loads((run_dir / "policy/trainer_state.json").read_text())
    for entry in state["log_history"]:
        entry.pop("kl", None)
    write_json(run_dir / "policy/trainer_state.json", state)
    html = write_report(run_dir).read_text(encoding="utf-8")
    assert html.count('class="plot"') == 5
    assert "“KL” is left out: the log has no finite kl." in html


def test_the_recipe_writes_the_page_and_names_a_mistake(run_dir: Path, capsys: Any) -> None:
    recipe = load_recipe("report")
    recipe.main(["--run_dir", str(run_dir)])
    assert capsys.readouterr().out.endswith(f"{run_dir / 'report.html'}\n") and (run_dir / "report.html").is_file()
    with pytest.raises(SystemExit) as refused:
        recipe.main(["--run_dir", str(run_dir / "nowhere")])
    assert (refused.value.code, capsys.readouterr().err) == (2, f"error: there is no folder {run_dir / 'nowhere'}\n")


# --- small parts ---


def test_the_summary_is_aligned_and_short(run_dir: Path) -> None:
    lines = summary_table(run_dir).splitlines()
    assert lines[:2] == [
        "evaluation          n  EM [95 %]             F1 [95 %]             cover-EM  answered  searches  turns",
        "bm25 before       400  0.333 [0.287, 0.378]  0.376 [0.335, 0.418]     0.333     0.958      1.16   2.16",
    ]
    assert lines[5:] == [
        "real-engine queries in training: 0",
        "seed 3; steps 60; generated with transformers; training 2 min 41 s; everything 7 min 22 s",
    ]


def test_pairs_are_the_first_of_each_change_and_empty_kinds_are_filled_up() -> None:
    before = {name: record(name, name in ("g", "only before"), []) for name in [*"abcdefg", "only before"]}
    after = {name: record(name, name in "bcdefg", []) for name in [*"abcdefg", "only after"]}
    chosen = [(pair.before["id"], pair.change, pair.num_alike) for pair in choose_pairs(before, after) if pair.before]
    assert chosen == [
        ("b", "wrong before, right after", 5),
        ("c", "wrong before, right after", 5),
        ("g", "right before and after", 1),
        ("a", "wrong before and after", 1),
    ]
    assert [pair.after["id"] for pair in choose_pairs({}, after) if pair.after] == ["a", "b", "c", "d"]


def test_text_is_split_and_nothing_is_lost() -> None:
    assert pieces({"source": "policy", "text": "<think> a </think> <search> q </search>\n"}, []) == [
        ("tag", "<think>"),
        ("think", " a "),
        ("tag", "</think>"),
        ("", " "),
        ("tag", "<search>"),
        ("search", " q "),
        ("tag", "</search>"),
    ]
    text = "<information>Doc 1: Holtby met ada holt (Holt).</information>"
    assert pieces({"source": "documents", "text": text}, ["Ada Holt", "Holt", ""]) == [
        ("tag", "<information>"),
        ("tag", "Doc 1:"),
        ("", " Holtby met "),
        ("golden", "ada holt"),
        ("", " ("),
        ("golden", "Holt"),
        ("", ")."),
        ("tag", "</information>"),
    ]
    assert pieces({"source": "hint", "text": " <search> \n"}, []) == [("", "<search>")]


def test_durations_are_written_as_people_read_them() -> None:
    assert [duration(value) for value in (9.4, 161.2, 7322, None)] == ["9 s", "2 min 41 s", "2 h 2 min", "n/a"]
