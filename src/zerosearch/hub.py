"""The Hugging Face Hub: folders pushed as they are, with cards that say how their content was made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import CardData, HfApi, ModelCardData, RepoCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from zerosearch.errors import UserError
from zerosearch.files import LOCK, write_text
from zerosearch.generation.loading import base_of_adapter

NOT_PUSHED = (LOCK, "*.draft", "checkpoint-*/**", "training_args.bin", "logs/**")


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


def tuned_model(folder: Path, base_model: str, tags: Sequence[str] = ()) -> ModelCardData:
    """Return the header of the card of a model, or an adapter, that TRL's SFTTrainer tuned."""
    return ModelCardData(
        library_name="transformers" if base_of_adapter(str(folder)) is None else "peft",
        pipeline_tag="text-generation",
        tags=["zerosearch", *tags, "trl", "sft"],
        base_model=None if Path(base_model).exists() else base_model,
    )


def write_card(
    folder: Path,
    template: Path,
    header: CardData,
    made: Mapping[str, Any],
    repository: str | None,
    **words: Any,
) -> None:
    """Write README.md of a folder: a template in jinja2's language, filled in with `made`, a title and `words`."""
    card = RepoCard.from_template(
        header,
        template_path=str(template),
        title=(repository or folder.resolve().name).split("/")[-1],
        made_with=json.dumps(dict(made), indent=2, ensure_ascii=False),
        **words,
    )
    write_text(folder / "README.md", f"{card}\n")
