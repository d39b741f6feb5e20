"""Which documents of a search are useful (paper, Section 3.3): judged by a language model, or by a free rule.

The model is asked, document by document, whether it alone suffices to answer the query. The rule asks whether a golden
answer of the question occurs in it: another question, and not the paper's, but free; so every verdict carries the name
of who gave it. A verdict is True (useful), False (noisy) or None (none to be had).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from tqdm.auto import tqdm

from zerosearch.engines.cache import Cache
from zerosearch.errors import UserError
from zerosearch.http import HTTPClient, ServiceError, read_chat, run_in_background
from zerosearch.metrics import holds_answer, normalize_answer
from zerosearch.prompts import JUDGE_AGAIN_PROMPT, JUDGE_PROMPT
from zerosearch.simulator.traces import as_passage
from zerosearch.text import printable, without_thoughts

Verdict = bool | None
Pair = tuple[str, str]  # a query and a document

RULE = "rule"
NOT_FOUND_IN_TEXT = {"yes", "no", "true", "false"}  # answers that a document gives without saying them
TIMEOUT_S = 600.0  # a model that thinks takes its time
EMPTY_BALANCE = ("insufficient_quota", "insufficient_balance", "Insufficient Balance", "Arrearage")


def rule_verdict(document: str, golden_answers: Sequence[str]) -> Verdict:
    """Say whether a golden answer occurs in the document.

    `None` where every golden answer is a yes or a no: those words occur by chance, and the fact without them.
    """
    answers = [answer for answer in golden_answers if normalize_answer(answer) not in NOT_FOUND_IN_TEXT]
    return holds_answer(document, answers) if answers else None


def rule_verdicts(trace: Mapping[str, Any]) -> list[Verdict]:
    """Judge every document of a search by the rule."""
    return [rule_verdict(text, trace["golden_answers"]) for text in document_texts(trace)]


def document_texts(trace: Mapping[str, Any]) -> list[str]:
    """Return the documents of a search as texts, "title: text"."""
    return [as_passage(document).document for document in trace["documents"]]


VERDICT_LINE = re.compile(r"\W*verdict\W+(?P<word>sufficient|insufficient)\W*", re.IGNORECASE)
BARE_VERDICT = re.compile(r"\W*(?P<word>sufficient|insufficient)\W*", re.IGNORECASE)


def parse_verdict(reply: str) -> Verdict:
    """Read the verdict in a reply without thoughts: a line "Verdict: sufficient" or "insufficient", or the word alone.

    `None` for anything else, two lines that differ included: a verdict is never guessed.
    """
    if bare := BARE_VERDICT.fullmatch(reply):
        return bare["word"].lower() == "sufficient"
    words = {line["word"].lower() for line in map(VERDICT_LINE.fullmatch, reply.splitlines()) if line}
    return words == {"sufficient"} if len(words) == 1 else None


@dataclass
class JudgeOptions:
    """A language model that judges, on the command line. A recipe's parser takes this class beside its own."""

    judge_url: str = field(
        default="https://api.openai.com/v1", metadata={"help": "For llm: an OpenAI-style endpoint."}
    )
    judge_model: str | None = field(default=None, metadata={"help": "For llm: the model to ask (paper: Qwen-Max)."})
    judge_api_key_variable: str | None = field(
        default=None,
        metadata={
            "help": "For llm: the environment variable that holds the key. Default: OPENAI_API_KEY for OpenAI's own "
            "address; no key is sent to another one."
        },
    )
    judge_max_tokens: int = field(
        default=256, metadata={"min": 1, "help": "For llm: longest reply; a model that thinks needs more."}
    )
    judge_concurrency: int = field(default=32, metadata={"min": 1, "help": "For llm: calls in flight."})

    def api_key(self) -> str | None:
        """Return the key to send, if any. Raises `UserError` if the variable that should hold it is not set."""
        is_openai = self.judge_url.startswith("https://api.openai.com/")
        variable = self.judge_api_key_variable or ("OPENAI_API_KEY" if is_openai else None)
        if variable and not os.environ.get(variable):
            raise UserError(f"the judge's key is to be in the environment variable {variable}, which is not set")
        return os.environ[variable] if variable else None


