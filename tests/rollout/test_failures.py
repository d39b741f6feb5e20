"""What a training run does when a service that it needs, behind real HTTP, stops answering."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from rain import rain_trainer

from zerosearch.engines import SearchError
from zerosearch.engines.simulated import SimulatedEngine
from zerosearch.rollout.in_flight import close_engine
from zerosearch.training.trainer import SearchTrainer

if TYPE_CHECKING:
    from chat_server import ChatServer

pytest_plugins = ("chat_server",)  # fixtures
DOCUMENTS = "\n".join(f"Doc {number}: It rains." for number in range(1, 6))


@pytest.fixture
def make_trainer(
    tiny_policy_dir: Path, tmp_path: Path, chat_server: ChatServer
) -> Iterator[Callable[..., SearchTrainer]]:
    engine = SimulatedEngine(chat_server.url, max_retries=1, timeout_s=2.0)

    def make(**settings: Any) -> SearchTrainer:
        return rain_trainer(tiny_policy_dir, tmp_path / "policy", engine, **{"max_steps": 4, **settings})

    yield make
    close_engine(engine)


@pytest.mark.slow
def test_a_simulator_that_starts_failing_stops_the_run_with_a_checkpoint_and_the_remedy(
    make_trainer: Callable[..., SearchTrainer], chat_server: ChatServer
) -> None:
    trainer = make_trainer()
    chat_server.write = lambda messages: 503 if trainer.state.global_step >= 2 else DOCUMENTS
    with pytest.raises(SearchError) as caught:
        trainer.train()
    message = str(caught.value)
    assert re.match(
        r"\d+% of the trajectories of step 3 lost a search, more than max_failed_search_share \(10%\)", message
    )
    port = chat_server.url.split(":")[-1].removesuffix("/v1")
    assert f"the simulator at {chat_server.url}" in message and "HTTP status 503" in message
    assert re.search(rf"recipes/serve_simulator.py --model \w+ --port {port}\) and resume the run$", message)
    state = json.loads((Path(trainer.args.output_dir) / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    queries = json.loads((Path(trainer.args.output_dir) / "engine_queries.json").read_text())
    # Those asked in vain, and asked again, are counted too; what got no further than a probe of its health is not.
    assert queries["simulated"] == len(chat_server.requests)
