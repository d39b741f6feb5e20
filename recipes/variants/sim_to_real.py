"""Sim-to-real (after SSRL, Fan et al. 2025, arXiv 2508.10874): a run on the simulator ends on a real engine.

    python recipes/variants/sim_to_real.py --config recipes/configs/tinyworld.yaml \\
        --corpus outputs/tinyworld/train_corpus.jsonl --output_dir outputs/sim-to-real

There a policy meets a real engine after training only (examples/ssrl/sim2real.sh of the authors' code), for all its
searches or where it is least certain; that the last steps of training search for real is our choice.
"""

from __future__ import annotations

import sys
from asyncio import Semaphore
from dataclasses import replace
from pathlib import Path

from zerosearch.engines import SearchEngine, SearchRequest, SearchResult
from zerosearch.engines.options import EngineKind, EngineOptions, make_engine
from zerosearch.prompts import PromptSet

sys.path.append(str(Path(__file__).parents[1]))
import grpo

LAST_SIMULATED_STEP = 20  # of 30 with recipes/configs/tinyworld.yaml
REAL: EngineKind = "bm25"


class SimulatedThenReal:
    """Ask the simulator up to a step, and a real engine from there on; each one's queries are counted."""

    name = "simulated, then real"

    def __init__(self, simulated: SearchEngine, real: SearchEngine) -> None:
        self.engines = (simulated, real)
        self.limits = [Semaphore(engine.max_concurrency) for engine in self.engines]
        self.max_concurrency = max(engine.max_concurrency for engine in self.engines)

    async def search(self, request: SearchRequest) -> SearchResult:
        _, step, *_ = request.key
        is_real = step > LAST_SIMULATED_STEP
        async with self.limits[is_real]:
            return await self.engines[is_real].search(request)

    async def aclose(self) -> None:
        for engine in self.engines:
            await engine.aclose()


def choose_engine(options: EngineOptions, prompts: PromptSet) -> SearchEngine:
    simulated, real = (make_engine(replace(options, engine=kind), prompts.simulator) for kind in ("simulated", REAL))
    return SimulatedThenReal(simulated, real)


grpo.choose_engine = choose_engine

if __name__ == "__main__":
    grpo.main()
