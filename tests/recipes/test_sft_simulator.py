"""The SFT recipe run as a user would: every weight, LoRA and QLoRA; killed, measured and pushed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from chat_server import ChatServer
from hub_stub import HubStub
from jsonl_files import write_rows
from recipe_modules import Refusal, as_flags, load_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from zerosearch.command_line import parse
from zerosearch.errors import UserError
from zerosearch.simulator import fidelity
from zerosearch.training import tuning

ROOT = Path(__file__).parents[2]
BASE = ROOT / "data/tinyworld/simulator"
SEARCHES = [
    {
        "question": f"Where does {name} hail from?",
        "golden_answers": [place],
        "query": f"{name} hails from",
        "documents": [f"{name} hails from {place if useful else 'Mount Kelso'}."],
        "useful": useful,
    }
    for name, place in [("Oscar Colby", "Mount Kelso"), ("Anna Vance", "Port Alder"), ("Ada Marsh", "Lake Corin")]
    for useful in (True, False)
]


@pytest.fixture(scope="module")
def searches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("searches") / "searches.jsonl", SEARCHES)


def arguments(searches: Path, output_dir: Path, /, **changes: Any) -> list[str]:
    settings = {
        **{"model_name_or_path": BASE, "searches": searches, "output_dir": output_dir, "prompt": "tinyworld"},
        **{"max_steps": 3, "learning_rate": 1e-2, "gradient_checkpointing": False, "logging_steps": 1, "seed": 0},
        **{"lora_target_modules": "all-linear", "measure_fidelity": False},
        **changes,
    }
    return as_flags(settings)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


@pytest.fixture(scope="module")
def tuned(searches: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Return the folder of a run of each kind; that of LoRA held a whole model before."""
    root = tmp_path_factory.mktemp("tuned")
    recipe = load_recipe("sft_simulator")
    # The second of its epochs ends after step 6.
    saved = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1}
    recipe.main(arguments(searches, root / "full", **saved))
    shutil.copytree(root / "full", root / "lora")
    (root / "lora/fidelity.json").write_text("{}")
    (root / "lora/checkpoint-notes.txt").write_text("mine")
    recipe.main(arguments(searches, root / "lora", **saved, tuning="lora", overwrite_output_dir=True))
    recipe.main(arguments(searches, root / "merged", tuning="qlora", merge=True))
    yield {name: root / name for name in ("full", "lora", "merged")}
    shutil.rmtree(root)


@pytest.mark.slow
def test_full_tuning_saves_a_model_that_has_learned(tuned: dict[str, Path]) -> None:
    before, after = weights(BASE), weights(tuned["full"])
    assert before.keys() == after.keys()
    assert not torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    made = json.loads((tuned["full"] / "simulator.json").read_text())
    assert (made["tuning"], made["steps"], made["examples"], made["prompt"]) == ("full", 5, 6, "tinyworld")
    assert made["last_loss"] > 0 and made["batch_size"] == 2


# Before the model was saved; while the last checkpoint was written, in the second epoch; of an adapter, with dropout.
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "last"), [("full", 5), ("full", 4), ("lora", 4)])
def test_a_tuning_resumes_as_if_it_had_not_been_killed(
    searches: Path, tuned: dict[str, Path], tmp_path: Path, kind: str, last: int
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(tuned[kind], folder)
    (weights_file,) = folder.glob("*model.safetensors")
    weights_file.unlink()
    if last == 4:
        os.truncate(folder / "checkpoint-5/trainer_state.json", 300)
    flags = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "tuning": kind}
    load_recipe("sft_simulator").main(arguments(searches, folder, **flags, resume_from_checkpoint=True))
    assert (folder / "simulator.json").read_bytes() == (tuned[kind] / "simulator.json").read_bytes()
    assert weights_file.read_bytes() == (tuned[kind] / weights_file.name).read_bytes()


