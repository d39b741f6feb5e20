"""recipes/openenv_environment.py: our searches as an OpenEnv environment, asked by OpenEnv's own client."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from importlib.util import find_spec

import pytest
from chat_server import ChatServer
from recipe_modules import RECIPES, load_recipe

ROW = {"question": "Who wrote Emma?", "golden_answers": ["Jane Austen"]}
FIVE = "\n".join(f"Doc {number}: Emma is by Jane Austen." for number in range(1, 6))


@pytest.mark.skipif(find_spec("openenv") is not None, reason="OpenEnv is installed")
def test_without_openenv_one_sentence_says_how_to_get_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        load_recipe("openenv_environment")
    assert capsys.readouterr().err == "error: OpenEnv is not installed: pip install openenv-core==0.3.0\n"


@pytest.mark.slow
def test_its_own_client_plays_trajectories_side_by_side(chat_server: ChatServer) -> None:
    core = pytest.importorskip("openenv.core", reason="needs OpenEnv: pip install openenv-core==0.3.0")
    chat_server.write = lambda messages: FIVE if "Query: Emma author\n" in messages[-1]["content"] else 500
    command = [sys.executable, RECIPES / "openenv_environment.py", "--port", "0", "--max_turns", "2"]
    with ExitStack() as stack:
        server = stack.enter_context(
            subprocess.Popen([*command, "--simulator_url", chat_server.url], stdout=subprocess.PIPE, text=True)
        )
        stack.callback(server.terminate)
        assert server.stdout is not None
        address = server.stdout.readline().split()[3]
        first, second = (stack.enter_context(core.GenericEnvClient(base_url=address).sync()) for _ in range(2))
        shown = first.reset(**ROW, p_noise=1.0)
        assert shown.observation["text"].endswith("Question: Who wrote Emma?\n") and not shown.done
        second.reset(**ROW, seed=1, episode_id="other")
        shown = first.step({"text": "<think> x </think> <search> Emma author </search>"})
        assert shown.observation["text"] == f"\n\n<information>{FIVE}</information>\n\n"
        assert "whose answer is Jane Austen." in (asked := chat_server.requests[-1]["messages"][-1]["content"])
        assert "noisy documents" in asked, "the noise is what the client has set"
        assert "My previous action is invalid" in first.step({"text": "Jane"}).observation["text"]
        assert (first.state()["step_count"], second.state()["step_count"]) == (2, 0)
        assert second.state()["episode_id"] == "other"
        with pytest.raises(RuntimeError, match="the simulator at "):
            second.step({"text": "<search> lost </search>"})
        ends = [second.step({"text": "<answer> Austen </answer>"}), first.step({"text": "<search> more </search>"})]
        assert [(one.done, one.reward) for one in ends] == [(True, pytest.approx(2 / 3)), (True, 0.0)]
