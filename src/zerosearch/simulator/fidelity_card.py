"""The fidelity card for readers: Markdown tables beside the JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zerosearch.files import write_json, write_text
from zerosearch.simulator.held_out import WHY_LEFT_OUT

Card = Mapping[str, Any]

RATES = (
    ("useful_answer_rate", "useful replies that answer the query"),
    ("noisy_leak_rate", "noisy replies that leak the answer"),
    ("answer_rate", "searches that answer the query"),
    ("max_noise_error", "largest difference of realised and requested noise"),
)
SUFFIXES = (
    ("", ""),
    ("_where_the_answer_is_asked", ", where the query asks for the question's answer"),
    ("_where_another_fact_is_asked", ", where it asks for another fact"),
)


def write_card(card: Card, prefix: Path) -> list[Path]:
    """Write `prefix`.json and `prefix`.md; return the paths."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    paths = [prefix.with_name(f"{prefix.name}{suffix}") for suffix in (".json", ".md")]
    write_json(paths[0], card)
    write_text(paths[1], f"# Fidelity\n\n{card_markdown(card)}\n")
    return paths


def card_markdown(card: Card) -> str:
    """Return the card as Markdown, without a heading, so that it fits into a model card."""
    kind = "a document that states the fact the query asks for" if card["rule"] == "statement" else "an answer in it"
    left_out = [f"{count} ({WHY_LEFT_OUT[why]})" for why, count in card["left_out"].items() if count]
    said = f" Left out of the rates: {', '.join(left_out)}." if left_out else ""
    lines = [
        f"{card['queries']:,} held-out queries; {card['decidable']:,} of them can tell by rule whether documents "
        f"answer them ({kind}).{said} In brackets: 95 % bootstrap intervals over queries.",
        "",
        "| | |",
        "|---|---|",
    ]
    for name, words in RATES:
        for suffix, where in SUFFIXES:
            if f"{name}{suffix}" in card:
                lines.append(f"| {words}{where} | {_shown(card, name + suffix)} |")
    if "format" in card:
        form = card["format"]
        lines += [
            f'| replies that are "Doc 1: ..." to the last and nothing else | {_shown(form, "valid_format_rate")} |',
            f"| replies with too few documents, asked for again | {_shown(form, 'short_reply_rate')} |",
            f"| searches that got no documents | {form['failed_searches']:,} |",
        ]
    if "noise" in card:
        lines += [
            "",
            "Realised noise: the share of searches whose documents do not answer the query, where a reply is noisy "
            "with the requested probability.",
            "",
            "| requested | realised |",
            "|---|---|",
            *(f"| {point['requested']:.2f} | {_shown(point, 'realised')} |" for point in card["noise"]),
        ]
    lines += ["", "| mean of | documents a reply | words a document |", "|---|---|---|"]
    for name, part in card["documents"].items():
        words = _shown(part, "words", digits=2) if "words" in part else ""
        lines.append(f"| {name} | {_shown(part, 'documents', digits=2)} | {words} |")
    return "\n".join(lines)


def _shown(part: Mapping[str, Any], name: str, digits: int = 3) -> str:
    interval = part.get(f"{name}_interval")
    bounds = f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else ""
    return f"{part[name]:.{digits}f}{bounds}"
