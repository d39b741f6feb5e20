"""The Hugging Face Hub: folders pushed as they are, with cards that say how their content was made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from zerosearch.errors import UserError
from zerosearch.simulator.dataset import SPLITS, statistics_table

NOT_PUSHED = (".lock", "*.draft", "checkpoint-*/**", "training_args.bin", "logs/**")


def create_repository(repo_id: str, kind: Literal["model", "dataset"], private: bool | None = None) -> str:
    """Create a repository on the Hub, unless it exists, and return its whole id; do it before what takes long.

    The token is that of `hf auth login` or HF_TOKEN. Raises `UserError` for a wrong name, no token or no permission.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        return HfApi().create_repo(repo_id, repo_type=kind, private=private, exist_ok=True).repo_id
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        raise UserError(f"the {kind} {repo_id!r} cannot be made on the Hub: {error}") from error


def push_folder(folder: Path, repo_id: str, kind: Literal["model", "dataset"], message: str) -> str:
    """Upload a folder, its card included, in one commit, and return its address. Raises `UserError`."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

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


def dataset_card(title: str, found: Mapping[str, Any], about: Mapping[str, Any], example: str) -> str:
    """Describe a dataset of document sets.

    `found` is its `statistics`, `about` what it was made with, `example` as text what is learnt from one row.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    splits = [split for split in SPLITS if found["sets"][split]["questions"]]
    header = DatasetCardData(
        task_categories=["text-generation"],
        tags=["zerosearch", "search-simulator"],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"{split}.jsonl"} for split in splits],
            }
        ],
    )
    parts: dict[str, Any] = {
        "title": title,
        "found": found,
        "table": statistics_table(found),
        "example": example,
        "about": about,
    }
    parts["made_with"] = _json(about)
    return str(DatasetCard.from_template(header, template_path=_template("dataset"), **parts)) + "\n"


def simulator_card(
    title: str,
    base_model: str | None,
    prompt: str,
    about: Mapping[str, Any],
    fidelity: str = "",
    serve: Sequence[str] = (),
    adapter: bool = False,
) -> str:
    """Describe a simulator.

    `prompt` is the template it was tuned with, `about` what else it was made with, `fidelity` its measurement as
    Markdown, `serve` the commands that serve it.
    """
    from huggingface_hub import ModelCard, ModelCardData

    header = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["zerosearch", "search-simulator", "trl", "sft"],
        base_model=base_model,
    )
    parts: dict[str, Any] = {"title": title, "prompt": prompt, "fidelity": fidelity, "serve": serve}
    parts["made_with"] = _json(about)
    return str(ModelCard.from_template(header, template_path=_template("simulator"), **parts)) + "\n"


def _template(kind: str) -> str:
    """Return the path of a card's template, in jinja2's language; the Hub's classes fill it in."""
    return str(Path(__file__).with_name(f"{kind}_card.md"))


def _json(about: Mapping[str, Any]) -> str:
    return json.dumps(dict(about), indent=2, ensure_ascii=False)