@pytest.mark.slow
def test_an_adapter_is_saved_alone_and_clears_what_an_earlier_run_has_made(tuned: dict[str, Path]) -> None:
    folder = tuned["lora"]
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "checkpoint-notes.txt"} <= names
    assert not names & {"fidelity.json", "config.json", "generation_config.json", "model.safetensors"}
    assert not (folder / "checkpoint-5/model.safetensors").exists()
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(BASE) and settings["r"] == 16
    assert {"q_proj", "down_proj"} <= set(settings["target_modules"])
    card = (folder / "README.md").read_text()
    assert f"python recipes/serve_simulator.py --model {folder}\n" in card and "has not been measured" in card
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "peft" and "search-simulator" in header["tags"]


@pytest.mark.slow
def test_merging_puts_the_adapter_into_the_bases_own_weights(tuned: dict[str, Path]) -> None:
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, tuned["merged"] / "adapter").merge_and_unload().state_dict()
    merged = weights(tuned["merged"])
    assert merged.keys() == expected.keys()
    assert all(torch.allclose(merged[name], expected[name], atol=1e-6) for name in merged)
    changed = [name for name, value in weights(BASE).items() if not torch.allclose(value, merged[name], atol=1e-4)]
    assert changed and all("proj" in name for name in changed)
    assert AutoTokenizer.from_pretrained(tuned["merged"]).chat_template
    assert f"--model {tuned['merged']}\n" in (tuned["merged"] / "README.md").read_text()


