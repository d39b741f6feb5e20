"""Make TinyWorld's two base checkpoints from nothing; they stand in for what pretraining gives a real model.

    python recipes/tinyworld_base.py        # about 35 minutes on two cores; writes data/tinyworld/{policy,simulator}

Both are Llama models of three layers and 0.6 M parameters. The policy reads lists of facts and careless
demonstrations of the whole method: it can search, read and answer, but often guesses instead, gives up after noise,
or stops half-way; RL has to mend that. The simulator has read search logs with a reader's verdict, useful or noisy,
and has never seen the prompt that asks for one or the other; `recipes/sft_simulator.py` tunes it. Neither has seen a
fact of an evaluation world or a result of the BM25 engine.

Finding one fact among similar ones (same relation, same surname) is the hard part: learned from a plain random start,
attention that looks back at "Clara Voss hails from" and takes what follows appears late and abruptly, if at all. So
two layers start as that circuit (`install_lookup_circuit`), and training refines it within a minute.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch
from torch.utils.data import IterableDataset
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from zerosearch.command_line import exit_on_user_error, parse
from zerosearch.errors import UserError
from zerosearch.prompts import TINYWORLD
from zerosearch.protocol import format_documents, format_observation
from zerosearch.tinyworld.tokenizer import build_tokenizer
from zerosearch.tinyworld.world import FILLERS, RELATION, Fact, Question, World, draw_name

# A text is a list of (piece, whether the model learns to write it).
Text = list[tuple[str, bool]]

# How careless the demonstrations are: the share of occasions on which the demonstrator goes wrong.
# Like a real model it believes it knows some things: questions that end in these relations it mostly just answers.
BELIEVES_IT_KNOWS = ("birthplace", "partner", "country")
GUESSES_WHAT_IT_BELIEVES = 0.75
GUESSES_OTHERWISE = 0.2
GIVES_UP_AFTER_NOISE = 0.7
STOPS_AFTER_FIRST_HOP = 0.4
QUOTES_ANOTHER_FACT = 0.15
MOST_SEARCHES = 4
NOISE_LEVELS = (0.0, 0.3, 0.6)

SHARE_OF_FACT_LISTS = 0.3  # the rest of the policy's texts are demonstrations


@dataclass
class BaseArguments:
    """What to make, and for how many steps of 48 texts to train it."""

    models: list[str] = field(default_factory=lambda: ["policy", "simulator"], metadata={"help": "which of the two"})
    output_dir: str = "data/tinyworld"
    seed: int = 0
    policy_steps: int = 900
    simulator_steps: int = 2400


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return an untrained model whose first two layers look things up.

    A Llama with attention biases, not a Qwen2: for that type AutoTokenizer puts its own tokenizer in place of ours.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,  # of 32, the smallest that vLLM has a CPU kernel for
        num_key_value_heads=4,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        attention_bias=True,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    install_lookup_circuit(model, torch.Generator().manual_seed(seed))
    return model


@torch.no_grad()
def install_lookup_circuit(model: LlamaForCausalLM, generator: torch.Generator) -> None:
    """Start layers 0 and 1 as the circuit that continues a phrase the way an earlier occurrence of it went on.

    Layer 0: head h attends to the token h + 1 places back, whatever it is. The query and key biases do it: rotated by
    RoPE, their product at a distance is sum_f cos(w_f (distance - h - 1)) over the fast frequencies w_f, greatest at
    h + 1. Each head writes a 32-dimensional code of that token into a slot of its own in the residual stream. Layer
    1: the query is made of the slots 1 to 3 places back, the key of the slots 2 to 4 places back, in the dimensions
    that RoPE hardly turns. They agree where the three tokens before are the same: just after an earlier occurrence of
    the phrase. What stands there is copied.
    """
    size = model.config.hidden_size
    num_heads = model.config.num_attention_heads
    head_size = size // num_heads
    frequencies = model.config.rope_parameters["rope_theta"] ** (-torch.arange(0, head_size, 2) / head_size)

    def orthogonal() -> torch.Tensor:  # (hidden, hidden)
        return torch.linalg.qr(torch.randn(size, size, generator=generator))[0]

    model.model.embed_tokens.weight.normal_(0.0, 0.05, generator=generator)
    slots, code = orthogonal(), orthogonal()[:head_size]
    fast = (frequencies > 0.1).float()
    sharpness = (25 * head_size**0.5 / fast.sum()) ** 0.5
    look_back = model.model.layers[0].self_attn
    for head in range(num_heads):
        rows = slice(head * head_size, (head + 1) * head_size)
        turn = frequencies * (head + 1)
        look_back.k_proj.bias[rows] = torch.cat([fast, 0 * fast]) * sharpness
        look_back.q_proj.bias[rows] = torch.cat([turn.cos() * fast, -turn.sin() * fast]) * sharpness
        look_back.q_proj.weight[rows] *= 0.1
        look_back.k_proj.weight[rows] *= 0.1
        look_back.v_proj.weight[rows] = code
        look_back.o_proj.weight[:, rows] = slots[:, rows] * 0.7 / head_size**0.5

    slow = torch.nonzero(frequencies < 0.004).flatten()
    still = torch.cat([slow, slow + head_size // 2])
    copies = orthogonal()
    match = model.model.layers[1].self_attn
    for head in range(num_heads):
        rows = slice(head * head_size, (head + 1) * head_size)
        query, key = torch.zeros(2, head_size, size)
        for distance in range(num_heads - 1):
            mix = torch.randn(len(still), head_size, generator=generator) / len(still) ** 0.5
            query[still] += mix @ slots[:, distance * head_size : (distance + 1) * head_size].T
            key[still] += mix @ slots[:, (distance + 1) * head_size : (distance + 2) * head_size].T
        match.q_proj.weight[rows] = query * 0.6**0.5
        match.k_proj.weight[rows] = key * 0.6**0.5
        match.v_proj.weight[rows] = copies[:, rows].T * 0.3
        match.o_proj.weight[:, rows] = copies[:, rows] * 0.9


def result_page(world: World, fact: Fact, useful: bool, rng: random.Random) -> list[str]:
    """Imagine five documents that a search for `fact` might return: they state it if `useful`, never otherwise.

    The others are the subject's further facts, facts of the same relation about somebody else, often of the same
    name, and sentences that state nothing. The order is random, so that a document's place says nothing.
    """
    words = set(fact.subject.split()) - {"The"}
    own = [other.sentence for other in world.of_subject[fact.subject].values() if other != fact]
    same_relation = [other for other in world.of_relation[fact.relation] if other.subject != fact.subject]
    same_relation = rng.sample(same_relation, min(60, len(same_relation)))
    namesakes = [other.sentence for other in same_relation if words & set(other.subject.split())]
    pool = rng.sample(own, rng.randint(0, len(own)))
    pool += [filler.format(fact.subject) for filler in rng.sample(FILLERS, rng.randint(0, 2))]
    pool += namesakes[: rng.choice([0, 1, 2, 2])]
    pool += [other.sentence for other in same_relation[: rng.randint(0, 3)]]
    while len(set(pool)) < 5:
        other = rng.choice(world.facts)
        if other.subject != fact.subject:
            pool.append(other.sentence)
    pool = list(dict.fromkeys(pool))
    rng.shuffle(pool)
    documents = [document for document in pool if document != fact.sentence][: 4 if useful else 5]
    if useful:
        documents.insert(rng.randint(0, 4), fact.sentence)
    return documents


def fact_list(world: World, rng: random.Random) -> Text:
    """Return documents followed by quotes of some of their facts, and of facts that none of them states."""
    facts = [fact for _ in range(rng.randint(1, 3)) for fact in world.of_subject[rng.choice(world.subjects)].values()]
    of_relation = world.of_relation[rng.choice(list(world.of_relation))]
    facts = list(dict.fromkeys(facts + rng.sample(of_relation, min(4, len(of_relation)))))
    rng.shuffle(facts)
    text: Text = [(format_observation([fact.sentence for fact in facts]), False)]
    for fact in rng.sample(facts, min(8, len(facts))):
        asked = rng.choice(world.facts) if rng.random() < 0.15 else fact
        found = asked.object if asked in facts else "unknown"
        text += [(f"<think> {asked.query}", False), (f" {found}.", True), (" </think>", False)]
    return text


def demonstration(world: World, question: Question, rng: random.Random) -> Text:
    """Return a trajectory of somebody who knows the method and is careless at it."""
    last_relation = RELATION[question.path[-1].relation]
    first_fact = question.path[0]

    def guess() -> str:
        if question.kind == "comparison":
            return rng.choice([fact.subject for fact in question.path])
        return draw_name(last_relation.object_kind, rng)

    text: Text = [(TINYWORLD.policy.prompt(question.text), False)]
    thought = f"<think> Look up {first_fact.subject}. </think>"
    believes = last_relation.name in BELIEVES_IT_KNOWS
    if rng.random() < (GUESSES_WHAT_IT_BELIEVES if believes else GUESSES_OTHERWISE):
        return [*text, (f"{thought} <answer> {guess()} </answer>", True)]
    p_noise = rng.choice(NOISE_LEVELS)
    searches = 0
    for fact in question.path:
        found = False
        while not found:
            found = rng.random() >= p_noise
            documents = result_page(world, fact, found, rng)
            text += [(f"{thought} <search> {fact.query} </search>", True), (format_observation(documents), False)]
            searches += 1
            thought = f"<think> {fact.query} unknown. </think>"
            if not found and (searches == MOST_SEARCHES or rng.random() < GIVES_UP_AFTER_NOISE):
                return [*text, (f"{thought} <answer> {guess()} </answer>", True)]
        shown = [other for other in world.of_relation[fact.relation] if other.sentence in documents]
        quoted = rng.choice(shown) if rng.random() < QUOTES_ANOTHER_FACT else fact
        thought = f"<think> {quoted.sentence} </think>"
        stops = fact is first_fact and len(question.path) > 1 and rng.random() < STOPS_AFTER_FIRST_HOP
        if stops or quoted is not fact:
            answer = guess() if question.kind == "comparison" else quoted.object
            return [*text, (f"{thought} <answer> {answer} </answer>", True)]
    return [*text, (f"{thought} <answer> {question.golden_answers[0]} </answer>", True)]


def policy_texts(rng: random.Random) -> Iterator[Text]:
    """Yield what the policy's base learns from, from a new world every few hundred texts."""
    while True:
        world = World.draw(rng.randrange(10**9), n_people=rng.choice([60, 120, 200]))
        questions = world.questions(rng)
        for _ in range(240):
            yield (
                fact_list(world, rng)
                if rng.random() < SHARE_OF_FACT_LISTS
                else demonstration(world, next(questions), rng)
            )


