"""Small tokenizers in the manner of today's families, with the chat templates of the real ones, which TRL carries."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import trl
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.integrations.mistral import convert_tekken_tokenizer

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
SAMPLE = [
    "<think>\nWho wrote Emma?\n</think>\n<search> Emma author </search>\n\n<information>Doc 1: Emma is a novel by "
    "Jane Austen.\nDoc 2: It rains.</information>\n\n<think> It is she.</think>\n<answer> Jane Austen </answer>\n"
] * 3 + ['<tool_call>\n{"name": "search", "arguments": {"query": "Emma"}}\n</tool_call>'] * 3
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"  # as GPT-4, Llama 3 and Qwen cut a text
GPT4 = WORDS + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3 = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<|eom_id|>", "<|python_tag|>"),
)
# The instruct models of Mistral, to version 0.2; TRL has no template of theirs.
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ ' [INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Family:
    """What tells the tokenizer of a family from others, and its row in recipes/README.md."""

    title: str
    template: str
    special: tuple[str, ...]
    eos: str
    bos: str | None = None
    added: tuple[str, ...] = ()  # added tokens that are not special
    has_pieces: bool = False  # of SentencePiece, with a space put in front
    model_type: str = "llama"
    caller: str | None = None  # the agent whose calls the template writes
    thinks: str = "-"
    has_windows: bool = False  # attention that transformers' generation here refuses

    @property
    def agents(self) -> list[str]:
        """Return the agents that a step is trained with."""
        return [] if self.has_windows else ["policy", self.caller] if self.caller else ["policy"]

    @property
    def row(self) -> str:
        template = f"`{self.template.removesuffix('.jinja')}`" if self.template else "written in the test"
        caller, steps = (f"`{self.caller}`", "tags, calls") if self.caller else ("refused", "tags")
        steps = "needs vLLM, not tried" if self.has_windows else steps
        eos, exact = self.eos.replace("|", r"\|"), "yes, SentencePiece" if self.has_pieces else "yes"
        return f"| {self.title} | {template} | {self.thinks} | {caller} | `{eos}` | {exact} | {steps} |"


QWEN3_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
QWEN25_ADDED = (*QWEN3_TAGS[:2], "<|fim_prefix|>", "    ")  # some tokenizers have runs of spaces
GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
PHI3 = ("<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")


def qwen(title: str, template: str, added: tuple[str, ...] = QWEN3_TAGS, **more: Any) -> Family:
    return Family(title, template, CHATML, "<|im_end|>", added=added, **({"model_type": "qwen3"} | more))


def llama(title: str, template: str, caller: str | None = "bare-tools") -> Family:
    return Family(title, template, LLAMA3, "<|eot_id|>", "<|begin_of_text|>", caller=caller)


def gemma(title: str, template: str, **more: Any) -> Family:
    return Family(title, template, GEMMA, "<end_of_turn>", "<bos>", **more)


FAMILIES = {
    "qwen2.5": qwen("Qwen2.5", "qwen2_5.jinja", QWEN25_ADDED, model_type="qwen2", caller="tools"),
    "qwen3": qwen("Qwen3", "qwen3.jinja", caller="tools", thinks="on, off"),
    "qwen3-2507": qwen("Qwen3 Instruct 2507", "qwen3_instruct_2507.jinja", caller="tools"),
    "qwen3.5": qwen("Qwen3.5", "qwen3_5_think.jinja", thinks="on"),
    "llama3": llama("Llama 3", "llama3.jinja", None),
    "llama3.1": llama("Llama 3.1", "llama3_1.jinja"),
    "llama3.2": llama("Llama 3.2", "llama3_2.jinja"),
    "gemma": gemma("Gemma", "gemma.jinja", model_type="gemma"),
    "gemma3": gemma("Gemma 3", "gemma3.jinja", has_windows=True),
    "phi3": Family("Phi 3", "phi3.jinja", PHI3, "<|end|>", "<s>", model_type="phi3"),
    "mistral": Family("Mistral 7B", "", ("<s>", "</s>"), "</s>", "<s>", has_pieces=True, model_type="mistral"),
}


@cache
def family_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Return a small tokenizer of a family. As on the Hub, not all its special tokens are in `all_special_tokens`."""
    family = FAMILIES[name]
    if family.has_pieces:
        return mistral_tokenizer()
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GPT4), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(family.special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=8,
        show_progress=False,
    )
    core.train_from_iterator(SAMPLE, trainer)
    if family.bos:  # to every text, as theirs do
        begins = [(family.bos, core.token_to_id(family.bos))]
        core.post_processor = processors.TemplateProcessing(single=f"{family.bos} $A", special_tokens=begins)
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.added])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=family.eos,
        chat_template=(TEMPLATES / family.template).read_text(),
        clean_up_tokenization_spaces=False,
        name_or_path=name,
    )


def save_small_model(model_type: str, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save a model of random weights for a tokenizer, without it."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 4096, "vocab_size": len(tokenizer)}
    ids = {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id", "bos_token_id")}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes, **ids))
    model.save_pretrained(folder)


def real_mistral_file(name: str) -> Path:
    """Return a file of a real tokenizer of Mistral's, which a package that vLLM needs carries."""
    return Path(pytest.importorskip("mistral_common").__file__).parent / "data" / name


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """Return SentencePiece's of Mistral 7B, with the template that it needs."""
    with TemporaryDirectory() as folder:
        shutil.copy(real_mistral_file("tokenizer.model.v1"), f"{folder}/tokenizer.model")
        tokenizer = LlamaTokenizer.from_pretrained(folder, clean_up_tokenization_spaces=False)
    tokenizer.chat_template, tokenizer.pad_token = MISTRAL_TEMPLATE, tokenizer.eos_token
    return tokenizer


@cache
def nemo_tokenizer() -> PreTrainedTokenizerFast:
    """Return Mistral Nemo's, of bytes; no chat is tried with it."""
    return convert_tekken_tokenizer(str(real_mistral_file("tekken_240911.json")))
