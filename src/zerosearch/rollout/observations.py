"""What the model of an agent reads, in token ids: its prompt, the observations, and documents to take notes on.

In all of it, text from outside (questions, queries, documents, notes) is plain text: an added token that it spells out
is not one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zerosearch.generation.tokenization import fit_observation, plain_text, prompt_token_ids, text_token_ids
from zerosearch.prompts import Agent, reading_prompt
from zerosearch.protocol import format_documents
from zerosearch.rollout.trajectory import Turn
from zerosearch.text import without_thoughts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Observation:
    """What the environment appends to a trajectory; `is_cut` if documents lost text to fit."""

    text: str
    token_ids: list[int]
    is_cut: bool = False


class ObservationWriter:
    """Write what an agent's model reads, with at most `max_tokens` for the documents of a search."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, agent: Agent, max_tokens: int) -> None:
        self.tokenizer, self.agent, self.max_tokens = tokenizer, agent, max_tokens

    def plain(self, text: str) -> str:
        return plain_text(text, self.tokenizer)

    def encode(self, text: str) -> list[int]:
        return text_token_ids(self.tokenizer, text)

    def prompt_ids(self, row: Mapping[str, Any], documents: Sequence[str] | None = None) -> list[int]:
        """Tokenise the agent's prompt, with the documents of a lookup if there was one, or the row's own prompt.

        A row's own prompt is text from outside as a whole.
        """
        if documents is None and "prompt" in row and row["prompt"] != self.agent.messages(row["question"]):
            return prompt_token_ids(self.tokenizer, row["prompt"])
        shown = self._plain_documents(documents) if documents else ""
        messages = self.agent.messages(self.plain(row["question"]), shown)
        return prompt_token_ids(self.tokenizer, messages, is_plain=True)

    def hint(self) -> Observation:
        """Write what follows an invalid action."""
        return Observation(self.agent.hint, self.encode(self.agent.hint))

    def nothing_found(self) -> Observation:
        """Write what follows the search of an agent that gets no documents."""
        text = self.agent.write_observation(())
        return Observation(text, self.encode(text))

    def documents(self, documents: Sequence[str]) -> Observation:
        """Write what follows a search."""
        return self._fit(documents, self.agent.write_observation)

    def notes(self, text: str) -> Observation:
        """Write notes on documents where the documents would stand. They are text: no tag in them is an action."""
        notes = self.plain(without_thoughts(text))
        return self._fit([notes], lambda notes: f"\n\n<information>{notes[0]}</information>\n\n")

    def reading_prompt_ids(self, question: str, turns: Sequence[Turn], template: str) -> list[int]:
        """Tokenise the request for notes on the documents of the last turn's search, apart from the trajectory."""
        prompt = reading_prompt(
            question=self.plain(question),
            reasoning=self.plain(" ".join(" ".join(turn.text.split()) for turn in turns)),
            query=self.plain(turns[-1].content),
            documents=self._plain_documents(turns[-1].documents),
            template=template,
        )
        return prompt_token_ids(self.tokenizer, [{"role": "user", "content": prompt}], is_plain=True)

    def _plain_documents(self, documents: Sequence[str]) -> str:
        return self._fit([self.plain(document) for document in documents], format_documents).text

    def _fit(self, documents: Sequence[str], write: Callable[[Sequence[str]], str]) -> Observation:
        return Observation(*fit_observation(documents, self.max_tokens, self.encode, write))
