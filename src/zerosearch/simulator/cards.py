"""The Hugging Face Hub: folders pushed as they are, with cards that say how their content was made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from zerosearch.errors import UserError
from zerosearch.simulator.dataset import statistics_table

PAPER = "[ZeroSearch](https://arxiv.org/abs/2505.04588)"
NOT_PUSHED = (".lock", "*.part", "checkpoint-*/**", "training_args.bin", "logs/**")


def create_repository(repo_id: str, kind: Literal["model", "dataset"], private: bool | None = None) -> str:
    """Create a repository on the Hub, unless it is there, and return its whole id; do it before what takes long.

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


def card(header: Mapping[str, Any], title: str, *parts: str) -> str:
    """Return a card: the Hub's YAML header, a title and paragraphs; empty ones are left out."""
    import yaml

    front = yaml.safe_dump(dict(header), sort_keys=False, allow_unicode=True).strip()
    return "\n\n".join((f"---\n{front}\n---", f"# {title}", *filter(None, parts))) + "\n"


def dataset_card(title: str, statistics: Mapping[str, Any], about: Mapping[str, Any], example: str) -> str:
    """Describe a dataset of simulator examples. `about` is what it was made with, `example` one of it as text."""
    judge = statistics["judge"]
    labelled = (
        "by a rule: a golden answer of the question occurs in it. That is not the paper's criterion, but is free"
        if judge == "rule"
        else f"by `{judge}`, asked whether it alone suffices to answer the query (Section 3.3 of the paper)"
    )
    found = statistics["documents"]
    splits = [
        split
        for split in ("train", "test")
        if any(statistics["sets"][split][name]["sets"] for name in ("useful", "noisy"))
    ]
    header = {
        "task_categories": ["text-generation"],
        "tags": ["zerosearch", "search-simulator"],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"{split}.jsonl"} for split in splits],
            }
        ],
    }
    return card(
        header,
        title,
        f"What a language model learns to play a search engine from (Search Simulation Tuning, {PAPER}): prompts that "
        "ask for useful or noisy documents for a query, and real documents of that kind.",
        f"Made from {statistics['searches']:,} real searches for {statistics['questions']:,} questions. Each of their "
        f"documents was labelled {labelled}: {found['useful']:,} are useful, {found['noisy']:,} noisy; "
        f"{found['no_verdict']:,} have no verdict and are left out. A row is a set of documents of one query with one "
        "label, cut to about 30 words each. No question is in two splits.",
        statistics_table(statistics),
        "`prompt` and `completion` are chat messages; `question`, `golden_answers`, `query`, `documents`, `useful` "
        'and `judge` say what they were made of. "With an answer": the share of sets in which a golden answer occurs.',
        f"A row:\n\n```text\n{example}\n```",
        f"Made with:\n\n```json\n{json.dumps(dict(about), indent=2, ensure_ascii=False)}\n```",
    )


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
    header: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["zerosearch", "search-simulator", "trl", "sft"],
    }
    if base_model is not None:
        header["base_model"] = base_model
    commands = "\n".join(serve)
    return card(
        header,
        title,
        f"A language model that plays a search engine, for training policies as {PAPER} does: asked in the words of "
        "the prompt below, it writes documents for a query, useful or noisy on demand.",
        f"```bash\n{commands}\n```" if commands else "",
        f"```text\n{prompt.strip()}\n```",
        f"## Fidelity\n\n{fidelity}" if fidelity else "Its fidelity has not been measured.",
        f"## Training\n\n```json\n{json.dumps(dict(about), indent=2, ensure_ascii=False)}\n```",
    )
