"""How the texts that a model writes begin: plain documents of many kinds, and conversations with both sides written.

A model left alone writes what it was last trained on, and an instruct model then writes instructions only. Openings of many
kinds and subjects bring out the rest of what it has read (LLM-QAT, arXiv:2305.17888, section 3.1, starts each text with a
random token of the vocabulary for the same reason). A conversation needs no opening: given the template up to the place
of the user's words, an instruct model writes these as well (Xu et al. 2024, Magpie, arXiv:2406.08464).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from random import Random
from typing import Any

from sparsify.data.self_generated.sample import Script, Segment

DOCUMENT_MARK = (
    "<|endoftext|>"  # what separates documents in pretraining where the tokenizer's own marks became those of turns
)
WORDS = ("USERSAYSTHIS", "ASSISTANTSAYSTHAT", "USERGOESON")  # stand for the turns while the template is taken apart
FOLLOW_UPS = 0.5  # probability that a conversation goes on with another question

KINDS = (
    # encyclopedia and reference
    "= {topic} =\n\n",
    "== {topic} ==\n",
    "# {topic}\n\n",
    "{topic}\n\nFrom the encyclopedia, the article on",
    "{topic} is",
    "{topic} was",
    "The history of {topic}",
    "In {year},",
    "Born in {year},",
    "{topic} ({year}",
    "The article describes {topic},",
    # news, magazines
    "{place}, {year} -",
    "Review: {topic}\n",
    "Interview about {topic}\n\nQ:",
    "The team played its first match of the {year} season",
    "The film, released in {year},",
    "The album was recorded in {year}",
    # stories, letters, talk
    "Chapter {number}\n\n",
    "It was a day in {year} when",
    '"',
    "Dear",
    "I",
    # science, law, medicine, economy
    "Abstract\n\n",
    "1. Introduction\n\n",
    "The {year} study of {topic}",
    "Patients with",
    "Section {number}.",
    "The market for {topic}",
    # teaching, instructions
    "How to",
    "What is {topic}?\n\n",
    "Question: ",
    "Exercise {number}.",
    "Ingredients:\n",
    "Lesson {number}: {topic}\n",
    # code, data, forums
    "import ",
    "#include <",
    "def ",
    "<html>",
    "{{\n",
    "| {topic} |",
    "Re: {topic}\n\n",
    "- ",
)

TOPICS = (
    "Agriculture", "Algebra", "Ancient Rome", "Animals", "Architecture", "Astronomy", "Baseball", "Birds", "Bridges",
    "Buddhism", "Calculus", "Castles", "Chemistry", "Chess", "Child care", "China", "Cinema", "Climate", "Coins", "Comics",
    "Computers", "Cooking", "Cricket", "Dance", "Democracy", "Diseases", "Dogs", "Earthquakes", "Economics", "Education",
    "Elections", "Electricity", "Engines", "Ethics", "Evolution", "Farming", "Fashion", "Fish", "Flags", "Flowers",
    "Football", "Forests", "France", "Games", "Gardens", "Genetics", "Geology", "Geometry", "Grammar", "Health",
    "Highways", "History", "Horses", "Hurricanes", "India", "Industry", "Insects", "Insurance", "Islands", "Japan",
    "Journalism", "Kings and queens", "Languages", "Law", "Libraries", "Literature", "Logic", "Machines", "Magic",
    "Mammals", "Maps", "Marriage", "Mathematics", "Medicine", "Metals", "Mexico", "Money", "Mountains", "Museums", "Music",
    "Mythology", "Novels", "Nutrition", "Oceans", "Opera", "Painting", "Philosophy", "Physics", "Planets", "Plants",
    "Poetry", "Politics", "Psychology", "Radio", "Railways", "Religion", "Reptiles", "Rivers", "Robots", "Sailing",
    "Schools", "Sculpture", "Ships", "Singers", "Snow", "Software", "Soldiers", "Space flight", "Sports", "Statistics",
    "Steel", "Swimming", "Taxes", "Television", "Tennis", "The Atlantic", "The Middle Ages", "The army", "The brain",
    "The city", "The internet", "The moon", "The railway station", "The theatre", "The war", "Trade", "Trees", "Universities",
    "Video games", "Villages", "Volcanoes", "Water", "Weather", "Whales", "Wine", "Writers",
)  # fmt: skip

PLACES = (
    "LONDON", "New York", "Paris", "BERLIN", "Tokyo", "Sydney", "Nairobi", "Washington", "Madrid", "Moscow", "Delhi", "Rome",
)  # fmt: skip


def opening_text(random: Random) -> str:
    """The first words of a document of a random kind on a random subject."""
    return _one(random, KINDS).format(
        topic=_one(random, TOPICS),
        place=_one(random, PLACES),
        year=1700 + int(random.random() * 325),
        number=1 + int(random.random() * 20),
    )


def _one(random: Random, choices: tuple[str, ...]) -> str:
    """`random.choice` may draw differently in another Python; random() never does."""
    return choices[int(random.random() * len(choices))]


@dataclass(frozen=True)
class Turns:
    """A chat template taken apart: what stands before a first question, before an answer, before a further question."""

    first: tuple[int, ...]
    answer: tuple[int, ...]
    further: tuple[int, ...]

    @property
    def endings(self) -> set[int]:
        """The tokens that end a turn."""
        return {self.answer[0], self.further[0]}


def chat_turns(tokenizer: Any) -> Turns | None:
    """The turns of a tokenizer's chat template; None without one, or where a turn is not ended by a special token, since
    then the end of what the model writes cannot be told from its words."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [
        {"role": role, "content": words} for role, words in zip(("user", "assistant", "user"), WORDS, strict=True)
    ]
    try:
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    except Exception:  # templates are programs that come with the model and raise what they like
        return None
    question, answer, more = WORDS
    if any(words not in whole for words in WORDS) or question not in asked:
        return None
    parts = [
        whole.partition(question)[0],
        asked.partition(question)[2],
        whole.partition(answer)[2].partition(more)[0],
    ]
    first, before_answer, further = (
        tuple(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]) for part in parts
    )
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    if not first or not {*before_answer[:1], *further[:1]} <= special or not before_answer or not further:
        return None
    return Turns(first, before_answer, further)


