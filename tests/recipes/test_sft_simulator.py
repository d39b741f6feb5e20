"""The SFT recipe run as a user would: every weight, LoRA and QLoRA; what it saves is served by vLLM."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from hub_stub import HubStub
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from zerosearch.command_line import parse
from zerosearch.engines import SearchRequest
from zerosearch.engines.simulated import SimulatedEngine
from zerosearch.files import sole_writer
from zerosearch.generation.loading import adapter_config_file
from zerosearch.prompts import TINYWORLD_SIMULATOR_PROMPT, simulator_messages
from zerosearch.protocol import split_documents
from zerosearch.simulator import tuning
from zerosearch.simulator.server import SimulatorServer, simulator_server

pytest_plugins = ("recipe_modules", "hub_stub")  # fixtures

ROOT = Path(__file__).parents[2]
BASE = ROOT / "data/tinyworld/simulator"
LoadRecipe = Callable[[str], ModuleType]

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
    path = tmp_path_factory.mktemp("searches") / "searches.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in SEARCHES))
    return path


def arguments(searches: Path, output_dir: Path, /, **changes: Any) -> list[str]:
    settings = {
        **{"model_name_or_path": BASE, "searches": searches, "output_dir": output_dir, "prompt": "tinyworld"},
        **{"max_steps": 3, "learning_rate": 1e-2, "gradient_checkpointing": False, "logging_steps": 1, "seed": 0},
        **{"lora_target_modules": "all-linear", "measure_fidelity": False},
        **changes,
    }
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


@pytest.fixture(scope="module")
def tuned(
    load_recipe: LoadRecipe, searches: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Path]]:
    """Return the folder of a run of each kind; that of LoRA held a whole model before."""
    root = tmp_path_factory.mktemp("tuned")
    recipe = load_recipe("sft_simulator")
    # The second of its epochs ends after step 6.
    recipe.main(arguments(searches, root / "full", max_steps=5, save_strategy="steps", save_steps=1))
    shutil.copytree(root / "full", root / "lora")
    (root / "lora/fidelity.json").write_text("{}")
    (root / "lora/checkpoint-notes.txt").write_text("mine")
    recipe.main(arguments(searches, root / "lora", tuning="lora", overwrite_output_dir=True))
    recipe.main(arguments(searches, root / "qlora", tuning="qlora"))
    recipe.main(arguments(searches, root / "merged", tuning="qlora", merge=True))
    yield {name: root / name for name in ("full", "lora", "qlora", "merged")}
    shutil.rmtree(root)


@pytest.mark.slow
def test_full_tuning_saves_a_model_that_has_learned(tuned: dict[str, Path]) -> None:
    before, after = weights(BASE), weights(tuned["full"])
    assert before.keys() == after.keys()
    assert not torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    made = json.loads((tuned["full"] / "simulator.json").read_text())
    assert (made["tuning"], made["steps"], made["examples"], made["prompt"]) == ("full", 5, 6, "tinyworld")
    assert made["last_loss"] > 0 and made["batch_size"] == 2


@pytest.mark.slow
def test_a_killed_tuning_resumes_as_if_it_had_not_been(
    load_recipe: LoadRecipe, searches: Path, tuned: dict[str, Path], tmp_path: Path
) -> None:
    flags = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "resume_from_checkpoint": True}
    expected = weights(tuned["full"])
    made = json.loads((tuned["full"] / "simulator.json").read_text())
    # Not killed at all; before the model was saved; while the last checkpoint was written; in the second epoch.
    for name, last, cut in (("finished", 5, 6), ("unsaved", 5, 6), ("half", 5, 5), ("epoch", 4, 5)):
        folder = tmp_path / name
        shutil.copytree(tuned["full"], folder)
        for step in range(last + 1, 6):
            shutil.rmtree(folder / f"checkpoint-{step}")
        if cut == last:
            os.truncate(folder / f"checkpoint-{cut}/trainer_state.json", 300)
        if name != "finished":
            (folder / "model.safetensors").unlink()
            (folder / "simulator.json").unlink()
        load_recipe("sft_simulator").main(arguments(searches, folder, **flags))
        assert json.loads((folder / "simulator.json").read_text()) == made, name
        resumed = weights(folder)
        assert all(torch.equal(resumed[part], expected[part]) for part in expected), name


@pytest.mark.slow
def test_a_killed_tuning_of_an_adapter_draws_the_same_dropout(
    load_recipe: LoadRecipe, searches: Path, tmp_path: Path
) -> None:
    recipe, folder = load_recipe("sft_simulator"), tmp_path / "out"
    flags = {"tuning": "lora", "max_steps": 5, "save_strategy": "steps", "save_steps": 1}
    recipe.main(arguments(searches, folder, **flags))
    expected = load_file(folder / "adapter_model.safetensors")
    shutil.rmtree(folder / "checkpoint-5")
    recipe.main(arguments(searches, folder, **flags, resume_from_checkpoint=True))
    resumed = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(resumed[part], expected[part]) for part in expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_an_adapter_is_saved_alone_over_an_untouched_base(tuned: dict[str, Path], name: str) -> None:
    folder = tuned[name]
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "model.safetensors").exists()
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(BASE) and settings["r"] == 16
    assert {"q_proj", "down_proj"} <= set(settings["target_modules"])
    card = (folder / "README.md").read_text()
    assert f"python recipes/serve_simulator.py --model {folder}\n" in card and "has not been measured" in card
    assert adapter_config_file(str(folder)) is not None
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "peft" and "search-simulator" in header["tags"]


@pytest.mark.slow
def test_overwriting_clears_what_the_recipe_makes_and_nothing_else(tuned: dict[str, Path]) -> None:
    names = {path.name for path in tuned["lora"].iterdir()}
    assert "checkpoint-notes.txt" in names
    assert not names & {"checkpoint-1", "checkpoint-5", "fidelity.json", "config.json", "generation_config.json"}


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
def test_only_the_documents_are_learned(
    load_recipe: LoadRecipe, searches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    class Watched(tuning.Tuner):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append({name: value.clone() for name, value in inputs.items()})
            return super().compute_loss(model, inputs, *args, **kwargs)

    monkeypatch.setattr(tuning, "Tuner", Watched)
    load_recipe("sft_simulator").main(arguments(searches, tmp_path / "out"))
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    texts = {
        tokenizer.decode(labels[labels != -100], skip_special_tokens=True).strip()
        for inputs in seen
        for labels in inputs["labels"]
    }
    expected = {f"Doc 1: {row['documents'][0]}" for row in SEARCHES}
    assert len(seen) == 3 and texts and texts <= expected
    ids = seen[0]["input_ids"][0]
    assert "Write five" in tokenizer.decode(ids)


@pytest.fixture(scope="module")
def server(tuned: dict[str, Path]) -> Iterator[SimulatorServer]:
    """Serve the base with both adapters as they are; one of them under the name that the recipe asks for."""
    pytest.importorskip("vllm")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    adapters = {"lora": str(tuned["lora"])}
    options: dict[str, Any] = {"max_model_len": 1024, "dtype": "float32", "num_threads": 1, "adapters": adapters}
    with simulator_server(str(tuned["qlora"]), port, **options) as running:
        yield running


REQUEST = SearchRequest("Anna Vance hails from", "Where does Anna Vance hail from?", ("Port Alder",), key=(0,))


def search(base_url: str, model: str) -> tuple[str, ...]:
    engine = SimulatedEngine(base_url, model, TINYWORLD_SIMULATOR_PROMPT, temperature=0.0, max_tokens=60)

    async def one() -> tuple[str, ...]:
        try:
            return (await engine.search(REQUEST)).documents
        finally:
            await engine.aclose()

    return asyncio.run(one())


@pytest.mark.slow
def test_adapters_are_served_as_they_are(tuned: dict[str, Path], server: SimulatorServer) -> None:
    from peft import PeftModel

    replies = {name: search(server.base_url, name) for name in (str(BASE), "lora", "simulator")}
    assert len(set(replies.values())) == 3  # each adapter speaks for itself
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    messages = simulator_messages(
        question=REQUEST.question,
        golden_answers=REQUEST.golden_answers,
        query=REQUEST.query,
        noisy=False,
        template=TINYWORLD_SIMULATOR_PROMPT,
    )
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = PeftModel.from_pretrained(base, tuned["lora"])
    written = model.generate(**inputs, max_new_tokens=60, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert replies["lora"] == split_documents(tokenizer.decode(written, skip_special_tokens=True), 5)


@pytest.mark.slow
def test_the_card_tells_the_fidelity_that_was_measured(
    load_recipe: LoadRecipe,
    searches: Path,
    tmp_path: Path,
    server: SimulatorServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = load_recipe("sft_simulator")
    served = []

    @contextmanager
    def already_there(model: str, port: int, **options: Any) -> Iterator[SimulatorServer]:
        served.append(model)
        yield server  # one vLLM for this file

    monkeypatch.setattr(tuning, "simulator_server", already_there)
    monkeypatch.setattr(recipe, "exit_on_signals", lambda: None)  # it would be pytest's signals
    folder = tmp_path / "out"
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(searches.read_text().splitlines(keepends=True)[:4]))  # two of the three queries
    changes = {"measure_fidelity": True, "held_out": held_out, "fidelity_queries": 3, "tuning": "lora"}
    recipe.main(arguments(searches, folder, leave_out_held_out=True, **changes))
    assert json.loads((folder / "simulator.json").read_text())["examples"] == 2
    assert served == [str(folder)]
    card = json.loads((folder / "fidelity.json").read_text())
    assert card["queries"] == 2 and card["rule"] == "statement" and 0 <= card["useful_answer_rate"] <= 1
    readme = (folder / "README.md").read_text()
    assert "## Fidelity\n\n2 held-out queries; 2 of them" in readme and "has not been measured" not in readme
    assert "2 held-out queries" in capsys.readouterr().out


@pytest.mark.slow
def test_the_folder_is_pushed_with_its_card(hub: str, searches: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    command = [sys.executable, str(ROOT / "recipes/sft_simulator.py")]
    command += arguments(searches, folder, max_steps=1, tuning="lora", push_to_hub=True, hub_model_id="someone/sim")
    command += ["--hub_token", "hf_MARKER", "--save_strategy", "steps", "--save_steps", "1"]
    environment = {"PATH": "/usr/bin", "PYTHONPATH": str(ROOT / "src"), "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert HubStub.paths[0] == "/api/repos/create"
    names = {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md", "simulator.json"}
    assert names <= HubStub.committed.keys() and "training_args.bin" not in HubStub.committed
    assert not any(b"hf_MARKER" in content for content in HubStub.committed.values())
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert folder / "checkpoint-1/training_args.bin" in files
    assert not any(b"hf_MARKER" in path.read_bytes() for path in files)
    assert HubStub.committed["README.md"] == (folder / "README.md").read_bytes()
    assert b"hf download someone/sim --local-dir out\npython recipes/serve" in HubStub.committed["README.md"]


def test_without_held_out_searches_it_says_so_before_it_starts(
    load_recipe: LoadRecipe, searches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("vllm")
    with pytest.raises(SystemExit):
        load_recipe("sft_simulator").main(arguments(searches, tmp_path / "out", measure_fidelity=True))
    assert "name some with --held_out, or pass --measure_fidelity false" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuning": "half"}, "half"),
        ({"merge": True}, "--merge is for --tuning lora or qlora"),
        ({"leave_out_held_out": True}, "--leave_out_held_out is for --measure_fidelity true"),
        ({"use_peft": True}, "say --tuning lora instead of --use_peft"),
        ({"searches": "none.jsonl"}, "there is no file none.jsonl"),
        ({"model_name_or_path": "/none"}, "there is no model '/none'"),
        ({"max_length": 20}, "examples do not fit into 20 tokens and would be cut"),
        ({"resume_from_checkpoint": True}, "there is no checkpoint to resume from"),
        (
            {"lora_target_modules": "q_poj", "tuning": "lora"},
            "Target modules q_poj not found",
        ),
        ({"attn_implementation": "flash_attention_2"}, "these settings do not work: "),
        ({"model_init_kwargs": '{"attn_implementation": "nothing_of_the_kind"}'}, "nothing_of_the_kind"),
        ({"eval_strategy": "steps"}, "these settings do not work: "),
        ({"report_to": "wandb"}, "these settings do not work: WandbCallback requires wandb"),
        ({"hub_revision": "v2"}, "--hub_revision has no effect"),
    ],
)
def test_a_mistake_gets_one_sentence(
    load_recipe: LoadRecipe,
    searches: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        load_recipe("sft_simulator").main(arguments(searches, tmp_path / "out", **changes))
    assert caught.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1 and message in errors[0]


def test_a_checkpoint_of_another_tuning_is_refused(
    searches: Path, tmp_path: Path, refusal: Callable[[str, list[str]], str]
) -> None:
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text("{}")
    flags = arguments(searches, tmp_path, tuning="lora", resume_from_checkpoint=True)
    assert f"{checkpoint} is of another tuning" in refusal("sft_simulator", flags)


def test_a_second_run_in_a_folder_is_refused(
    load_recipe: LoadRecipe, searches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with sole_writer(tmp_path / "out"), pytest.raises(SystemExit) as caught:
        load_recipe("sft_simulator").main(arguments(searches, tmp_path / "out", overwrite_output_dir=True))
    assert caught.value.code == 2
    assert "another run is writing to" in capsys.readouterr().err


def settings_of(recipe: ModuleType, config: str) -> Any:
    path = str(ROOT / "recipes/configs" / config)
    return parse(recipe.RecipeArguments, recipe.SimulatorConfig, recipe.ModelConfig, argv=["--config", path])


@pytest.mark.parametrize("size", ["3b", "7b", "14b"])
def test_the_configs_hold_the_authors_values(load_recipe: LoadRecipe, size: str) -> None:
    arguments, training, model = settings_of(load_recipe("sft_simulator"), f"sft-qwen2.5-{size}.yaml")
    assert (training.learning_rate, training.per_device_train_batch_size, training.max_steps) == (1e-6, 2, 1000)
    assert model.model_name_or_path == f"Qwen/Qwen2.5-{size.upper()}-Instruct"
    assert (arguments.prompt, arguments.tuning, training.completion_only_loss) == ("paper", "full", True)


def test_the_faithful_config_is_measured_on_queries_it_was_not_tuned_on(load_recipe: LoadRecipe) -> None:
    pytest.importorskip("vllm")
    fidelity = load_recipe("measure_fidelity")
    arguments, _, _ = settings_of(load_recipe("sft_simulator"), "sft-tinyworld-faithful.yaml")
    config = str(ROOT / "recipes/configs/fidelity-tinyworld.yaml")
    measured, options = parse(fidelity.RecipeArguments, fidelity.FidelityOptions, argv=["--config", config])
    assert arguments.leave_out_held_out and arguments.held_out == measured.queries != arguments.searches
    assert arguments.fidelity_queries == options.num_queries == 600
