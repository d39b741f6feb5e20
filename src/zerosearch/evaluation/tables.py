"""Results for people: a table for the terminal, tables in the paper's shape in Markdown, and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from zerosearch.data import BENCHMARKS

Results = Mapping[str, Any]  # what results.json holds

AVERAGE = "Avg"
PLOT_TITLE = "EM in percent, mean of the datasets, with 95 % intervals"
ROW_HEIGHT, PLOT_WIDTH, VALUE_WIDTH, LETTER_WIDTH, MARGIN = 26, 420, 160, 8, 12  # pixels; letters are 13 high


def results_table(results: Results) -> str:
    """Return the results as a short table: a line a dataset, and their mean where there are several."""
    width = max(18, *map(len, results["by_dataset"]))
    scores_head = f"{'EM [95 %]':<20} {'F1 [95 %]':<20} {'cover-EM':>8}"
    lines = [f"{'dataset':<{width}} {'n':>6}  {scores_head} {'answered':>8} {'searches':>8}"]
    for name, scores in results["by_dataset"].items():
        rates = f"{scores['answer_rate']:>8.3f} {scores['searches']:>8.2f}"
        lines.append(f"{name:<{width}} {scores['n']:>6}  {_scores_text(scores)} {rates}")
    if len(results["by_dataset"]) > 1:
        lines.append(f"{'mean of datasets':<{width}} {'':>6}  {_scores_text(results['macro_average'])}")
    return "\n".join(lines)


def _scores_text(scores: Results) -> str:
    em, f1_score = (
        f"{scores[name]['mean']:.3f} [{scores[name]['low']:.3f}, {scores[name]['high']:.3f}]" for name in ("em", "f1")
    )
    return f"{em:<20} {f1_score:<20} {scores['cover_em']['mean']:>8.3f}"


def matrix_table(evaluations: Mapping[str, Results]) -> str:
    """Return several evaluations as a short table: a line each, over all its questions."""
    width = max(10, *map(len, evaluations))
    scores_head = f"{'EM [95 %]':<20} {'F1 [95 %]':<20} {'cover-EM':>8}"
    lines = [f"{'evaluation':<{width}}  {'n':>6}  {scores_head} {'answered':>8} {'searches':>8} {'turns':>6}"]
    for name, results in evaluations.items():
        rates = f"{results['answer_rate']:>8.3f} {results['searches']:>8.2f} {results['turns']:>6.2f}"
        lines.append(f"{name:<{width}}  {results['n']:>6}  {_scores_text(results)} {rates}")
    return "\n".join(lines)


def markdown_tables(evaluations: Mapping[str, Results]) -> str:
    """Return evaluations by name as Markdown: EM in percent in the shape of the paper's Table 3, then all the rest.

    A cell is "mean [low, high]", a 95 % interval; the average is the plain mean of the datasets, as in the paper.
    """
    columns = dataset_columns(evaluations)
    titles = [BENCHMARKS[name].title if name in BENCHMARKS else name for name in columns]
    table = [["method", *titles, *([AVERAGE] if len(columns) > 1 else [])]]
    for name, results in evaluations.items():
        cells = [_percent(results["by_dataset"].get(column, {}).get("em")) for column in columns]
        table.append([name, *cells, *([_percent(results["macro_average"]["em"])] if len(columns) > 1 else [])])
    rest = [["method", "n", "EM", "cover-EM", "F1", "answered", "searches", "turns"]]
    for name, results in evaluations.items():
        scores = [_percent(results[metric]) for metric in ("em", "cover_em", "f1")]
        rates = [f"{100 * results['answer_rate']:.1f}", f"{results['searches']:.2f}", f"{results['turns']:.2f}"]
        rest.append([name, str(results["n"]), *scores, *rates])
    parts = [
        "Exact match by dataset, percent [95 % interval over questions].",
        _markdown(table),
        "All questions together. Cover-EM is what the paper's code calls EM; answered in percent, searches and turns "
        "a trajectory.",
        _markdown(rest),
        *(f"{name}: {results['stopped']}." for name, results in evaluations.items() if results.get("stopped")),
    ]
    passes = {name: results["pass_at_k"] for name, results in evaluations.items() if "pass_at_k" in results}
    if passes:
        ks = sorted({k for scores in passes.values() for k in scores}, key=int)
        head = [["method", *(f"pass@{k}" for k in ks)]]
        lines = [[name, *(_percent(scores.get(k)) for k in ks)] for name, scores in passes.items()]
        parts += ["At least one of k samples an exact match.", _markdown(head + lines)]
    return "\n\n".join(parts) + "\n"


def dataset_columns(evaluations: Mapping[str, Results]) -> list[str]:
    """Return the datasets of all evaluations: the paper's in its order, then others as they come."""
    found = dict.fromkeys(name for results in evaluations.values() for name in results["by_dataset"])
    return [name for name in BENCHMARKS if name in found] + [name for name in found if name not in BENCHMARKS]


