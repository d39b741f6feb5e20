"""Load models by name: tokenizer, weights with an adapter merged, generator; and say which model it was, exactly."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal
from zipfile import is_zipfile

from zerosearch.errors import UserError
from zerosearch.generation import Generator, RemoteGenerator
from zerosearch.generation.chat_endpoint import EndpointGenerator, EndpointOptions
from zerosearch.generation.vllm_workarounds import local_engine
from zerosearch.http import CLOSE_TIMEOUT_S, run_in_background

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
    from trl import ModelConfig

GeneratorKind = Literal["vllm", "transformers", "endpoint"]
LoadedModel = tuple[Generator | RemoteGenerator, dict[str, str]]  # what runs it; which model it is

SIZES = ("hidden_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "vocab_size")
FINGERPRINT_BYTES = 1 << 20  # of the start and the end of each file of weights


def adapter_config_file(model: str, revision: str = "main") -> Path | None:
    """Return the configuration file of an adapter, a folder or a Hub id; None for whole weights."""
    from transformers.utils.peft_utils import find_adapter_config_file

    if Path(model, "config.json").is_file():
        return None
    found = find_adapter_config_file(model, revision=revision)
    return None if found is None else Path(found)


def base_of_adapter(model: str, revision: str = "main") -> str | None:
    """Return the model that an adapter was trained on; None for whole weights.

    Raises `UserError` for an adapter that does not say, or has no rank.
    """
    if adapter_config_file(model, revision) is None:
        return None
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(model, revision=revision)
    _check_positive(config, ("r", "lora_alpha"), f"the adapter {model}")
    base = config.base_model_name_or_path
    if not base:
        raise UserError(f"the adapter {model} does not say which model it was trained on (base_model_name_or_path)")
    return str(base)


def model_config(model: str | None, revision: str = "main", trust_remote_code: bool = False) -> Any:
    """Return the configuration of a model; an adapter has that of its base.

    Raises `UserError` if no model is named, there is none of that name, or its weights in a folder are broken.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if model is None:
        raise UserError("name the model: --model_name_or_path")
    try:
        base = base_of_adapter(model, revision)
        options = {"revision": "main" if base else revision, "trust_remote_code": trust_remote_code}
        config = AutoConfig.from_pretrained(base or model, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"there is no model {model!r}: {str(error).splitlines()[0]}") from error
    except (TypeError, LookupError, StrictDataclassError) as error:
        raise UserError(f"the configuration of {model} cannot be read: {type(error).__name__} {error}") from error
    _check_positive(config.get_text_config(), SIZES, f"the configuration of {model}")
    check_weights(model)
    return config


def _check_positive(config: Any, names: Sequence[str], whose: str) -> None:
    """Raise `UserError` where one of these is there, and no number above 0: not every library checks what it reads."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None and not (isinstance(value, int | float) and value > 0):
            raise UserError(f"{whose} gives {name} as {value!r}: it must be a number above 0")


def check_weights(model: str) -> None:
    """Raise `UserError` for a file of weights in a model's folder that is cut short or something else."""
    from safetensors import SafetensorError, safe_open

    for path in Path(model).glob("*.safetensors"):  # none where `model` is a Hub id
        try:
            with safe_open(path, framework="np"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(f"the weights {path} cannot be read: {error}") from error


def check_checkpoint(checkpoint: str | None, is_adapter: bool) -> None:
    """Raise `UserError` for a checkpoint that a training cannot go on from: of the other kind, or cut short.

    Weights that DeepSpeed or FSDP keeps in a folder of its own are not looked into.
    """
    if checkpoint is None:
        return
    folder = Path(checkpoint)
    if (folder / "adapter_config.json").is_file() != is_adapter:
        raise UserError(f"{checkpoint} is of another tuning, full or LoRA: resume with that, or start anew")
    if not any(any(folder.glob(kind)) for kind in ("*.safetensors", "global_step*", "pytorch_model*")):
        raise UserError(f"the checkpoint {checkpoint} holds no weights")
    check_weights(checkpoint)
    for path in [*folder.glob("*.pt"), *folder.glob("*.pth")]:
        if not is_zipfile(path):  # as PyTorch writes
            raise UserError(f"the checkpoint's {path} is cut short")


def longest_context(config: Any, limit: int) -> int:
    """Return `limit`, or the longest context that a model of this configuration takes, if that is shorter.

    Models without learned or rotary positions (such as Bloom) name none.
    """
    return min(limit, getattr(config.get_text_config(), "max_position_embeddings", None) or limit)


def load_tokenizer(
    model: str | None, revision: str = "main", trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, a folder or a Hub id, padding on the left. An adapter may leave it to its base.

    Raises `UserError` if no model is named, there is none of that name, or a question cannot be asked with it.
    """
    from transformers import AutoTokenizer

    config = model_config(model, revision, trust_remote_code)
    options = {"config": config, "trust_remote_code": trust_remote_code, "padding_side": "left"}
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, **options)
    except (OSError, ValueError) as error:
        base = base_of_adapter(str(model), revision)
        if base is None:
            raise UserError(f"there is no tokenizer of {model!r}: {str(error).splitlines()[0]}") from error
        return load_tokenizer(base, trust_remote_code=trust_remote_code)
    check_tokenizer(tokenizer, str(model))
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: str) -> None:
    """Raise `UserError` for a tokenizer that names no end of sequence, or whose chat template loses a question."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {model} names no end of sequence (eos_token)")
    if tokenizer.chat_template is None:
        return
    question = "Who wrote Emma?"
    try:
        written = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False)
    except Exception as error:  # a template is a program: it may raise anything
        raise UserError(f"the chat template of {model} fails: {type(error).__name__} {error}") from error
    if question not in written:
        raise UserError(f"the chat template of {model} leaves out what the user says")