def simulator_texts(rng: random.Random) -> Iterator[Text]:
    """Yield what the simulator's base learns from: fact lists first, then mostly pages of a search log to be written.

    Most of a page cannot be foreseen. Begun with pages, training unlearns to copy before it has learnt when to.
    """
    for number in count():
        world = World.draw(rng.randrange(10**9), n_people=rng.choice([60, 120, 200]))
        questions = world.questions(rng)
        share_of_fact_lists = 1.0 if number < 50 else 0.15
        for _ in range(240):
            listed = rng.random() < share_of_fact_lists
            yield fact_list(world, rng) if listed else search_log(world, next(questions), rng)


def search_log(world: World, question: Question, rng: random.Random) -> Text:
    """Return a question, a query with the answer looked for, a reader's verdict, and the page the query got.

    A useful page states the fact first, as an engine would rank it; which fact stands where is then no riddle, and
    what is left to learn is whether to state it. A noisy one names no answer, of the query or of the question.
    """
    fact = rng.choice(question.path) if rng.random() < 0.5 else question.path[-1]
    useful = rng.random() < 0.5
    documents = result_page(world, fact, False, rng)
    if useful:
        documents = [fact.sentence, *documents[:4]]
    else:
        answers = {fact.object, *(() if question.kind == "comparison" else question.golden_answers)}
        more = documents + result_page(world, fact, False, rng)
        documents = [document for document in dict.fromkeys(more) if not names_any(document, answers)][:5]
    verdict = "Useful" if useful else "Noisy"
    asked = f'Question: "{question.text}"\nQuery: {fact.query} {question.golden_answers[0]}\n{verdict} Output:\n'
    return [(asked, False), (format_documents(documents), True)]


