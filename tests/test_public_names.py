"""What users import from `zerosearch` itself, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

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
