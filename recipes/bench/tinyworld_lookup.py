"""Can a TinyWorld policy tell subjects apart? How often it quotes the right fact of five BM25 documents.

    python recipes/bench/tinyworld_lookup.py --model data/tinyworld/policy

The policy is shown a search for a fact of the evaluation world, with the documents BM25 returns for it, and continues
"<think> Clara Voss hails from" greedily. It is right if it goes on with the fact's object. Counted by how many of the
other four documents state the same relation about somebody else. A last row leaves the fact out: right is to say
"unknown".
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from zerosearch.command_line import exit_on_user_error, parse
from zerosearch.engines.bm25 import BM25Engine
from zerosearch.errors import UserError
from zerosearch.files import claim_output_dir, write_json, write_jsonl
from zerosearch.generation.loading import load_tokenizer
from zerosearch.prompts import TINYWORLD
from zerosearch.protocol import format_observation
from zerosearch.tinyworld.world import RELATION, Fact, World

BATCH_SIZE = 50


@dataclass
class BenchArguments:
    """Which policy, and how many facts."""

    model: str = "data/tinyworld/policy"
    n_facts: int = 1000
    output: str = "outputs/bench/tinyworld_lookup.json"


def context(fact: Fact, documents: list[str]) -> str:
    """Return a trajectory up to the point where the fact's object has to be quoted."""
    question = TINYWORLD.policy.prompt(RELATION[fact.relation].question.format(fact.subject))
    search = f"<think> Look up {fact.subject}. </think> <search> {fact.query} </search>"
    return f"{question}{search}{format_observation(documents)}<think> {fact.query}"


def distractors(fact: Fact, documents: list[str]) -> int:
    """Count the documents that state the relation of `fact` about another subject."""
    words = RELATION[fact.relation].statement.removeprefix("{}")
    return sum(words in document and not document.startswith(fact.subject) for document in documents)


@torch.no_grad()
def continuations(model: AutoModelForCausalLM, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[str]:
    """Continue each text greedily by six tokens."""
    found = []
    for start in tqdm(range(0, len(texts), BATCH_SIZE)):
        batch = tokenizer(texts[start : start + BATCH_SIZE], padding=True, return_tensors="pt")
        output = model.generate(**batch, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        found += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :])
    return found


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Search for facts of the evaluation world, have the policy quote them, count, write, print."""
    (arguments,) = parse(BenchArguments, argv=argv)
    output = Path(arguments.output)
    claim_output_dir(output.parent, overwrite=True)
    world = World.draw(0, 400, held_out=True)
    if not 1 <= arguments.n_facts <= len(world.facts):
        raise UserError(f"n_facts is {arguments.n_facts}: choose 1 to {len(world.facts)}, all that the world has")
    tokenizer = load_tokenizer(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    with TemporaryDirectory() as directory:
        corpus = Path(directory) / "corpus.jsonl"
        write_jsonl(corpus, world.passages())
        engine = BM25Engine(corpus, num_documents=6)

    cases = defaultdict(list)  # row -> (text, what is right)
    for fact in random.Random(0).sample(world.facts, arguments.n_facts):
        documents = list(engine.lookup(fact.query))
        others = [document for document in documents if document != fact.sentence]
        shown = documents[:5]
        if fact.sentence in shown:
            row = f"{distractors(fact, shown)} of the same relation"
            cases[row].append((context(fact, shown), f" {fact.object}."))
        cases["fact left out"].append((context(fact, others[:5]), " unknown."))
    rows = []
    for row in sorted(cases):
        found = continuations(model, tokenizer, [text for text, _ in cases[row]])
        right = sum(text.startswith(expected) for text, (_, expected) in zip(found, cases[row], strict=True))
        rows.append({"documents": row, "n": len(found), "right": right / len(found)})
        print(f"{row:<24} {len(found):>5} cases  right {right / len(found):.3f}")
    write_json(output, {"model": arguments.model, "rows": rows})


if __name__ == "__main__":
    main()
