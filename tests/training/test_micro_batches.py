"""What is forwarded and what is left out."""

from __future__ import annotations

import torch

from zerosearch.training.micro_batches import trimmed_parts

# Prompts of up to 3 tokens on the left, completions of up to 4 on the right.
ATTENTION = torch.tensor(
    [
        [0, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 1, 1, 0],
    ]
)
SCORED = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]])


def parts_of(batch_size: int | None) -> list[tuple[list[int], int, int]]:
    return [(part.rows.tolist(), part.start, part.end) for part in trimmed_parts(ATTENTION, SCORED, batch_size)]


def test_a_part_ends_at_its_last_scored_token_and_starts_at_its_first_token() -> None:
    # By length: rows 2 (3 tokens, none scored), 1 (4), 3 (5), 0 (6).
    assert parts_of(2) == [([1], 0, 4), ([3, 0], 1, 6)]
    assert parts_of(None) == [([1, 3, 0], 0, 6)]


def test_a_part_without_a_scored_token_keeps_one_row_of_two_tokens() -> None:
    assert parts_of(1) == [([2], 2, 4), ([1], 0, 4), ([3], 1, 5), ([0], 1, 6)]
