"""The cards of simulators and of the document sets that they learn from: README.md of a folder and on the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData

from zerosearch.generation.loading import base_of_adapter
from zerosearch.hub import tuned_model, write_card
from zerosearch.prompts import SimulatorTemplate
from zerosearch.simulator.dataset import SPLITS, statistics_table

TEMPLATES = Path(__file__).parent


def write_dataset_card(
    folder: Path, found: Mapping[str, Any], about: Mapping[str, Any], example: str, repository: str | None
) -> None:
    """Describe a dataset of document sets.

    `found` is its `statistics`, `about` what it was made with, `example` as text what is learnt from one row.
    """
    files = [{"split": split, "path": f"{split}.jsonl"} for split in SPLITS if found["sets"][split]["questions"]]
    header = DatasetCardData(
        task_categories=["text-generation"],
        tags=["zerosearch", "search-simulator"],
        configs=[{"config_name": "default", "data_files": files}],
    )
    words = {"found": found, "table": statistics_table(found), "example": example, "about": about}
    write_card(folder, TEMPLATES / "dataset_card.md", header, about, repository, **words)


def write_simulator_card(
    folder: Path, made: Mapping[str, Any], template: SimulatorTemplate, repository: str | None, fidelity: str = ""
) -> str:
    """Describe a simulator, and return the command that serves it: from the Hub if it goes there.

    `made` says how it was made, `base_model` included; `fidelity` is its measurement as Markdown.
    """
    serve = [f"python recipes/serve_simulator.py --model {repository or folder}"]
    if repository and base_of_adapter(str(folder)) is not None:  # vLLM serves an adapter from a folder
        serve = [
            f"hf download {repository} --local-dir {folder.name}",
            f"python recipes/serve_simulator.py --model {folder.name}",
        ]
    header = tuned_model(folder, made["base_model"], ["search-simulator"])
    prompt = template if isinstance(template, str) else template.useful
    words = {"prompt": prompt, "fidelity": fidelity, "serve": serve}
    write_card(folder, TEMPLATES / "simulator_card.md", header, made, repository, **words)
    return serve[-1]
