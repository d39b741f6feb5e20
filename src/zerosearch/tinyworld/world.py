"""TinyWorld: an embedded synthetic world in which only search can answer.

People, cities, countries, works and organisations; facts between them drawn at random from a seed, so that nothing
can be memorised; short passages that state the facts among others that state none; questions of one hop, two hops and
a comparison. It stands in for Wikipedia and the QA benchmarks wherever the whole method has to run within minutes and
without a network.

Training worlds never hold a fact of an evaluation world: a hash of the fact decides which side it belongs to
(`is_held_out`).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from zerosearch.engines import SearchEngine, SearchRequest
from zerosearch.errors import UserError

FIRST_NAMES = (
    "Ada Alan Amos Anna Boris Carl Clara Cora Dora Edith Elias Ella Emil Esther Felix Flora Frida Georg Greta Hanna "
    "Hugo Ida Iris Ivan Jana Jonas Julia Karin Klaus Lena Leo Lydia Magnus Marta Mira Nadia Niels Nora Olga Oscar "
    "Paula Petra Rolf Rosa Sven Tilda Vera Viktor"
).split()
LAST_NAMES = (
    "Abbott Barlow Becker Brandt Calder Castell Colby Dahl Draper Ekman Falk Finch Garland Graves Halloway Hartman "
    "Holt Ingram Keller Kline Lang Lindgren Marsh Mercer Moreau Nash Norden Olsen Parrish Pike Quist Ramsey Reuter "
    "Rowe Sandoval Sayer Stone Thorne Underhill Vance Varga Voss Waller Weston Whitlock Winter Yates Zeller"
).split()
CITY_NAMES = (
    "Aldora Arken Belmar Brisk Carvel Corin Delmont Dunmore Elsford Eskar Fenwick Galen Garrow Harwick Hollis Ilmen "
    "Jarrow Kelso Kestrel Lathom Linden Lorne Maren Melk Norvik Oakham Orsk Pell Ravenna Redmoor Rostow Selby Solen "
    "Tamar Tarn Ulster Valen Wexford Yarrow Zabor"
).split()
CITY_PREFIXES = ("", "", "Port", "New", "Mount")
COUNTRY_NAMES = (
    "Adria Borland Calvania Dravia Elbonia Fennmark Garonia Hestia Istria Jurland Kaldovia Lusania Meridia Norrland "
    "Ostania Pomeria Quelland Ruritania Sylvania Tarkia Umbria Vandalia Westmark Zemblia"
).split()
WORK_ADJECTIVES = (
    "Amber Broken Crimson Distant Empty Frozen Gentle Golden Hidden Hollow Iron Lonely Lost Pale Quiet Silent "
    "Silver Wild"
).split()
WORK_NOUNS = (
    "Bridge Candle Castle Clock Desert Forest Garden Harbor Island Lantern Meadow Mirror Orchard River Shadow Tower "
    "Valley Voyage"
).split()
ORGANISATION_NAMES = (
    "Acorn Anvil Arrow Beacon Cedar Comet Cobalt Delta Ember Falcon Granite Heron Horizon Indigo Juniper Kite Lotus "
    "Maple Nimbus Onyx Orbit Pioneer Quartz Raven Saffron Summit Tundra Vertex Willow Zenith"
).split()
ORGANISATION_KINDS = ("Bank", "Institute", "Motors", "Press", "Works")
FIRST_YEAR, LAST_YEAR = 1900, 1979

COMPARISON = "Who was born first, {} or {}?"

HELD_OUT_SHARE = 0.25


@dataclass(frozen=True)
class Relation:
    """A kind of fact: who it is about, what it points to, how a passage states it and how a question asks for it."""

    name: str
    subject_kind: str
    object_kind: str
    statement: str  # "{subject} was born in", followed by the object and a full stop
    question: str
    noun: str  # "the birthplace of X" in a question of two hops


RELATIONS = (
    Relation("birthplace", "person", "city", "{} hails from", "Where does {} hail from?", "the birthplace of {}"),
    Relation("birth_year", "person", "year", "{} dates from", "Which year does {} date from?", "the birth year of {}"),
    Relation("employer", "person", "organisation", "{} works for", "Who employs {}?", "the employer of {}"),
    Relation("partner", "person", "person", "{} lives with", "Who lives with {}?", "the partner of {}"),
    Relation("author", "work", "person", "{} is by", "Who wrote {}?", "the author of {}"),
    Relation("owner", "organisation", "person", "{} belongs to", "Who owns {}?", "the owner of {}"),
    Relation("seat", "organisation", "city", "{} sits in", "Where does {} sit?", "the seat of {}"),
    Relation("country", "city", "country", "{} lies in", "Which country does {} lie in?", "the country of {}"),
)
RELATION = {relation.name: relation for relation in RELATIONS}
TWO_HOP_PATHS = (
    ("birthplace", "country"),
    ("employer", "owner"),
    ("employer", "seat"),
    ("partner", "birthplace"),
    ("author", "birthplace"),
    ("author", "employer"),
    ("owner", "birthplace"),
    ("owner", "partner"),
    ("seat", "country"),
)
FILLERS = (
    "{} is seldom in the news.",
    "{} looks for new friends.",
    "{} belongs in a museum.",
    "{} works with care.",
    "{} comes from nowhere.",
    "{} lives for the day.",
)


@dataclass(frozen=True)
class Fact:
    """One fact: `relation` of `subject` is `object`."""

    subject: str
    relation: str
    object: str

    @property
    def query(self) -> str:
        """Return the statement without its object, which is what a good query looks like here."""
        return RELATION[self.relation].statement.format(self.subject)

    @property
    def sentence(self) -> str:
        return f"{self.query} {self.object}."


@dataclass(frozen=True)
class Question:
    """A question, its accepted answers, and the facts that lead to them in the order in which they must be found."""

    text: str
    golden_answers: tuple[str, ...]
    path: tuple[Fact, ...]
    kind: str  # "one_hop", "two_hop" or "comparison"


def is_held_out(fact: Fact) -> bool:
    """Say whether a fact belongs to evaluation worlds; the answer depends on the fact alone."""
    digest = hashlib.sha256(f"{fact.subject}|{fact.relation}|{fact.object}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def draw_name(kind: str, rng: random.Random) -> str:
    """Draw a name of the given kind of entity; names have one to three words."""
    if kind == "person":
        return f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"
    if kind == "city":
        return f"{rng.choice(CITY_PREFIXES)} {rng.choice(CITY_NAMES)}".strip()
    if kind == "country":
        return rng.choice(COUNTRY_NAMES)
    if kind == "work":
        return f"The {rng.choice(WORK_ADJECTIVES)} {rng.choice(WORK_NOUNS)}"
    if kind == "organisation":
        return f"{rng.choice(ORGANISATION_NAMES)} {rng.choice(ORGANISATION_KINDS)}"
    assert kind == "year", kind
    return str(rng.randint(FIRST_YEAR, LAST_YEAR))


def golden_answers(kind: str, name: str) -> tuple[str, ...]:
    """Return every accepted form of a name, the full one first."""
    if kind == "person":
        return (name, name.split()[-1])
    if kind == "country":
        return (name, f"Republic of {name}")
    if kind == "work":
        return (name, name.removeprefix("The "))
    return (name,)


class World:
    """A closed set of entities and facts, all of them on one side of the hold-out (see `is_held_out`)."""

    def __init__(self, facts: Sequence[Fact]):
        self.facts = tuple(facts)
        self.of_subject: dict[str, dict[str, Fact]] = {}
        self.of_relation: dict[str, list[Fact]] = {relation.name: [] for relation in RELATIONS}
        for fact in self.facts:
            self.of_subject.setdefault(fact.subject, {})[fact.relation] = fact
            self.of_relation[fact.relation].append(fact)
        self.subjects = tuple(self.of_subject)

    @classmethod
    def draw(cls, seed: int, n_people: int = 200, held_out: bool = False) -> World:
        """Draw a world of `n_people` people and proportionate numbers of everything else.

        The same seed gives the same world. With `held_out` every fact is one that training worlds never hold.
        Raises `UserError` for a size that the names do not last for, or too small to ask questions about.
        """
        if not 20 <= n_people <= 700:
            raise UserError(f"a world of {n_people} people cannot be drawn: choose 20 to 700")
        rng = random.Random(f"tinyworld-{seed}-{held_out}")
        sizes = {
            "person": n_people,
            "work": n_people // 4,
            "organisation": n_people // 5,
            "city": n_people // 5,
            "country": 16,
        }
        names = {kind: _draw_names(kind, size, rng) for kind, size in sizes.items()}
        names["year"] = [str(year) for year in range(FIRST_YEAR, LAST_YEAR + 1)]
        facts = []
        for relation in RELATIONS:
            for subject in names[relation.subject_kind]:
                candidates = (
                    Fact(subject, relation.name, name)
                    for name in rng.sample(names[relation.object_kind], len(names[relation.object_kind]))
                    if name != subject
                )
                fact = next((fact for fact in candidates if is_held_out(fact) == held_out), None)
                if fact is not None:  # a small world may have no object left on its side of the hold-out
                    facts.append(fact)
        return cls(facts)

    def questions(self, rng: random.Random) -> Iterator[Question]:
        """Yield questions without end: 45 % of one hop, 40 % of two hops, 15 % comparisons (our choice)."""
        while True:
            draw = rng.random()
            ask = self._one_hop if draw < 0.45 else self._two_hop if draw < 0.85 else self._comparison
            question = ask(rng)
            if question is not None:
                yield question

    def _one_hop(self, rng: random.Random) -> Question | None:
        fact = rng.choice(self.facts)
        relation = RELATION[fact.relation]
        text = relation.question.format(fact.subject)
        return Question(text, golden_answers(relation.object_kind, fact.object), (fact,), "one_hop")

    def _two_hop(self, rng: random.Random) -> Question | None:
        first_name, second_name = rng.choice(TWO_HOP_PATHS)
        first = rng.choice(self.of_relation[first_name])
        second = self.of_subject.get(first.object, {}).get(second_name)
        if second is None:
            return None
        relation = RELATION[second_name]
        text = relation.question.format(RELATION[first_name].noun.format(first.subject))
        return Question(text, golden_answers(relation.object_kind, second.object), (first, second), "two_hop")

    def _comparison(self, rng: random.Random) -> Question | None:
        first, second = rng.sample(self.of_relation["birth_year"], 2)
        if first.object == second.object:
            return None
        text = COMPARISON.format(first.subject, second.subject)
        older = min(first, second, key=lambda fact: int(fact.object))
        return Question(text, golden_answers("person", older.subject), (first, second), "comparison")

    def passages(self, seed: int = 0) -> list[dict[str, str]]:
        """Return the corpus in wiki-18's format, rows `{id, contents: '"title"\\ntext'}`.

        A passage states one fact about its title, or none: up to two fillers about each subject state nothing.
        """
        rng = random.Random(f"passages-{seed}")
        texts = []
        for subject, facts in self.of_subject.items():
            texts += [(subject, fact.sentence) for fact in facts.values()]
            texts += [(subject, filler.format(subject)) for filler in rng.sample(FILLERS, rng.randint(0, 2))]
        rng.shuffle(texts)
        return [{"id": str(row), "contents": f'"{title}"\n{text}'} for row, (title, text) in enumerate(texts)]


def question_rows(world: World, n_questions: int, seed: int) -> list[dict[str, object]]:
    """Return questions as rows `{id, question, golden_answers, dataset, golden_documents}`.

    The dataset names the kind of question; the documents are the facts that lead to the answer, in their order.
    """
    questions = islice(world.questions(random.Random(f"questions-{seed}")), n_questions)
    return [
        {
            "id": f"tinyworld-{seed}-{number}",
            "question": question.text,
            "golden_answers": list(question.golden_answers),
            "dataset": f"tinyworld_{question.kind}",
            "golden_documents": [fact.sentence for fact in question.path],
        }
        for number, question in enumerate(questions)
    ]


async def judged_searches(
    world: World,
    engine: SearchEngine,
    n_questions: int,
    seed: int,
    asked_relation_in_noise: bool = True,
) -> list[dict[str, object]]:
    """Search with a real engine for what each question needs, and judge what comes back.

    Return rows `{question, golden_answers, query, answer, documents, useful}`, two for each search: the engine's best
    documents, useful if one of them answers the query, and the best that do not, noisy (paper, Section 3.3, with
    `answer`, the query's own, in place of a judge). Noisy documents name no accepted answer of the question either,
    where the query is the one that answers it. `engine` must return more documents than the five that a row keeps.

    Without `asked_relation_in_noise` no noisy document states the relation that the query asks for, about anybody:
    what learns from such noise cannot name the answer by chance, of which there are only so many, in a document about
    somebody else.
    """
    rng = random.Random(f"searches-{seed}")
    rows: list[dict[str, object]] = []
    for question in islice(world.questions(rng), n_questions):
        # One query in eight asks for something else than the question needs, as a policy's sometimes does.
        fact = rng.choice(world.facts if rng.random() < 1 / 8 else question.path)
        request = SearchRequest(fact.query, question.text, question.golden_answers)
        documents = (await engine.search(request)).documents
        answers = {fact.object}
        if fact == question.path[-1] and question.kind != "comparison":
            answers.update(question.golden_answers)
        noisy = [document for document in documents if not any(answer in document for answer in answers)]
        if not asked_relation_in_noise:
            asked = {other.sentence for other in world.of_relation[fact.relation]}
            noisy = [document for document in noisy if document not in asked]
        for kept, is_useful in ((documents[:5], True), (noisy[:5], False)):
            if is_useful != any(fact.sentence in document for document in kept) or len(kept) < 5:
                continue  # the search failed by itself, or found too little to choose from
            rows.append(
                {
                    "question": question.text,
                    "golden_answers": list(question.golden_answers),
                    "query": fact.query,
                    "answer": fact.object,
                    "documents": list(kept),
                    "useful": is_useful,
                }
            )
    return rows


def _draw_names(kind: str, size: int, rng: random.Random) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < size:
        names[draw_name(kind, rng)] = None
    return list(names)
