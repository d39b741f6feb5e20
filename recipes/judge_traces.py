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

from collections import Counter
from dataclasses import dataclass, field
from itertools import chain, combinations
from pathlib import Path
from typing import Any

from zerosearch.command_line import exit_on_user_error, parse, say
from zerosearch.engines.cache import Cache
from zerosearch.errors import UserError
from zerosearch.files import sole_writer, write_json, write_jsonl
from zerosearch.http import redacted_url
from zerosearch.prompts import PROMPT_SETS, PromptSetName
from zerosearch.simulator.judge import RULE, Judge, JudgeOptions, Verdict, compare, judge_traces, rule_verdicts
from zerosearch.simulator.traces import read_traces


@dataclass
class JudgeArguments:
    """What to judge, and who judges."""

    traces: str = field(metadata={"help": "JSONL rows {question, golden_answers, query, documents}."})
    output_dir: str = field(metadata={"help": "Folder for the judged searches, the counts and the cache."})
    judges: list[str] = field(
        default_factory=lambda: [RULE], metadata={"help": "Who judges: rule, llm, or both.", "choices": [RULE, "llm"]}
    )
    verdict_cache: str | None = field(default=None, metadata={"help": "For llm: another place for the cache."})
    traces_limit: int | None = field(default=None, metadata={"min": 1, "help": "Judge the first searches only."})
    prompt: PromptSetName = field(default="paper", metadata={"help": "For llm: the prompts; the judge's is used."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace an earlier judged.jsonl."})


def report(verdicts: dict[str, list[Verdict]]) -> dict[str, Any]:
    """Count the verdicts of each judge, and compare every two of them."""
    counted = {name: Counter(given) for name, given in verdicts.items()}
    return {
        "verdicts": {
            name: {"useful": counts[True], "noisy": counts[False], "none": counts[None]}
            for name, counts in counted.items()
        },
        "agreement": {
            f"{one} and {other}": compare(verdicts[one], verdicts[other]) for one, other in combinations(verdicts, 2)
        },
    }


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments, options = parse(JudgeArguments, JudgeOptions, argv=argv)
    judge = Judge(options, PROMPT_SETS[arguments.prompt].judge) if "llm" in arguments.judges else None
    traces = read_traces(arguments.traces)[: arguments.traces_limit]
    directory = Path(arguments.output_dir)
    judged = directory / "judged.jsonl"
    about: dict[str, Any] = {"traces": arguments.traces, "searches": len(traces)}
    verdicts: dict[str, list[list[Verdict]]] = {}
    with sole_writer(directory):
        if judged.exists() and not arguments.overwrite_output_dir:
            raise UserError(f"{judged} is there already; name another folder, or pass --overwrite_output_dir")
        if RULE in arguments.judges:
            verdicts[RULE] = [rule_verdicts(trace) for trace in traces]
        if judge:
            cache = Cache(arguments.verdict_cache or directory / "verdicts.sqlite")
            verdicts[judge.model] = judge_traces(traces, judge, cache)
            cache.close()
            about["judge"] = {"model": judge.model, "url": redacted_url(judge.base_url), "prompt": judge.template}
            about["judge"] |= judge.counts | judge.client.counts
        rows = (
            {**trace, "verdicts": trace.get("verdicts", {}) | {name: lists[place] for name, lists in verdicts.items()}}
            for place, trace in enumerate(traces)
        )
        write_jsonl(judged, rows)
        results = about | report({name: list(chain.from_iterable(lists)) for name, lists in verdicts.items()})
        write_json(directory / "judging.json", results)
    lines = [
        f"{name}: {counts['useful']:,} useful, {counts['noisy']:,} noisy, {counts['none']:,} without a verdict"
        for name, counts in results["verdicts"].items()
    ]
    for names, found in results["agreement"].items():
        share, kappa = ("not defined" if found[name] is None else f"{found[name]:.3f}" for name in ("share", "kappa"))
        lines.append(f"{names} agree on {share} of {found['num_documents']:,} documents; Cohen's kappa {kappa}")
    say("\n".join([*lines, f"judged searches: {judged}"]))


if __name__ == "__main__":
    main()
