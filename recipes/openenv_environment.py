"""Serve searches as an OpenEnv environment, on any engine (tried with openenv-core 0.3.0; start a simulator first).

    pip install openenv-core==0.3.0
    python recipes/openenv_environment.py --port 8001

reset(question=.., golden_answers=[..], p_noise=0.0) gives the prompt; step({"text": a turn of the policy's}) gives
documents, a hint, or the end with its reward, F1. OpenEnv's client holds a session; a bare POST /step does not.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import uvicorn

from zerosearch.command_line import exit_on_user_error, parse
from zerosearch.data import text_number
from zerosearch.engines import SearchEngine, SearchRequest
from zerosearch.engines.options import EngineOptions, make_engine
from zerosearch.engines.retriever_server import listen
from zerosearch.http import run_in_background
from zerosearch.metrics import f1
from zerosearch.prompts import PROMPT_SETS, Agent, PromptSetName
from zerosearch.protocol import parse_action

try:
    from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app
except ModuleNotFoundError:
    print("error: OpenEnv is not installed: pip install openenv-core==0.3.0", file=sys.stderr)
    raise SystemExit(2) from None


class Turn(Action):
    text: str


class Shown(Observation):
    text: str


@dataclass
class ServerArguments:
    """How questions are asked, and where."""

    prompt: PromptSetName = field(default="paper", metadata={"help": "The prompt set: see zerosearch.prompts."})
    max_turns: int = field(default=4, metadata={"min": 0, "help": "Turns that may search; one more may answer."})
    sessions: int = field(default=512, metadata={"min": 1, "help": "Trajectories at a time."})
    host: str = "127.0.0.1"
    port: int = 8001


class SearchSession(Environment):
    """One trajectory at a time. A search that fails for good is the client's error."""

    SUPPORTS_CONCURRENT_SESSIONS = True
    state = State()

    def __init__(self, engine: SearchEngine, agent: Agent, max_turns: int) -> None:
        super().__init__()
        self.engine, self.agent, self.max_turns = engine, agent, max_turns

    def reset(
        self, question: str, golden_answers: Sequence[str], p_noise: float = 0.0, seed: int = 0, episode_id: str = ""
    ) -> Shown:
        self.row, self.state = (question, tuple(golden_answers), p_noise), State(episode_id=episode_id)
        self.key = (seed, text_number(question))
        return Shown(text=self.agent.prompt(question))

    def step(self, action: Turn) -> Shown:
        self.state.step_count += 1
        act = parse_action(action.text)
        if act.kind == "answer" or self.state.step_count > self.max_turns:
            score = f1(act.content if act.kind == "answer" else None, self.row[1])
            return Shown(text="", done=True, reward=score)
        if act.kind == "invalid":
            return Shown(text=self.agent.hint)
        request = SearchRequest(act.content, *self.row, (*self.key, self.state.step_count))
        found = run_in_background(self.engine.search(request))
        return Shown(text=self.agent.write_observation(self.agent.show_documents(found.documents, found.titles)))


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments, options = parse(ServerArguments, EngineOptions, argv=argv)
    prompts = PROMPT_SETS[arguments.prompt]
    session = partial(SearchSession, make_engine(options, prompts.simulator), prompts.policy, arguments.max_turns)
    application = create_fastapi_app(session, Turn, Shown, max_concurrent_envs=arguments.sessions)
    listener = listen(arguments.host, arguments.port)
    print(f"environment ready at http://{arguments.host}:{listener.getsockname()[1]} (Ctrl-C ends it)", flush=True)
    uvicorn.Server(uvicorn.Config(application, log_level="error")).run([listener])


if __name__ == "__main__":
    main()
