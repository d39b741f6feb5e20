"""Which documents of a search are useful (paper, Section 3.3): judged by a language model, or by a free rule.

The model is asked, document by document, whether it alone suffices to answer the query. The rule asks whether a golden
answer of the question occurs in it: another question, and not the paper's, but free; so every verdict carries the name
of who gave it. A verdict is True (useful), False (noisy) or None (none to be had).
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm

from zerosearch.engines.cache import Cache
from zerosearch.errors import UserError
from zerosearch.http import HTTPClient, ServiceError, read_chat, run_in_background
from zerosearch.metrics import holds_answer, normalize_answer
from zerosearch.prompts import JUDGE_AGAIN_PROMPT, JUDGE_PROMPT
from zerosearch.simulator.traces import as_passage
from zerosearch.text import without_thoughts

Verdict = bool | None
Pair = tuple[str, str]  # a query and a document

RULE = "rule"
NOT_FOUND_IN_TEXT = {"yes", "no", "true", "false"}  # answers that a document gives without saying them
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
class JudgeCounts:
    """What judging took: documents asked about or found in the cache, and what the asking came to."""

    judged: int = 0
    from_cache: int = 0
    asked_again: int = 0  # the first reply held no verdict
    without_verdict: int = 0  # nor did the second
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass
class Judge:
    """A language model behind an OpenAI-style endpoint that says whether a document suffices to answer a query.

    A reply without a verdict is asked for once more, in the same conversation, and then counted.
    """

    base_url: str
    model: str
    api_key: str | None = None
    template: str = JUDGE_PROMPT
    max_tokens: int = 256
    timeout_s: float = 120.0
    max_retries: int = 5
    max_concurrency: int = 32
    counts: JudgeCounts = field(default_factory=JudgeCounts)

    def __post_init__(self) -> None:
        if self.model == RULE:
            raise UserError(f"a judge cannot be called {RULE!r}: verdicts of that name are those of the free rule")
        self.base_url = self.base_url.rstrip("/")
        self.client = HTTPClient(
            "the judge",
            remedy="verdicts so far are kept: put it right and run the same command again",
            api_key=self.api_key,
            final_signs=EMPTY_BALANCE,
            timeout_s=self.timeout_s,
            max_retries=self.max_retries,
            max_concurrency=self.max_concurrency,
            trust_env=True,
        )

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
            self.counts.asked_again += 1
            again = [{"role": "assistant", "content": reply or "(nothing)"}]
            again.append({"role": "user", "content": JUDGE_AGAIN_PROMPT})
            reply = await self._reply(messages + again)
            verdict = parse_verdict(reply)
        self.counts.without_verdict += verdict is None
        return verdict, reply

    async def _reply(self, messages: list[dict[str, str]]) -> str:
        body = {"model": self.model, "messages": messages, "temperature": 0.0, "max_tokens": self.max_tokens}
        url = f"{self.base_url}/chat/completions"
        reply, _ = await self.client.request("POST", url, json=body, read=read_chat)
        self.counts.prompt_tokens += reply.prompt_tokens or 0
        self.counts.completion_tokens += reply.completion_tokens or 0
        return without_thoughts(reply.text)


def judge_pairs(pairs: Iterable[Pair], judge: Judge, cache: Cache) -> dict[Pair, Verdict]:
    """Return the judge's verdict on every pair, asking only what the cache does not hold.

    Raises `UserError` when the judge fails for good; every verdict given so far is in the cache by then.
    """
    verdicts: dict[Pair, Verdict] = {}
    missing = []
    for pair in dict.fromkeys(pairs):
        found = cache.get(judge.cached_as(pair))
        if found is None:
            missing.append(pair)
        else:
            verdicts[pair] = found["verdict"]
    judge.counts.from_cache += len(verdicts)
    judge.counts.judged += len(verdicts)
    failures = run_in_background(_ask_all(missing, judge, cache, verdicts))
    if failures:
        raise UserError(str(failures[0])) from failures[0]
    return verdicts


async def _ask_all(
    missing: list[Pair], judge: Judge, cache: Cache, verdicts: dict[Pair, Verdict]
) -> list[ServiceError]:
    """Ask for the missing verdicts; after a failure for good ask no more, but take in what is under way and paid."""
    waiting = iter(missing)
    failures: list[ServiceError] = []
    with tqdm(total=len(missing), desc=f"verdicts of {judge.model}", disable=not missing) as bar:

        async def ask_in_turn() -> None:
            while not failures and (pair := next(waiting, None)) is not None:
                try:
                    verdict, reply = await judge.verdict(pair)
                except ServiceError as error:
                    failures.append(error)
                    return
                cache.put(judge.cached_as(pair), {"verdict": verdict, "reply": reply})
                verdicts[pair] = verdict
                judge.counts.judged += 1
                bar.update()

        try:
            await asyncio.gather(*(ask_in_turn() for _ in range(min(judge.max_concurrency, len(missing)))))
        finally:
            await judge.client.aclose()
    return failures


@dataclass(frozen=True)
class Agreement:
    """How two judges agree on the documents on which both have a verdict; `kappa` is Cohen's.

    `kappa` is `None` where it is not defined: both gave one and the same verdict throughout, or there is none.
    """

    num_documents: int
    both_useful: int
    both_noisy: int
    only_first_useful: int
    only_second_useful: int
    share: float | None
    kappa: float | None


def agreement(first: Iterable[Verdict], second: Iterable[Verdict]) -> Agreement:
    """Compare two judges' verdicts on the same documents, in the same order."""
    pairs = [(one, other) for one, other in zip(first, second, strict=True) if one is not None and other is not None]
    size = len(pairs)
    both_useful, both_noisy = pairs.count((True, True)), pairs.count((False, False))
    only_first, only_second = pairs.count((True, False)), pairs.count((False, True))
    share = kappa = None
    if size:
        share = (both_useful + both_noisy) / size
        first_useful, second_useful = (both_useful + only_first) / size, (both_useful + only_second) / size
        by_chance = first_useful * second_useful + (1 - first_useful) * (1 - second_useful)
        kappa = (share - by_chance) / (1 - by_chance) if by_chance < 1 else None
    return Agreement(size, both_useful, both_noisy, only_first, only_second, share, kappa)
