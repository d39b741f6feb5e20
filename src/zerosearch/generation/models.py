"""Loading what a model needs, with one clear sentence where there is no such model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zerosearch.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(
    model: str | None, revision: str = "main", trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, a folder or a Hub id, padding on the left.

    Raises `UserError` if no model is named or there is none of that name.
    """
    from transformers import AutoConfig, AutoTokenizer

    if model is None:
        raise UserError("name the model: --model_name_or_path")
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        AutoConfig.from_pretrained(model, **options)
        return AutoTokenizer.from_pretrained(model, padding_side="left", **options)
    except (OSError, ValueError) as error:
        raise UserError(f"there is no model {model!r}: {str(error).splitlines()[0]}") from error
