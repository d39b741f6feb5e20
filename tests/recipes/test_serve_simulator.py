"""A LoRA simulator as the recipes tune and serve it, by a real vLLM: its replies, and what a SIGKILL leaves of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from http_servers import free_ports
from peft import PeftModel
from recipe_modules import Refusal, load_recipe
from searching import searched, wait_until
from transformers import AutoModelForCausalLM, AutoTokenizer

from zerosearch.engines import SearchError, SearchRequest
from zerosearch.engines.simulated import SimulatedEngine
from zerosearch.prompts import TINYWORLD_SIMULATOR_PROMPT, simulator_messages
from zerosearch.protocol import split_documents

ROOT = Path(__file__).parents[2]
BASE = ROOT / "data/tinyworld/simulator"
REQUEST = SearchRequest("Anna Vance hails from", "Where does Anna Vance hail from?", ("Port Alder",), key=(0,))


@pytest.mark.parametrize(
    ("flags", "message"),
    [([], "there is no model '{folder}'"), (["--max_model_len", "0"], "max_model_len is 0: it must be at least 1")],
)
def test_a_mistake_gets_one_sentence(tmp_path: Path, flags: list[str], message: str, refusal: Refusal) -> None:
    assert message.format(folder=tmp_path) in refusal("serve_simulator", ["--model", str(tmp_path), *flags])


@pytest.mark.parametrize(
    ("name", "flags"), [("serve_simulator", []), ("measure_fidelity", ["--queries", "{queries}", "--port", "0"])]
)
def test_control_characters_are_shown_and_not_sent(
    name: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queries = tmp_path / "queries.jsonl"
    queries.write_text('{"question": "Q?", "golden_answers": ["a"], "query": "q", "documents": []}\n')
    flags = [flag.format(queries=queries) for flag in flags]
    with pytest.raises(SystemExit):
        load_recipe(name).main([*flags, "--model", "a\x1b[2Jmodel"])
    output, error = capsys.readouterr()
    assert output == "starting a\\x1b[2Jmodel ...\n" and "a\\x1b[2Jmodel" in error and "\x1b" not in error


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter that the recipe has tuned, too fast to be any good."""
    folder = tmp_path_factory.mktemp("adapter")
    row = {"question": REQUEST.question, "golden_answers": ["Port Alder"], "query": REQUEST.query, "useful": True}
    searches = folder.with_suffix(".jsonl")
    searches.write_text(json.dumps({**row, "documents": ["Anna Vance hails from Port Alder."]}) + "\n")
    flags = ["--model_name_or_path", str(BASE), "--searches", str(searches), "--output_dir", str(folder)]
    flags += ["--prompt", "tinyworld", "--tuning", "lora", "--lora_target_modules", "all-linear", "--max_steps", "3"]
    load_recipe("sft_simulator").main([*flags, "--learning_rate", "1e-2", "--measure_fidelity", "false"])
    return folder


@pytest.fixture(scope="module")
def served(adapter: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Return the address of the adapter's server, and the process of the recipe that serves it."""
    port = free_ports()
    command = [sys.executable, str(ROOT / "recipes/serve_simulator.py"), "--model", str(adapter), "--port", str(port)]
    command += ["--max_model_len", "1024", "--dtype", "float32"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        ready = next(line for line in iter(process.stdout.readline, "") if "ready" in line)
        url = f"http://127.0.0.1:{port}/v1"
        assert ready == f"simulator ready at {url} (Ctrl-C ends it)\n"
        yield url, process
        process.kill()


def search(engine: SimulatedEngine, *requests: SearchRequest) -> list[tuple[str, ...]]:
    return [result.documents for result in searched(engine, *requests)]


@pytest.mark.slow
def test_a_tuned_adapter_is_served_as_it_is(served: tuple[str, subprocess.Popen[str]], adapter: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    messages = simulator_messages(
        question=REQUEST.question,
        golden_answers=REQUEST.golden_answers,
        query=REQUEST.query,
        noisy=False,
        template=TINYWORLD_SIMULATOR_PROMPT,
    )
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), adapter)
    written = model.generate(**inputs, max_new_tokens=60, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = split_documents(tokenizer.decode(written, skip_special_tokens=True), 5)
    settings = {"template": TINYWORLD_SIMULATOR_PROMPT, "temperature": 0.0, "max_tokens": 60}
    engine = SimulatedEngine(served[0], **settings)
    assert search(engine, REQUEST) == [expected]
    assert engine.model == "simulator"  # the adapter, which is listed after its base
    assert search(SimulatedEngine(served[0], str(BASE), **settings), REQUEST) != [expected]
    spelled = [replace(REQUEST, query=f"Anna Vance {end} hails from") for end in ("<|endoftext|>", "< |endoftext|>")]
    plain, unchecked = search(engine, spelled[1]), search(engine, spelled[0])
    engine.check()
    assert search(engine, spelled[0]) == plain != unchecked


@pytest.mark.slow
def test_it_answers_many_searches_and_repeats_itself_by_key(served: tuple[str, subprocess.Popen[str]]) -> None:
    # Long enough that their prompts do not fit into one batch: with "chunked prefill" the seeds would end the server.
    requests = [
        SearchRequest(f"Emma {row} " * 60, "Who wrote Emma?", ("Jane Austen",), p_noise=0.5, key=(0, 1, row, 0, 0))
        for row in range(48)
    ]

    def engine() -> SimulatedEngine:
        return SimulatedEngine(served[0], str(BASE), TINYWORLD_SIMULATOR_PROMPT, temperature=1.5, max_tokens=40)

    replies = search(engine(), *requests)
    assert len(set(replies)) == 48  # each key its own seed
    assert search(engine(), requests[0]) == replies[:1]


@pytest.mark.slow
def test_a_reply_that_cannot_fit_is_refused_in_words(served: tuple[str, subprocess.Popen[str]]) -> None:
    engine = SimulatedEngine(served[0], max_tokens=2000)
    with pytest.raises(SearchError, match=r"attempt 1 of 6: HTTP status 400.*2000"):
        search(engine, SearchRequest("q", "Q?", ("a",), key=(1,)))


@pytest.mark.slow
def test_a_recipe_that_is_killed_leaves_no_vllm(served: tuple[str, subprocess.Popen[str]]) -> None:
    _, process = served  # the last test that needs it
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    (group,) = map(int, children.stdout.split())
    assert len(processes(group)) >= 2  # the server and its watcher
    os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: not processes(group))


def processes(group: int) -> list[str]:
    """Return the processes of a group that run, as `ps` lists them."""
    listed = subprocess.run(["ps", "-A", "-o", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    lines = [line.split(maxsplit=2) for line in listed.splitlines()]
    return [args for pgid, state, args in lines if int(pgid) == group and not state.startswith("Z")]
