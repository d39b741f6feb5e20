"""The Hugging Face Hub: folders pushed as they are, with cards that say how their content was made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import DatasetCard, DatasetCardData, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from zerosearch.errors import UserError
from zerosearch.files import LOCK, write_text
from zerosearch.generation.loading import base_of_adapter
from zerosearch.prompts import SimulatorTemplate
from zerosearch.simulator.dataset import SPLITS, statistics_table

NOT_PUSHED = (LOCK, "*.draft", "checkpoint-*/**", "training_args.bin", "logs/**")
TEMPLATES = Path(__file__).parent  # in jinja2's language, filled in by the Hub's classes


def create_repository(repo_id: str, kind: Literal["model", "dataset"], private: bool | None = None) -> str:
    """Create a repository on the Hub, unless it exists, and return its whole id; do it before what takes long.

    The token is that of `hf auth login` or HF_TOKEN. Raises `UserError` for a wrong name, no token or no permission.
    """
    try:
        return HfApi().create_repo(repo_id, repo_type=kind, private=private, exist_ok=True).repo_id
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        raise UserError(f"the {kind} {repo_id!r} cannot be made on the Hub: {error}") from error


def push_folder(folder: Path, repo_id: str, kind: Literal["model", "dataset"], message: str) -> str:
    """Upload a folder, its card included, in one commit, and return its address. Raises `UserError`."""
    try:
        commit = HfApi().upload_folder(
            repo_id=repo_id,
            repo_type=kind,
            folder_path=folder,
            commit_message=message,
            ignore_patterns=list(NOT_PUSHED),
        )
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"{folder} is complete, but could not be pushed to {repo_id!r}: {error}") from error
    return str(commit.repo_url)


def write_dataset_card(
    folder: Path, found: Mapping[str, Any], about: Mapping[str, Any], example: str, repository: str | None
) -> None:
    """Describe a dataset of document sets in README.md.

    `found` is its `statistics`, `about` what it was made with, `example` as text what is learnt from one row.
    """
    files = [{"split": split, "path": f"{split}.jsonl"} for split in SPLITS if found["sets"][split]["questions"]]
    header = DatasetCardData(
        task_categories=["text-generation"],
        tags=["zerosearch", "search-simulator"],
        configs=[{"config_name": "default", "data_files": files}],
    )
    card = DatasetCard.from_template(
        header,
        template_path=str(TEMPLATES / "dataset_card.md"),
        title=_title(folder, repository),
        found=found,
        table=statistics_table(found),
        example=example,
        about=about,
        made_with=_json(about),
    )
    write_text(folder / "README.md", f"{card}\n")


def write_simulator_card(
    folder: Path, made: Mapping[str, Any], template: SimulatorTemplate, repository: str | None, fidelity: str = ""
) -> str:
    """Describe a simulator in README.md, and return the command that serves it: from the Hub if it goes there.

    `made` says how it was made, `base_model` included; `fidelity` is its measurement as Markdown.
    """
    is_adapter = base_of_adapter(str(folder)) is not None
    serve = [f"python recipes/serve_simulator.py --model {repository or folder}"]
    if repository and is_adapter:  # vLLM serves an adapter from a folder
        serve = [
            f"hf download {repository} --local-dir {folder.name}",
            f"python recipes/serve_simulator.py --model {folder.name}",
        ]
    header = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["zerosearch", "search-simulator", "trl", "sft"],
        base_model=None if Path(made["base_model"]).exists() else made["base_model"],
    )
    card = ModelCard.from_template(
        header,
        template_path=str(TEMPLATES / "simulator_card.md"),
        title=_title(folder, repository),
        prompt=template if isinstance(template, str) else template.useful,
        fidelity=fidelity,
        serve=serve,
        made_with=_json(made),
    )
    write_text(folder / "README.md", f"{card}\n")
    return serve[-1]


def _title(folder: Path, repository: str | None) -> str:
    return (repository or folder.resolve().name).split("/")[-1]


def _json(about: Mapping[str, Any]) -> str:
    return json.dumps(dict(about), indent=2, ensure_ascii=False)
