"""What the model of an agent reads, in token ids: its prompt, the observations, and documents to take notes on.

In all of it, text from outside (questions, queries, documents, notes) is plain text: an added token that it spells out
is not one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zerosearch.errors import UserError
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


MARK = "zerosearch"  # stands for the policy's own text where a chat template is asked what follows it


class ObservationWriter:
    """Write what an agent's model reads, with at most `max_tokens` for the documents of a search.

    `template_kwargs` go to the chat template, such as Qwen3's `enable_thinking`. What stands in a context is never
    rendered again: of an agent that calls a tool, an observation is what the template writes behind the policy's own
    tokens. Raises `UserError` where there is no template, or one that writes calls otherwise than the agent.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        agent: Agent,
        max_tokens: int,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer, self.agent, self.max_tokens = tokenizer, agent, max_tokens
        self.template_options = {**(template_kwargs or {})}
        if agent.grammar.tools:
            self.template_options["tools"] = agent.grammar.tools
        if self.template_options and tokenizer.chat_template is None:
            wants = (
                f"the agent {agent.name!r} calls a tool" if agent.grammar.tools else "chat_template_kwargs are given"
            )
            raise UserError(f"{wants}, and the model has no chat template (an endpoint keeps its own)")
        if agent.grammar.tools:
            self._reply("documents")

    def plain(self, text: str) -> str:
        return plain_text(text, self.tokenizer)

    def encode(self, text: str) -> list[int]:
        return text_token_ids(self.tokenizer, text)

    def prompt_ids(self, row: Mapping[str, Any], documents: Sequence[str] | None = None) -> list[int]:
        """Tokenise the agent's prompt, with the documents of a lookup if there was one, or the row's own prompt.

        A row's own prompt is text from outside as a whole.
        """
        if documents is None and "prompt" in row and row["prompt"] != self.agent.messages(row["question"]):
            return prompt_token_ids(self.tokenizer, row["prompt"], **self.template_options)
        shown = self._plain_documents(documents) if documents else ""
        messages = self.agent.messages(self.plain(row["question"]), shown)
        return prompt_token_ids(self.tokenizer, messages, is_plain=True, **self.template_options)

    def hint(self) -> Observation:
        """Write what follows an invalid action."""
        if not self.agent.grammar.tools:
            return Observation(self.agent.hint, self.encode(self.agent.hint))
        own: dict[str, Any] = {"role": "assistant", "content": MARK}
        text = self._following(own, MARK, {"role": "user", "content": self.agent.hint})
        return Observation(text, self._encode_rendered(text))

    def documents(self, documents: Sequence[str]) -> Observation:
        """Write what follows a search; no documents, for an agent that gets none."""
        if not self.agent.grammar.tools:
            return self._fit(documents, self.agent.write_observation)
        return self._fit_reply(documents, format_documents)

    def notes(self, text: str) -> Observation:
        """Write notes on documents where the documents would stand. They are text: no tag in them is an action."""
        notes = self.plain(without_thoughts(text))
        if self.agent.grammar.tools:
            return self._fit_reply([notes], lambda notes: notes[0])
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

    def _fit_reply(self, documents: Sequence[str], write: Callable[[Sequence[str]], str]) -> Observation:
        """Fit what a tool replies."""
        plain = [self.plain(document) for document in documents]
        fitted = fit_observation(
            plain, self.max_tokens, self._encode_rendered, lambda texts: self._reply(write(texts))
        )
        return Observation(*fitted)

    def _reply(self, content: str) -> str:
        """Return what the chat template writes behind a call of the search tool that found `content`."""
        grammar = self.agent.grammar
        arguments = {"name": "search", "arguments": {"query": MARK}}
        own = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": arguments}]}
        return self._following(own, grammar.write_search(MARK), {"role": "tool", "name": "search", "content": content})

    def _following(self, own: Mapping[str, Any], written: str, reply: Mapping[str, Any]) -> str:
        """Return what the chat template writes from the end of a message of the policy's on, for a reply to it."""
        from jinja2 import TemplateError

        messages = [{"role": "user", "content": "."}, own, reply]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, **self.template_options
            )
        except TemplateError as error:
            raise UserError(f"the model's chat template has no place for what a tool replies ({error})") from error
        _, found, following = text.partition(written)
        if not found:
            name = self.agent.name
            raise UserError(f"the model's chat template does not write a search as the agent {name!r} does: {written}")
        return following

    def _encode_rendered(self, text: str) -> list[int]:
        """Tokenise what the chat template wrote around text that is plain."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _plain_documents(self, documents: Sequence[str]) -> str:
        return self._fit([self.plain(document) for document in documents], format_documents).text

    def _fit(self, documents: Sequence[str], write: Callable[[Sequence[str]], str]) -> Observation:
        return Observation(*fit_observation(documents, self.max_tokens, self.encode, write))