class Judge:
    """A language model behind an OpenAI-style endpoint that says whether a document suffices to answer a query.

    A reply without a verdict is asked for once more, in the same conversation, and then counted. `counts` says what
    judging took. Raises `UserError` without a model or a key.
    """

    def __init__(self, options: JudgeOptions, template: str = JUDGE_PROMPT) -> None:
        if options.judge_model is None:
            raise UserError("--judges llm needs --judge_model, the name of the model to ask")
        if options.judge_model == RULE:
            raise UserError(f"a judge cannot be called {RULE!r}: verdicts of that name are those of the free rule")
        self.options, self.model, self.template = options, options.judge_model, template
        self.base_url = options.judge_url.rstrip("/")
        self.client = HTTPClient(
            "the judge",
            remedy="verdicts so far are kept: put it right and run the same command again",
            api_key=options.api_key(),
            final_signs=EMPTY_BALANCE,
            timeout_s=TIMEOUT_S,
            max_concurrency=options.judge_concurrency,
            trust_env=True,
        )
        names = ("judged", "from_cache", "asked_again", "without_verdict", "prompt_tokens", "completion_tokens")
        self.counts = dict.fromkeys(names, 0)

    def cached_as(self, pair: Pair) -> dict[str, str]:
        """Return what a verdict is cached by."""
        prompt_sha256 = hashlib.sha256(self.template.encode()).hexdigest()
        return {"judge": self.model, "prompt_sha256": prompt_sha256, "query": pair[0], "document": pair[1]}

    async def verdict(self, pair: Pair) -> tuple[Verdict, str]:
        """Return the verdict on one document and the reply that holds it. Raises `ServiceError`."""
        query, document = pair
        messages = [{"role": "user", "content": self.template.format(query=query, document=document)}]
        reply = await self._reply(messages)
        verdict = parse_verdict(reply)
        if verdict is None:
            self.counts["asked_again"] += 1
            again = [{"role": "assistant", "content": reply or "(nothing)"}]
            again.append({"role": "user", "content": JUDGE_AGAIN_PROMPT})
            reply = await self._reply(messages + again)
            verdict = parse_verdict(reply)
        self.counts["without_verdict"] += verdict is None
        return verdict, reply

    async def _reply(self, messages: list[dict[str, str]]) -> str:
        body = {"model": self.model, "messages": messages, "temperature": 0.0}
        body["max_tokens"] = self.options.judge_max_tokens
        url = f"{self.base_url}/chat/completions"
        reply, _ = await self.client.request("POST", url, json=body, read=read_chat)
        self.counts["prompt_tokens"] += reply.prompt_tokens or 0
        self.counts["completion_tokens"] += reply.completion_tokens or 0
        return without_thoughts(reply.text)


def judge_traces(traces: Sequence[Mapping[str, Any]], judge: Judge, cache: Cache) -> list[list[Verdict]]:
    """Return the judge's verdict on every document of every search, asking only what the cache does not hold.

    Raises `UserError` when the judge fails for good; every verdict given so far is in the cache by then.
    """
    pairs = [[(trace["query"], text) for text in document_texts(trace)] for trace in traces]
    verdicts: dict[Pair, Verdict] = {}
    missing = []
    for pair in dict.fromkeys(chain.from_iterable(pairs)):
        found = cache.get(judge.cached_as(pair))
        if found is None:
            missing.append(pair)
        else:
            verdicts[pair] = found["verdict"]
    judge.counts["from_cache"] += len(verdicts)
    failures = run_in_background(_ask_all(missing, judge, cache, verdicts))
    judge.counts["judged"] += len(verdicts)
    if failures:
        raise UserError(str(failures[0])) from failures[0]
    return [[verdicts[pair] for pair in pairs_of_trace] for pairs_of_trace in pairs]


async def _ask_all(
    missing: list[Pair], judge: Judge, cache: Cache, verdicts: dict[Pair, Verdict]
) -> list[ServiceError]:
    """Ask for the missing verdicts; after a failure for good ask no more, but take in what is under way and paid."""
    waiting = iter(missing)
    failures: list[ServiceError] = []
    with tqdm(total=len(missing), desc=printable(f"verdicts of {judge.model}"), disable=not missing) as bar:

        async def ask_in_turn() -> None:
            while not failures and (pair := next(waiting, None)) is not None:
                try:
                    verdict, reply = await judge.verdict(pair)
                except ServiceError as error:
                    failures.append(error)
                    return
                cache.put(judge.cached_as(pair), {"verdict": verdict, "reply": reply})
                verdicts[pair] = verdict
                bar.update()

        try:
            await asyncio.gather(*(ask_in_turn() for _ in range(min(judge.client.max_concurrency, len(missing)))))
        finally:
            await judge.client.aclose()
    return failures


def compare(first: Iterable[Verdict], second: Iterable[Verdict]) -> dict[str, Any]:
    """Return how two judges agree on the documents on which both have a verdict, in the same order.

    `share` of them, and Cohen's `kappa`, which is `None` where it is not defined: both gave one and the same verdict
    throughout, or there is none.
    """
    pairs = [(one, other) for one, other in zip(first, second, strict=True) if one is not None and other is not None]
    size, counts = len(pairs), Counter(pairs)
    agreement: dict[str, Any] = {
        "num_documents": size,
        "both_useful": counts[True, True],
        "both_noisy": counts[False, False],
        "only_first_useful": counts[True, False],
        "only_second_useful": counts[False, True],
    }
    if not size:
        return agreement | {"share": None, "kappa": None}
    share = (counts[True, True] + counts[False, False]) / size
    useful = [sum(pair[judge] for pair in pairs) / size for judge in (0, 1)]
    by_chance = useful[0] * useful[1] + (1 - useful[0]) * (1 - useful[1])
    return agreement | {"share": share, "kappa": (share - by_chance) / (1 - by_chance) if by_chance < 1 else None}
