"""What users import from `zerosearch` itself, and what importing it costs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import zerosearch


def test_every_public_name_is_there() -> None:
    for name in zerosearch.__all__:
        assert getattr(zerosearch, name) is not None
    with pytest.raises(AttributeError, match="module 'zerosearch' has no attribute 'SearchTrainr'; it has "):
        zerosearch.SearchTrainr  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, zerosearch; print(sorted({'torch', 'trl', 'vllm', 'numpy', 'aiohttp'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize(("asked", "reports"), [(None, False), ("1", False), ("0", True)])
@pytest.mark.parametrize("first", ["zerosearch", "huggingface_hub.constants"])  # as an import before ours does
def test_nothing_is_reported_to_makers_of_libraries_unless_asked_for(
    first: str, asked: str | None, reports: bool
) -> None:
    code = f"import {first}, zerosearch, os, huggingface_hub.constants as hub;"
    code += "print(not hub.HF_HUB_DISABLE_TELEMETRY, os.environ['DO_NOT_TRACK'] != '1')"  # TRL's switch, and vLLM's
    others = {name: value for name, value in os.environ.items() if name not in ("DO_NOT_TRACK", "HF_HUB_OFFLINE")}
    environment = others | ({} if asked is None else {"DO_NOT_TRACK": asked})
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == f"{reports} {reports}\n", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["grpo", "sft_policy", "sft_simulator"])
def test_no_library_speaks_before_a_recipe_does(recipe: str) -> None:
    command = [sys.executable, f"{Path(__file__).parent.parent}/recipes/{recipe}.py", "--help"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stderr == ""
