"""Teach a language model to search with an engine that another model plays, after ZeroSearch (arXiv 2505.04588).

    from zerosearch import SearchConfig, SearchTrainer, SimulatedEngine, f1_reward

The names below are imported when they are first used, so `import zerosearch` is quick and needs neither torch nor
vLLM.

Importing it also sets what other libraries read when they are imported in turn, unless it is set: DO_NOT_TRACK=1, or
vLLM and TRL would report to their makers what they run on; and OMP_WAIT_POLICY=passive.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# On a CPU torch's threads spin while they wait: a step beside a busy simulator took 61 s instead of 2.5 s (two cores).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# On a CPU they warn of kernels that they could download, and of a GPU's that a CUDA build of torch brings in vain.
for _speaker in ("bitsandbytes", "torch.utils.cpp_extension", "vllm.triton_utils.importing"):
    logging.getLogger(_speaker).setLevel(logging.ERROR)
if os.environ.setdefault("DO_NOT_TRACK", "1") == "1" and "huggingface_hub.constants" in sys.modules:
    sys.modules["huggingface_hub.constants"].HF_HUB_DISABLE_TELEMETRY = True  # type: ignore[attr-defined] # read already

if TYPE_CHECKING:
    from zerosearch.engines import SearchEngine, SearchError, SearchRequest, SearchResult
    from zerosearch.engines.bm25 import BM25Engine
    from zerosearch.engines.google import GoogleEngine
    from zerosearch.engines.retriever import RetrieverEngine
    from zerosearch.engines.simulated import SimulatedEngine
    from zerosearch.errors import UserError
    from zerosearch.evaluation.evaluate import evaluate
    from zerosearch.prompts import PROMPT_SETS, Agent, PromptSet
    from zerosearch.rollout.loop import RolloutSettings, run_rollouts
    from zerosearch.rollout.trajectory import Trajectory
    from zerosearch.training.config import SearchConfig
    from zerosearch.training.rewards import em_reward, f1_reward
    from zerosearch.training.trainer import SearchTrainer

HOMES = {
    "PROMPT_SETS": "prompts",
    "Agent": "prompts",
    "BM25Engine": "engines.bm25",
    "GoogleEngine": "engines.google",
    "PromptSet": "prompts",
    "RetrieverEngine": "engines.retriever",
    "RolloutSettings": "rollout.loop",
    "SearchConfig": "training.config",
    "SearchEngine": "engines",
    "SearchError": "engines",
    "SearchRequest": "engines",
    "SearchResult": "engines",
    "SearchTrainer": "training.trainer",
    "SimulatedEngine": "engines.simulated",
    "Trajectory": "rollout.trajectory",
    "UserError": "errors",
    "em_reward": "training.rewards",
    "evaluate": "evaluation.evaluate",
    "f1_reward": "training.rewards",
    "run_rollouts": "rollout.loop",
}
__all__ = ["__version__", *HOMES]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'zerosearch' has no attribute {name!r}; it has {', '.join(HOMES)}")
    return getattr(import_module(f"zerosearch.{HOMES[name]}"), name)