def document_mark(tokenizer: Any, turns: Turns | None) -> int | None:
    """The token that opens a plain document. Models without one of their own (GPT-2, Qwen) open with the one that ends
    documents; where instruct tuning made both into marks of turns (SmolLM2, Qwen), pretraining's is still in the vocabulary."""
    marks = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
    taken = set() if turns is None else {*turns.answer, *turns.further}
    if free := [token for token in marks if token not in taken]:
        return free[0]
    return tokenizer.get_vocab().get(DOCUMENT_MARK, marks[0] if marks else None)


def documents_script(tokenizer: Any, mark: int | None, vocabulary: int, opened: float, random: Random) -> Script:
    """Plain documents, one after another. opened: the share of them that begin with given words, drawn per document."""
    while True:
        text = opening_text(random) if random.random() < opened else ""
        words = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else ()
        start = (mark,) if mark is not None else () if words else (int(random.random() * vocabulary),)
        yield Segment((*start, *words), varied=True)


def chat_script(turns: Turns, random: Random) -> Script:
    """Conversations, one after another; the model writes both sides, the questions with varied beginnings."""
    while True:
        yield Segment(turns.first, varied=True)
        yield Segment(turns.answer)
        while random.random() < FOLLOW_UPS:
            yield Segment(turns.further, varied=True)
            yield Segment(turns.answer)


def endings_of(tokenizer: Any, model: Any, mark: int | None, turns: Turns | None) -> Collection[int]:
    """The tokens after which a document or a turn is over."""
    declared = getattr(model.generation_config, "eos_token_id", None) if model.can_generate() else None
    several = declared if isinstance(declared, list) else [declared]
    marks = {tokenizer.eos_token_id, mark, *several} | (turns.endings if turns is not None else set())
    return {token for token in marks if token is not None}