def load_model(model: str, revision: str = "main", trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a causal language model; an adapter comes merged into its base. Raises `UserError` for missing weights."""
    from transformers import AutoModelForCausalLM

    base = base_of_adapter(model, revision)
    options = {"trust_remote_code": trust_remote_code, "dtype": "auto"}
    try:
        if base is None:
            return AutoModelForCausalLM.from_pretrained(model, revision=revision, **options)
        from peft import PeftModel

        loaded = AutoModelForCausalLM.from_pretrained(base, **options)
        return PeftModel.from_pretrained(loaded, model, revision=revision).merge_and_unload()
    except (OSError, ValueError) as error:
        raise UserError(f"the weights of {model!r} cannot be loaded: {error}") from error


def whole_model(model: str, folder: Path, revision: str = "main", trust_remote_code: bool = False) -> str:
    """Return the name of a model whose weights are whole: `model`, or an adapter merged into a subfolder of `folder`.

    vLLM and TRL need such weights. The subfolder is named by the adapter's weights, and used again if it is there.
    """
    if base_of_adapter(model, revision) is None:
        return model
    _, version = model_identity(model, revision).values()
    merged = folder / f"merged-{version[:12]}"
    if not merged.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder) as unfinished, unsharded_loading():
            load_model(model, revision, trust_remote_code).save_pretrained(f"{unfinished}/model")
            load_tokenizer(model, revision, trust_remote_code).save_pretrained(f"{unfinished}/model")
            Path(unfinished, "model").rename(merged)
    return str(merged)


@contextmanager
def unsharded_loading() -> Iterator[None]:
    """Load models whole in this process, also under ZeRO-3, where transformers would load a share of their weights."""
    from transformers.integrations import deepspeed

    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config


@contextmanager
def open_generator(
    model: str, kind: GeneratorKind, endpoint: EndpointOptions, max_context_tokens: int
) -> Iterator[LoadedModel]:
    """Yield what runs a model to answer questions, and which model it is; close its connections at the end.

    Raises `UserError` for a model or an endpoint that cannot work.
    """
    if kind != "endpoint":
        yield load_generator(model, kind, max_context_tokens), model_identity(model)
        return
    generator = EndpointGenerator(endpoint, model)
    try:
        yield generator, {"model": model, "endpoint": generator.address}
    finally:
        run_in_background(generator.aclose(), CLOSE_TIMEOUT_S)


def load_generator(model: str, kind: Literal["vllm", "transformers"], max_context_tokens: int) -> Generator:
    """Load a policy, a folder or a Hub id, to answer questions with; in the number format of its weights.

    A trajectory may take `max_context_tokens`, prompt included, or less if the model takes less.
    Raises `UserError` if there is no such model, or vLLM is asked for and not installed.
    """
    if kind == "vllm" and find_spec("vllm") is None:
        raise UserError("vLLM is not installed; install it (see the README), or pass --generator transformers")
    config = model_config(model)
    max_context_tokens = longest_context(config, max_context_tokens)
    tokenizer = load_tokenizer(model)
    if kind == "vllm":
        dtype = str(config.dtype or "auto").removeprefix("torch.")
        return _vllm_generator(model, tokenizer, max_context_tokens, dtype)
    import torch

    from zerosearch.generation.transformers_engine import TransformersGenerator

    loaded = load_model(model).to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    ends = end_token_ids(loaded.generation_config, tokenizer)
    return TransformersGenerator(lambda: nullcontext(loaded), tokenizer, ends, max_context_tokens)


def end_token_ids(generation_config: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end a sequence: the tokenizer's and the generation config's, as in vLLM and TRL."""
    ends = generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends or []
    return sorted({*ends, tokenizer.eos_token_id})


def _vllm_generator(model: str, tokenizer: PreTrainedTokenizerBase, max_context_tokens: int, dtype: str) -> Generator:
    """Start a vLLM engine in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this very process; read when it is made
    import torch
    from vllm import LLM

    from zerosearch.generation.vllm_colocated import VLLMGenerator

    with TemporaryDirectory() as folder:
        # The rollout's settings alone decide how to sample, not a file of the model's.
        options: dict[str, Any] = {"model": whole_model(model, Path(folder)), "generation_config": "vllm"}
        if torch.cuda.is_available():  # by itself vLLM wants nine tenths of all, also beside a simulator
            free, there = torch.cuda.mem_get_info()
            options["gpu_memory_utilization"] = 0.9 * free / there
        llm = local_engine(LLM, dtype, max_context_tokens, **options)
    return VLLMGenerator(llm, tokenizer)


def model_identity(model: str, revision: str = "main") -> dict[str, str]:
    """Return which model this is, exactly: a commit of the Hub, or a fingerprint of a folder's weights.

    The fingerprint is the SHA-256 of each weight file's name, size, first and last mebibyte: reading all of 30 GB
    would take longer than many an evaluation.
    """
    folder = Path(model)
    if not folder.is_dir():
        adapter = adapter_config_file(model, revision)  # in the Hub's cache, in a folder named by the commit
        commit = adapter.parent.name if adapter else getattr(model_config(model, revision), "_commit_hash", None)
        return {"model": model, "revision": commit or "unknown"}
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        if path.name == "training_args.bin":
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(FINGERPRINT_BYTES))
            file.seek(max(size - FINGERPRINT_BYTES, 0))
            digest.update(file.read())
    return {"model": model, "weights_fingerprint": digest.hexdigest()[:32]}


def start_weights(model: ModelConfig, training: TrainingArguments) -> str:
    """Return the name of the whole weights that a training starts from; an adapter is merged into its base, once."""
    folder, trust_remote_code = Path(str(training.output_dir)), getattr(training, "trust_remote_code", False)
    with training.main_process_first(local=False):
        return whole_model(str(model.model_name_or_path), folder, model.model_revision, trust_remote_code)


def model_options(model: ModelConfig, training: Any) -> dict[str, Any]:
    """Return the keyword arguments of `from_pretrained` for TRL's trainers, which by themselves use none of `model`'s.

    `training.model_init_kwargs` wins.
    """
    options = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    return {name: value for name, value in options.items() if value is not None} | (training.model_init_kwargs or {})


def fit_to_cpu(config: TrainingArguments) -> None:
    """Set what a machine without an accelerator needs, so that no user has to know it; elsewhere change nothing.

    Call it before TrainingArguments' own `__post_init__`, which picks the device. Raises `UserError` for 16 bits with
    DeepSpeed, which trains in 32 there.
    """
    import torch

    if torch.accelerator.is_available():
        return
    if config.bf16 is None:  # TRL would take it for wanted
        config.bf16 = False
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        if config.bf16:  # TRL would advise use_cpu
            raise UserError("bf16 true with DeepSpeed needs an accelerator; on a CPU, bf16 false trains in 32 bits")
        config.ddp_backend = "gloo"  # without it accelerate sees one process; with use_cpu it drops DeepSpeed
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    else:
        config.use_cpu = True
