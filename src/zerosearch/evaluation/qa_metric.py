"""The metrics as a module for Hugging Face's `evaluate`, offline too; this file is what it loads.

    import evaluate
    import zerosearch.evaluation.qa_metric

    metric = evaluate.load(zerosearch.evaluation.qa_metric.__file__)
    metric.compute(predictions=["Jane Austen", None], references=[["Jane Austen", "Austen"], ["Paris"]])
    # {"em": 0.5, "f1": 0.5, "cover_em": 0.5}

Not from a script in recipes/, whose evaluate.py Python would take for the package.
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate

from zerosearch.metrics import METRICS

CITATION = "Sun et al., ZeroSearch: Incentivize the Search Capability of LLMs without Searching, arXiv 2505.04588"
INPUTS = """
Args:
    predictions: answers, `None` where there is none (it scores 0).
    references: for each answer, the list of accepted ones, of which the best counts.
Returns:
    em: share of answers that equal an accepted one after normalisation (lower case, no punctuation, no articles).
    f1: mean F1 of words.
    cover_em: share of answers that contain the words of an accepted one.
"""


class SearchQA(evaluate.Metric):
    """Exact match, cover exact match and F1, as everywhere in this package."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Exact match, cover exact match and F1 of short answers with several accepted forms.",
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions: Sequence[str | None], references: Sequence[Sequence[str]]) -> dict[str, float]:
        pairs = list(zip(predictions, references, strict=True))
        return {name: sum(metric(*pair) for pair in pairs) / len(pairs) for name, metric in METRICS.items()}
