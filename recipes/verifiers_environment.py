"""Questions with a search tool as an environment of verifiers (tried with 0.4.0): a retriever or a simulator answers.

    pip install verifiers==0.4.0 uv       # in an environment of its own: it asks for an older openai and mcp
    python recipes/serve_retriever.py --engine simulated &
    PYTHONPATH=recipes vf-eval verifiers_environment --env.taskset.dataset train.jsonl --env.agent.harness.id null \
        --env.agent.runtime.type subprocess --client.base-url http://127.0.0.1:8000/v1 --model MODEL --no-push

Each query goes out with its question and answers; how noisy a simulator is, is the schedule of serve_retriever.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import verifiers.v1 as vf
from httpx import AsyncClient

from zerosearch.data import load_questions, passage_of
from zerosearch.metrics import f1
from zerosearch.prompts import PAPER
from zerosearch.protocol import format_documents, parse_action


class Question(vf.TaskData):
    question: str
    golden_answers: list[str]


class Asked(vf.State):
    """What the tool knows of the rollout that calls it."""

    question: str = ""
    golden_answers: tuple[str, ...] = ()


class RetrieverConfig(vf.SharedToolsetConfig):
    retriever_url: str = "http://127.0.0.1:8000/retrieve"


class Retriever(vf.Toolset[RetrieverConfig, Asked]):
    TOOL_PREFIX = None

    @vf.tool
    async def search(self, query: str) -> str:
        """Search for documents."""
        told = {"questions": [self.state.question], "golden_answers": [self.state.golden_answers]}
        async with AsyncClient(timeout=600) as client:
            reply = await client.post(self.config.retriever_url, json={"queries": [query], "topk": 5, **told})
        (found,) = reply.raise_for_status().json()["result"]
        return format_documents([passage_of(one, "a document").document for one in found])


class SearchTask(vf.Task[Question, Asked]):
    async def setup(self, trace: vf.Trace, runtime: vf.Runtime) -> None:
        trace.state.question, trace.state.golden_answers = self.data.question, tuple(self.data.golden_answers)

    @vf.reward
    async def f1(self, trace: vf.Trace) -> float:
        action = parse_action(trace.last_reply)
        return f1(action.content if action.kind == "answer" else None, self.data.golden_answers)


class SearchConfig(vf.TasksetConfig):
    dataset: str = ""
    tools: RetrieverConfig = RetrieverConfig()


class SearchTaskset(vf.Taskset[SearchTask, SearchConfig]):
    def load(self) -> Iterator[SearchTask]:
        for row in load_questions(self.config.dataset):
            prompt = PAPER.agents["tools"].prompt(row["question"])
            told = {"prompt": prompt, "question": row["question"], "golden_answers": row["golden_answers"]}
            yield SearchTask(Question(id=row["id"], **told), self.config.task)

    @classmethod
    def toolsets(cls, config: SearchConfig) -> list[vf.Toolset]:
        return [Retriever(config.tools)]


__all__ = ["SearchTaskset"]

if __name__ == "__main__":  # verifiers starts the tool's server so
    Retriever.run()
