"""Self-search (SSRL, Fan et al. 2025, arXiv 2508.10874): the policy is its own engine, prompted.

    python recipes/variants/self_search.py --config recipes/configs/qwen2.5-3b.yaml --output_dir outputs/self-search

What a search returns, the policy writes itself, from memory, with the weights of the moment; as in the paper these
tokens are not learned from. There they are written within the same reply, and a reward for the form is added.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from zerosearch.engines import SearchEngine, SearchRequest, SearchResult
from zerosearch.engines.options import EngineOptions
from zerosearch.prompts import Agent, PromptSet

sys.path.append(str(Path(__file__).parents[1]))
import grpo

# Asked where an agent that reads would be asked for notes on the documents, of which there are none.
WRITE = (
    "Write down, in a few sentences, what you know that answers the query.\n{documents}\nQuestion: {question}\n"
    "Query: {query}\n"
)


class NoEngine:
    """Find nothing."""

    name, max_concurrency = "none: the policy itself", 1000

    async def search(self, request: SearchRequest) -> SearchResult:
        return SearchResult(())

    async def aclose(self) -> None:
        pass


def choose_agent(prompts: PromptSet) -> Agent:
    return replace(prompts.policy, reading_template=WRITE)


def choose_engine(options: EngineOptions, prompts: PromptSet) -> SearchEngine:
    return NoEngine()


grpo.choose_agent, grpo.choose_engine = choose_agent, choose_engine

if __name__ == "__main__":
    grpo.main()