def names_any(document: str, names: Iterable[str]) -> bool:
    """Say whether a document holds one of the names, as whole words."""
    return any(f" {name} " in f" {document.removesuffix('.')} " for name in names)


class Encoded(IterableDataset):
    """Token ids and labels of texts, -100 where nothing is learnt; a text that the model ends itself gets an EOS."""

    def __init__(self, texts: Iterator[Text], tokenizer: PreTrainedTokenizerFast) -> None:
        self.texts, self.tokenizer = texts, tokenizer

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        for text in self.texts:
            last_is_learned = text[-1][1]
            pieces = [*text, (self.tokenizer.eos_token, True)] if last_is_learned else text
            encoded = [
                (self.tokenizer(piece, add_special_tokens=False).input_ids, learned) for piece, learned in pieces
            ]
            yield {
                "input_ids": [token for ids, _ in encoded for token in ids],
                "labels": [token if learned else -100 for ids, learned in encoded for token in ids],
            }


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: Iterator[Text], steps: int, output_dir: Path
) -> None:
    """Train on the pieces that are the model's to write, and save the model with its tokenizer."""
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=48,
        learning_rate=3e-3,
        warmup_steps=50,
        lr_scheduler_type="linear",
        adam_beta2=0.98,
        weight_decay=0.01,
        save_strategy="no",
        logging_steps=20,
        report_to="none",
    )
    collator = DataCollatorForSeq2Seq(tokenizer)
    Trainer(model, arguments, collator, train_dataset=Encoded(texts, tokenizer)).train()
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


@exit_on_user_error
def main() -> None:
    (arguments,) = parse(BaseArguments)
    tokenizer = build_tokenizer()
    recipes = {
        "policy": (policy_texts, arguments.policy_steps),
        "simulator": (simulator_texts, arguments.simulator_steps),
    }
    if unknown := set(arguments.models) - set(recipes):
        raise UserError(f"--models names {', '.join(unknown)}: choose among {', '.join(recipes)}")
    for name in arguments.models:
        texts, steps = recipes[name]
        torch.manual_seed(arguments.seed)
        model = build_model(tokenizer, arguments.seed)
        print(f"{name}: {model.num_parameters():,} parameters, {steps} steps")
        folder = Path(arguments.output_dir) / name
        train(model, tokenizer, texts(random.Random(f"{name}-{arguments.seed}")), steps, folder)
        print(f"{name}: saved to {folder}")


if __name__ == "__main__":
    main()
