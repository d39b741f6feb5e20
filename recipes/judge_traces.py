"""Label every document of the searches as useful or noisy (paper, Section 3.3), by a rule, a language model or both.

    python recipes/judge_traces.py --traces traces.jsonl --output_dir outputs/judged                  # the free rule
    HOST_KEY=... python recipes/judge_traces.py --traces traces.jsonl --output_dir outputs/judged \
        --judges rule llm --judge_url https://HOST/v1 --judge_model qwen-max --judge_api_key_variable HOST_KEY

The rule: a golden answer occurs in the document. The model: it alone suffices to answer the query. The output folder
gets judged.jsonl (the searches with `verdicts`, a list for each judge under its name), judging.json (counts, and how
far the judges agree) and verdicts.sqlite, the cache: after a kill or an error the same command goes on, and no verdict
is paid for twice. Next: recipes/build_simulator_data.py.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import chain, combinations
from pathlib import Path
from typing import Any

from zerosearch.command_line import exit_on_user_error, parse
from zerosearch.engines.cache import Cache
from zerosearch.errors import UserError
from zerosearch.files import sole_writer, write_json, write_jsonl
from zerosearch.http import redacted_url
from zerosearch.prompts import PROMPT_SETS, PromptSetName
from zerosearch.simulator.judge import (
    RULE,
    Judge,
    Verdict,
    agreement,
    document_texts,
    judge_pairs,
    rule_verdicts,
)
from zerosearch.simulator.traces import read_traces


@dataclass
class JudgeArguments:
    """What to judge, and who judges."""

    traces: str = field(metadata={"help": "JSONL rows {question, golden_answers, query, documents}."})
    output_dir: str = field(metadata={"help": "Folder for the judged searches, the counts and the cache."})
    judges: list[str] = field(
        default_factory=lambda: [RULE], metadata={"help": "Who judges: rule, llm, or both.", "choices": [RULE, "llm"]}
    )
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
    judge_timeout_s: float = field(default=120.0, metadata={"help": "For llm: longest wait for a reply, in seconds."})
    judge_max_retries: int = field(default=5, metadata={"help": "For llm: how often a call that failed is repeated."})
    judge_concurrency: int = field(default=32, metadata={"min": 1, "help": "For llm: calls in flight."})
    verdict_cache: str | None = field(default=None, metadata={"help": "For llm: another place for the cache."})
    traces_limit: int | None = field(default=None, metadata={"min": 1, "help": "Judge the first searches only."})
    prompt: PromptSetName = field(default="paper", metadata={"help": "For llm: the prompts; the judge's is used."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace an earlier judged.jsonl."})

    def __post_init__(self) -> None:
        if "llm" in self.judges and self.judge_model is None:
            raise UserError("--judges llm needs --judge_model, the name of the model to ask")


def api_key(url: str, variable: str | None) -> str | None:
    """Return the key in the variable, by default OpenAI's for OpenAI. Raises `UserError` if it is not set."""
    if variable is None:
        if not url.startswith("https://api.openai.com/"):
            return None
        variable = "OPENAI_API_KEY"
    if not os.environ.get(variable):
        raise UserError(f"the judge's key is to be in the environment variable {variable}, which is not set")
    return os.environ[variable]


def llm_verdicts(arguments: JudgeArguments, traces: list[dict[str, Any]]) -> tuple[Judge, list[list[Verdict]]]:
    """Judge every document of every search by the language model, or by what the cache says it said."""
    assert arguments.judge_model is not None
    judge = Judge(
        arguments.judge_url,
        arguments.judge_model,
        api_key(arguments.judge_url, arguments.judge_api_key_variable),
        PROMPT_SETS[arguments.prompt].judge,
        max_tokens=arguments.judge_max_tokens,
        timeout_s=arguments.judge_timeout_s,
        max_retries=arguments.judge_max_retries,
        max_concurrency=arguments.judge_concurrency,
    )
    cache = Cache(Path(arguments.verdict_cache or Path(arguments.output_dir, "verdicts.sqlite")))
    pairs = [[(trace["query"], text) for text in document_texts(trace)] for trace in traces]
    verdicts = judge_pairs(chain.from_iterable(pairs), judge, cache)
    cache.close()
    return judge, [[verdicts[pair] for pair in pairs_of_trace] for pairs_of_trace in pairs]


def report(verdicts: dict[str, list[list[Verdict]]]) -> dict[str, Any]:
    """Count the verdicts of each judge, and compare every two of them."""
    flat = {name: list(chain.from_iterable(lists)) for name, lists in verdicts.items()}
    counted = {name: Counter(given) for name, given in flat.items()}
    return {
        "verdicts": {
            name: {"useful": counts[True], "noisy": counts[False], "none": counts[None]}
            for name, counts in counted.items()
        },
        "agreement": {
            f"{one} and {other}": asdict(agreement(flat[one], flat[other])) for one, other in combinations(flat, 2)
        },
    }


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    (arguments,) = parse(JudgeArguments, argv=argv)
    traces = read_traces(arguments.traces)[: arguments.traces_limit]
    directory = Path(arguments.output_dir)
    judged = directory / "judged.jsonl"
    with sole_writer(directory):
        if judged.exists() and not arguments.overwrite_output_dir:
            raise UserError(f"{judged} is there already; name another folder, or pass --overwrite_output_dir")
        verdicts: dict[str, list[list[Verdict]]] = {}
        about: dict[str, Any] = {"traces": arguments.traces, "searches": len(traces)}
        if RULE in arguments.judges:
            verdicts[RULE] = [rule_verdicts(trace) for trace in traces]
        if "llm" in arguments.judges:
            judge, verdicts[judge.model] = llm_verdicts(arguments, traces)
            about["judge"] = {"model": judge.model, "url": redacted_url(judge.base_url), "prompt": judge.template}
            about["judge"] |= asdict(judge.counts) | judge.client.counts
        results = about | report(verdicts)
        rows = (
            {**trace, "verdicts": trace.get("verdicts", {}) | {name: lists[place] for name, lists in verdicts.items()}}
            for place, trace in enumerate(traces)
        )
        write_jsonl(judged, rows)
        write_json(directory / "judging.json", results)
    for name, counts in results["verdicts"].items():
        print(f"{name}: {counts['useful']:,} useful, {counts['noisy']:,} noisy, {counts['none']:,} without a verdict")
    for names, found in results["agreement"].items():
        share, kappa = (
            f"{found[name]:.3f}" if found[name] is not None else "not defined" for name in ("share", "kappa")
        )
        print(f"{names} agree on {share} of {found['num_documents']:,} documents; Cohen's kappa {kappa}")
    print(f"judged searches: {judged}")


if __name__ == "__main__":
    main()