@pytest.mark.slow
def test_only_the_documents_are_learned_and_the_card_tells_the_fidelity_that_was_measured(
    searches: Path,
    tmp_path: Path,
    chat_server: ChatServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe, served, learned = load_recipe("sft_simulator"), [], set()

    class Watched(tuning.Tuner):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            for labels in inputs["labels"]:
                learned.add(self.processing_class.decode(labels[labels != -100], skip_special_tokens=True).strip())
            return super().compute_loss(model, inputs, *args, **kwargs)

    @contextmanager
    def already_there(model: str, **options: Any) -> Iterator[SimpleNamespace]:
        served.append(model)
        yield SimpleNamespace(base_url=chat_server.url)

    monkeypatch.setattr(tuning, "Tuner", Watched)
    monkeypatch.setattr(fidelity, "simulator_server", already_there)
    monkeypatch.setattr(recipe, "find_spec", lambda name: True)
    chat_server.write = lambda messages: "\n".join(
        f"Doc {n}: Oscar Colby hails from Mount Kelso." for n in range(1, 6)
    )
    folder, held_out = tmp_path / "out", tmp_path / "held_out.jsonl"
    held_out.write_text("".join(searches.read_text().splitlines(keepends=True)[:4]))  # two of the three queries
    changes = {"measure_fidelity": True, "held_out": held_out, "fidelity_queries": 3, "tuning": "lora"}
    recipe.main(arguments(searches, folder, leave_out_held_out=True, **changes))
    assert json.loads((folder / "simulator.json").read_text())["examples"] == 2
    assert learned == {f"Doc 1: {row['documents'][0]}" for row in SEARCHES[4:]}
    assert served == [str(folder)]
    card = json.loads((folder / "fidelity.json").read_text())
    assert (card["queries"], card["rule"], card["useful_answer_rate"]) == (2, "statement", 0.5)
    assert "Write five" in chat_server.requests[0]["messages"][-1]["content"]
    readme = (folder / "README.md").read_text()
    assert "## Fidelity\n\n2 held-out queries; 2 of them" in readme and "has not been measured" not in readme
    assert "2 held-out queries" in capsys.readouterr().out


@pytest.mark.slow
def test_the_folder_is_pushed_with_its_card_and_without_the_token(
    hub: HubStub, searches: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    changes = {"tuning": "lora", "push_to_hub": True, "hub_model_id": "someone/sim", "hub_token": "hf_MARKER"}
    load_recipe("sft_simulator").main(
        arguments(searches, folder, max_steps=1, save_strategy="steps", save_steps=1, **changes)
    )
    assert hub.seen[0].path == "/api/repos/create"
    names = {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md", "simulator.json"}
    assert names <= hub.committed.keys() and "training_args.bin" not in hub.committed
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert folder / "checkpoint-1/trainer_state.json" in files and not any("training_args" in f.name for f in files)
    written = [*hub.committed.values(), *(path.read_bytes() for path in files)]
    assert not any(b"hf_MARKER" in content for content in written)
    assert hub.committed["README.md"] == (folder / "README.md").read_bytes()
    assert b"hf download someone/sim --local-dir out\npython recipes/serve" in hub.committed["README.md"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuning": "half"}, "half"),
        ({"merge": True}, "--merge is for --tuning lora or qlora"),
        ({"leave_out_held_out": True, "held_out": "none.jsonl"}, "none.jsonl holds no searches to measure with"),
        ({"use_peft": True}, "say --tuning lora instead of --use_peft"),
        ({"searches": "none.jsonl"}, "there is no file none.jsonl"),
        ({"model_name_or_path": "/none"}, "there is no model '/none'"),
        ({"max_length": 20}, "examples do not fit into 20 tokens and would be cut"),
        ({"resume_from_checkpoint": True}, "there is no checkpoint to resume from"),
        ({"lora_target_modules": "q_poj", "tuning": "lora"}, "Target modules q_poj not found"),
        ({"attn_implementation": "flash_attention_2"}, "FlashAttention2"),
        ({"model_init_kwargs": '{"attn_implementation": "nothing_of_the_kind"}'}, "nothing_of_the_kind"),
        ({"model_init_kwargs": '{"nothing": 1}'}, "nothing"),
        ({"eval_strategy": "steps"}, "eval"),
        ({"report_to": "wandb"}, "WandbCallback requires wandb"),
        ({"hub_revision": "v2"}, "--hub_revision has no effect"),
        ({"measure_fidelity": True, "held_out": "none.jsonl"}, "none.jsonl holds no searches to measure with"),
    ],
)
def test_a_mistake_gets_one_sentence(
    changes: dict[str, Any], message: str, searches: Path, tmp_path: Path, refusal: Refusal
) -> None:
    assert message in refusal("sft_simulator", arguments(searches, tmp_path / "out", **changes))


def test_searches_that_cannot_tell_a_faithful_simulator_are_refused_before_it_is_tuned(
    searches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, held_out = load_recipe("sft_simulator"), write_rows(tmp_path / "held_out.jsonl", SEARCHES[:2])  # one query
    monkeypatch.setattr(recipe, "find_spec", lambda name: True)
    flags = arguments(searches, tmp_path / "out", measure_fidelity=True, held_out=held_out)
    with pytest.raises(UserError, match="of 1 held-out queries 1 can tell"):
        recipe.main.__wrapped__(flags)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_tuning_is_refused(searches: Path, tmp_path: Path, refusal: Refusal) -> None:
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text("{}")
    flags = arguments(searches, tmp_path, tuning="lora", resume_from_checkpoint=True)
    assert f"{checkpoint} is of another tuning" in refusal("sft_simulator", flags)


def settings_of(recipe: ModuleType, config: str) -> Any:
    path = str(ROOT / "recipes/configs" / config)
    return parse(recipe.RecipeArguments, recipe.SimulatorConfig, recipe.ModelConfig, argv=["--config", path])


@pytest.mark.parametrize("size", ["3b", "7b", "14b"])
def test_the_configs_hold_the_authors_values(size: str) -> None:
    arguments, training, model = settings_of(load_recipe("sft_simulator"), f"sft-qwen2.5-{size}.yaml")
    assert (training.learning_rate, training.per_device_train_batch_size, training.max_steps) == (1e-6, 2, 1000)
    assert model.model_name_or_path == f"Qwen/Qwen2.5-{size.upper()}-Instruct"
    assert (arguments.prompt, arguments.tuning, training.completion_only_loss) == ("paper", "full", True)


def test_the_faithful_config_is_measured_on_queries_it_was_not_tuned_on() -> None:
    pytest.importorskip("vllm")
    fidelity = load_recipe("measure_fidelity")
    arguments, _, _ = settings_of(load_recipe("sft_simulator"), "sft-tinyworld-faithful.yaml")
    config = str(ROOT / "recipes/configs/fidelity-tinyworld.yaml")
    measured, options = parse(fidelity.RecipeArguments, fidelity.FidelityOptions, argv=["--config", config])
    assert arguments.leave_out_held_out and arguments.held_out == measured.queries != arguments.searches
    assert arguments.fidelity_queries == options.num_queries == 600
