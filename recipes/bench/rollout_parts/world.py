"""What the rollout bench runs on: keyed questions, documents and latencies, and a policy that searches.

The policy is a small Llama with random layers whose output layer counts down: behind a cue " t12" it samples 12
tokens, the last of which closes a search. A prompt ends in a cue, and so do the documents of each search; the cues are
keyed by (run, row, turn). So all arms sample the same tokens, whatever the temperature and the seed, and a trajectory
searches as often as its budget lets it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import exp
from pathlib import Path
from statistics import NormalDist
from typing import Any

from zerosearch.engines import SearchRequest, SearchResult
from zerosearch.environment import TAGS_AS_CALLS
from zerosearch.generation import tokenization
from zerosearch.noise import keyed_uniform
from zerosearch.prompts import PAPER, POLICY_PROMPT

LATENCIES = ("none", "constant", "lognormal")
MEDIAN_S, SIGMA = 0.3, 0.8  # log-normal: 5 % above 1.1 s, 1 % above 1.9 s
TURN_TOKENS = (6, 14)  # shortest and longest turn, tags included
CONTEXT_TOKENS = 2048
WORDS = POLICY_PROMPT.replace("<", " ").replace(">", " ").split()


@contextmanager
def cues_are_read() -> Iterator[None]:
    """Let documents spell added tokens, as the cues are such; elsewhere text from outside is cut inside them."""
    original = tokenization.added_tokens
    tokenization.added_tokens = lambda tokenizer: re.compile("(?!)")  # type: ignore[assignment]
    try:
        yield
    finally:
        tokenization.added_tokens = original


@dataclass(frozen=True)
class Cell:
    """One combination of the three axes."""

    latency: str
    turns: int
    trajectories: int

    def __str__(self) -> str:
        return f"{self.latency}, {self.turns} x {self.trajectories}"

    def without_latency(self) -> Cell:
        return replace(self, latency="none")


@dataclass(frozen=True)
class World:
    """What the policy is asked, what a search returns and when: by (run, row, turn) alone, the same for every arm."""

    latency: str
    run: int
    constant_s: float = 0.05

    def latency_s(self, row: int, turn: int) -> float:
        if self.latency == "none":
            return 0.0
        if self.latency == "constant":
            return self.constant_s
        return MEDIAN_S * exp(SIGMA * NormalDist().inv_cdf(keyed_uniform(0, self.run, row, turn)))

    def turn_tokens(self, row: int, turn: int) -> int:
        shortest, longest = TURN_TOKENS
        return shortest + int(keyed_uniform(1, self.run, row, turn) * (longest - shortest + 1))

    def row(self, row: int) -> dict[str, Any]:
        question = PAPER.policy.prompt(f"What is number {row} of run {self.run}?")
        content = f"{question} t{self.turn_tokens(row, 0)}"
        return {"prompt": [{"role": "user", "content": content}], "question": question, "golden_answers": ["?"]}

    def documents(self, row: int, turn: int) -> tuple[str, ...]:
        start = row + turn
        texts = [f"{row} {turn} " + " ".join(WORDS[(start + 9 * place) % 80 :][:12]) for place in range(5)]
        return (*texts[:-1], f"{texts[-1]} t{self.turn_tokens(row, turn + 1)}")

    def longest_chain_s(self, cell: Cell) -> float:
        """Return the floor's first part: no trajectory's searches can overlap with each other."""
        return max(sum(self.latency_s(row, turn) for turn in range(cell.turns)) for row in range(cell.trajectories))


@dataclass
class DelayedEngine:
    """Return the world's documents when its latency has passed."""

    world: World
    name: str = "delayed"
    max_concurrency: int = 4096

    async def search(self, request: SearchRequest) -> SearchResult:
        found = re.search(r"number (\d+) of run", request.question)  # a key may have another number of the row
        assert found is not None
        row, turn = int(found[1]), request.key[-1]
        if seconds := self.world.latency_s(row, turn):
            await asyncio.sleep(seconds)
        return SearchResult(self.world.documents(row, turn))

    async def aclose(self) -> None:
        pass


# Tool calls in TRL's eyes are the policy's searches, so that its loop runs on the same tokens as the others.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'tool' -%}{{ '\\n\\n<information>' + message.content + '</information>\\n\\n' }}
{%- else -%}{{ message.content }}{%- for call in message.tool_calls or [] -%}{{ call.function | tojson }}{%- endfor -%}
{%- endif -%}
{%- endfor -%}"""
RESPONSE_TEMPLATE = {
    **TAGS_AS_CALLS,
    "start_anchor_pattern": r" t\d+(?:</information>\n\n)?",
}


def save_counting_policy(directory: Path) -> None:
    """Save a policy that counts down from its cue: " t12" is followed by " t11" to " t3", then a search."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    counts = range(3, TURN_TOKENS[1] + 1)
    cues = [f" t{number}" for number in counts]
    late_cues = [f"{cue}</information>\n\n" for cue in cues]
    chain = ["</search>", " query", "<search>", *cues]  # each follows the next
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator([POLICY_PROMPT] * 9, trainer)
    bpe.add_tokens([AddedToken(text, normalized=False) for text in [*chain, *late_cues]])
    end = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=CHAT_TEMPLATE, **end)
    tokenizer.response_template = RESPONSE_TEMPLATE

    set_seed(0)
    ids = tokenizer.convert_tokens_to_ids
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # of 32, the smallest head that vLLM takes on a CPU
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for place, text in enumerate(chain):
            state = torch.zeros(config.hidden_size)
            state[place] = 100.0  # the layers add little to it, and behind the last norm it is sqrt(64) = 8
            model.model.embed_tokens.weight[ids(text)] = state
            if place:
                model.lm_head.weight[ids(chain[place - 1]), place] = 5.0  # a logit of 40: as good as certain
        for cue, late_cue in zip(cues, late_cues, strict=True):
            model.model.embed_tokens.weight[ids(late_cue)] = model.model.embed_tokens.weight[ids(cue)]
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