def scores_plot(evaluations: Mapping[str, Results]) -> str:
    """Draw the EM of each evaluation, the mean of its datasets, with its interval; return an SVG file's text."""
    label_width = max(len(name) for name in evaluations) * LETTER_WIDTH + 2 * MARGIN
    width = label_width + PLOT_WIDTH + VALUE_WIDTH
    first_row = MARGIN + ROW_HEIGHT
    bottom = first_row + ROW_HEIGHT * len(evaluations)
    height = bottom + ROW_HEIGHT + MARGIN
    highest = max(results["macro_average"]["em"]["high"] for results in evaluations.values())
    top = next(limit for limit in (0.1, 0.2, 0.5, 1.0) if highest <= limit + 1e-9)

    def x(score: float) -> float:
        return label_width + PLOT_WIDTH * score / top

    marks = [
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="{label_width}" y="{MARGIN + 10}" fill="#555">{PLOT_TITLE}</text>',
    ]
    for tick in range(6):
        place, label = x(top * tick / 5), f"{100 * top * tick / 5:g}"
        marks.append(f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{first_row}" y2="{bottom}" stroke="#ddd"/>')
        marks.append(f'<text x="{place:.1f}" y="{bottom + 18}" text-anchor="middle" fill="#555">{label}</text>')
    for row, (name, results) in enumerate(evaluations.items()):
        em, y = results["macro_average"]["em"], first_row + ROW_HEIGHT * (row + 0.5)
        marks += [
            f'<text x="{label_width - MARGIN}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>',
            f'<line x1="{x(em["low"]):.1f}" x2="{x(em["high"]):.1f}" y1="{y:.1f}" y2="{y:.1f}" '
            'stroke="#2563a8" stroke-width="3"/>',
            f'<circle cx="{x(em["mean"]):.1f}" cy="{y:.1f}" r="5" fill="#2563a8">'
            f"<title>{escape(name)}: {_percent(em)}</title></circle>",
            f'<text x="{label_width + PLOT_WIDTH + MARGIN}" y="{y + 4:.1f}">{_percent(em)}</text>',
        ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="system-ui, sans-serif" font-size="13">\n'
        f"<title>{PLOT_TITLE}</title>\n" + "\n".join(marks) + "\n</svg>\n"
    )


def comparison_table(differences: Results) -> str:
    """Return a paired comparison as a table, a line a dataset, then all: how much better the second run is."""
    width = max(18, *map(len, differences["by_dataset"]))
    heads = f"{'EM difference [95 %]':<24} {'F1 difference [95 %]':<24}"
    lines = [f"{'dataset':<{width}} {'n':>6}  {heads} {'better':>6} {'worse':>6} {'same':>6}"]
    rows = [*differences["by_dataset"].items(), ("all questions", differences)]
    for name, scores in rows:
        won = f"{scores['better']:>6} {scores['worse']:>6} {scores['same']:>6}"
        lines.append(
            f"{name:<{width}} {scores['n']:>6}  {_signed(scores['em']):<24} {_signed(scores['f1']):<24} {won}"
        )
    if len(differences["by_dataset"]) > 1:
        macro = differences["macro_average"]
        lines.append(f"{'mean of datasets':<{width}} {'':>6}  {_signed(macro['em']):<24} {_signed(macro['f1'])}")
    return "\n".join(lines)


def _signed(score: Mapping[str, float]) -> str:
    return f"{score['mean']:+.3f} [{score['low']:+.3f}, {score['high']:+.3f}]"


def _percent(score: Mapping[str, float] | None) -> str:
    if score is None:
        return "-"
    mean, low, high = (100 * score[name] for name in ("mean", "low", "high"))
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def _markdown(table: Sequence[Sequence[str]]) -> str:
    head, *lines = (f"| {' | '.join(row)} |" for row in table)
    return "\n".join([head, f"|---{'|---:' * (len(table[0]) - 1)}|", *lines])
