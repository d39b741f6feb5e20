"""Which policies a simulator can share an engine with, and what comes of it: two adapters decoded in one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from generation_parts import save_adapter
from peft import LoraConfig, get_peft_model
from rain import RainEngine, rain_trainer
from searching import searched
from transformers import AutoModelForCausalLM

from zerosearch.engines import SearchRequest, SearchResult
from zerosearch.engines.colocated_simulator import ColocatedSimulator
from zerosearch.engines.simulated import SimulatedEngine
from zerosearch.errors import UserError
from zerosearch.generation.vllm_two_adapters import TwoAdapterGenerator
from zerosearch.simulator.server import simulator_server
from zerosearch.training.config import SearchConfig
from zerosearch.training.generators import engine_adapters

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
APART = r"; serve the simulator apart \(recipes/serve_simulator.py\), with --simulator served$"


@pytest.fixture(scope="module")
def simulator(tiny_policy_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter over the tiny policy."""
    return save_adapter(tiny_policy_dir, tmp_path_factory.mktemp("simulator"))


def config_of(**settings: Any) -> SearchConfig:
    pytest.importorskip("vllm")
    options: dict[str, Any] = {"use_vllm": True, "vllm_mode": "colocate", "report_to": "none", **settings}
    return SearchConfig(output_dir="unused", **options)


def test_an_engine_makes_room_for_each_adapter(tiny_policy_dir: Path, simulator: Path) -> None:
    model, wide = str(tiny_policy_dir), LoraConfig(r=20)
    engine = ColocatedSimulator(model=str(simulator))
    room = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 32}
    assert engine_adapters(config_of(), [engine, engine], model, wide) == room
    alone = config_of(sync_adapter=True)
    assert engine_adapters(alone, [RainEngine()], model, LORA) == room | {"max_loras": 1, "max_lora_rank": 8}
    trained = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_policy_dir), LORA)
    assert engine_adapters(alone, [RainEngine()], trained) == room | {"max_loras": 1, "max_lora_rank": 8}
    assert engine_adapters(config_of(), [RainEngine()], model, LORA, quantization_config=object()) == {}
    assert engine_adapters(config_of(vllm_mode="server", sync_adapter=True), [RainEngine()], model, LORA) == {}
    assert engine_adapters(config_of(sync_adapter=False), [RainEngine()], model, LORA) == {}


@pytest.mark.parametrize(
    ("settings", "policy"),
    [
        ({"use_vllm": False}, {"peft_config": LORA}),
        ({}, {}),
        ({}, {"peft_config": LoraConfig(r=4, use_dora=True)}),
        ({}, {"peft_config": LORA, "quantization_config": object()}),
        ({"vllm_mode": "server"}, {}),
    ],
)
def test_an_adapter_that_cannot_be_synced_is_refused_where_it_is_asked_for(
    settings: dict[str, Any], policy: dict[str, Any], tiny_policy_dir: Path
) -> None:
    with pytest.raises(UserError, match="sync_adapter true needs a LoRA adapter that vLLM serves: use_vllm true and"):
        engine_adapters(config_of(sync_adapter=True, **settings), [RainEngine()], str(tiny_policy_dir), **policy)


@pytest.mark.parametrize(
    ("settings", "peft_config"),
    [
        ({"use_vllm": False}, LORA),
        ({"vllm_mode": "server"}, LORA),
        ({"vllm_tensor_parallel_size": 2}, LORA),
        ({}, None),
        ({}, LoraConfig(r=4, use_dora=True)),
    ],
)
def test_a_policy_that_shares_no_engine_is_refused(
    settings: dict[str, Any], peft_config: Any, tiny_policy_dir: Path, simulator: Path
) -> None:
    engine = ColocatedSimulator(model=str(simulator))
    with pytest.raises(UserError, match=f"one colocated simulator lives in the vLLM engine of a policy .*{APART}"):
        engine_adapters(config_of(**settings), [engine], str(tiny_policy_dir), peft_config)


def test_a_simulator_of_another_base_is_refused(tiny_policy_dir: Path, simulator: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_policy_dir)
    base.save_pretrained(tmp_path / "copy")
    base.lm_head.weight.data += 1
    base.save_pretrained(tmp_path / "other")
    engine = ColocatedSimulator(model=str(simulator))
    assert engine_adapters(config_of(), [engine], str(tmp_path / "copy"), LORA), "the same weights by another name"
    with pytest.raises(UserError, match=f"{simulator} is an adapter over {tiny_policy_dir}, and the policy .*{APART}"):
        engine_adapters(config_of(), [engine], str(tmp_path / "other"), LORA)
    whole = ColocatedSimulator(model=str(tiny_policy_dir))
    with pytest.raises(UserError, match=f"the colocated simulator .* is no adapter, but whole weights{APART}"):
        engine_adapters(config_of(), [whole], str(tiny_policy_dir), LORA)
    get_peft_model(base, LoraConfig(r=4, use_dora=True, target_modules=["q_proj"])).save_pretrained(tmp_path / "dora")
    (tmp_path / "dora").joinpath("README.md").unlink()
    with pytest.raises(UserError, match=f"vLLM does not serve the simulator .*dora as an adapter{APART}"):
        engine_adapters(config_of(), [ColocatedSimulator(model=str(tmp_path / "dora"))], str(tiny_policy_dir), LORA)


@pytest.mark.slow
def test_turns_and_searches_share_batches_and_are_those_of_a_policy_and_a_server_of_their_own(
    tiny_policy_dir: Path, simulator: Path, tmp_path: Path
) -> None:
    pytest.importorskip("vllm")
    asked = {"max_tokens": 40, "num_documents": 3}
    engine = ColocatedSimulator(model=str(simulator), **asked)
    found: dict[SearchRequest, SearchResult] = {}
    search = engine.search

    async def remembered(request: SearchRequest) -> SearchResult:
        found[request] = await search(request)
        return found[request]

    engine.search = remembered  # type: ignore[method-assign]
    settings: dict[str, Any] = {"use_vllm": True, "vllm_mode": "colocate", "learning_rate": 0.05, "noise_start": 0.5}
    trainer = rain_trainer(tiny_policy_dir, tmp_path, engine, {"peft_config": LORA}, **settings)
    generator = trainer.generator
    assert isinstance(generator, TwoAdapterGenerator)
    batches: list[tuple[int, int]] = []
    step = generator._finished_outputs
    generator._finished_outputs = lambda: (  # type: ignore[method-assign]
        batches.append((len(generator.in_flight), len(generator.replies))) or step()  # type: ignore[func-returns-value]
    )
    trainer.train()
    first, second, _ = trainer.state.log_history
    assert max(entry["sampling/sampling_logp_difference/max"] for entry in (first, second)) < 1e-3
    assert second["kl"] > 1e-3, "the policy has left its base"
    assert first["search/failed_search"] == 0 and len(found) > 10
    assert 0 < first["search/noisy_share"] < 1
    assert any(turns > 2 and replies > 2 for turns, replies in batches), "decoded in one batch"
    assert not generator.replies and not generator.in_flight

    with simulator_server(str(simulator), 0, max_model_len=1024, dtype="float32", num_threads=1) as server:
        served = SimulatedEngine(server.base_url, **asked)
        served.check()
        results = searched(served, *found)
    same = [mine.documents == theirs.documents for mine, theirs in zip(found.values(), results, strict=True)]
    assert sum(same) >= 0.95 * len(same), "rounding occasionally flips a sampled token"
    assert [mine.noisy for mine in found.values()] == [theirs.noisy for theirs in results]
