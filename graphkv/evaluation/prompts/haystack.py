"""The running text that prompts are cut from: CPython's documentation, or the user's own, in two splits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...core.errors import ArgumentError
from ...workbench.text import Text, language_reference, read_text

__all__ = ["SPLITS", "Haystack", "prompt_text", "seeds_of", "split_of"]

# Seeds of the prompts. Whatever is tuned is tuned on the first, and reported on the second.
SPLITS = {"tuning": range(10_000), "held-out": range(10_000, 20_000)}
# Of every document, tuning prompts read the first third and held-out prompts the rest, so that they share no text.
TUNING_SHARE = 1 / 3
# Longer paragraphs are cut at line ends, so that there is a place for a needle near every depth.
LONGEST = 400
GOLDEN = 0.6180339887498949


def seeds_of(split: str, first: int, number: int) -> range:
    """Return `number` seeds of a split, beginning with its `first` one."""
    seeds = SPLITS[split][first : first + number]
    if len(seeds) < number:
        raise ArgumentError(
            f"--seed and --prompts must stay within the {len(SPLITS[split])} prompts of a split; got {first}, {number}"
        )
    return seeds


def prompt_text(path: Path | None = None, /) -> Text:
    """Return CPython's language reference or the text of a path, each paragraph once: no prompt repeats one."""
    return (language_reference() if path is None else read_text(path)).distinct()


def split_of(text: Text, split: str, /) -> list[str]:
    """Return the paragraphs of one of the `SPLITS`."""
    result: list[str] = []
    for paragraphs in text.documents:
        border = round(len(paragraphs) * TUNING_SHARE)
        result += paragraphs[:border] if split == "tuning" else paragraphs[border:]
    return result


class Haystack:
    """A text as tokens, to cut pieces of an exact length from.

    Parameters
    ----------
    paragraphs : list of str
    tokenizer : transformers tokenizer

    Attributes
    ----------
    ids : list of int
        All tokens; paragraphs end with an empty line.
    starts : list of int
        Where something may be inserted: the first token of each paragraph or, in a long one, of some lines.
    """

    def __init__(self, paragraphs: list[str], tokenizer: Any) -> None:
        pieces = [piece for paragraph in paragraphs for piece in _pieces(paragraph)]
        self.ids: list[int] = []
        self.starts: list[int] = []
        for ids in tokenizer(pieces, add_special_tokens=False)["input_ids"]:
            self.starts.append(len(self.ids))
            self.ids += ids

    def cut(self, seed: int, num_tokens: int, /) -> tuple[list[int], list[int]]:
        """Cut a piece from somewhere; the end is followed by the beginning.

        Parameters
        ----------
        seed : int
            Decides where. Neighboring seeds are far apart, and many seeds spread evenly.
        num_tokens : int

        Returns
        -------
        ids : list of int
            Exactly `num_tokens`, beginning at a start.
        starts : list of int
            Where something may be inserted, 0 included.

        Raises
        ------
        ArgumentError
            If the text is shorter than that.
        """
        if num_tokens > len(self.ids):
            raise ArgumentError(
                f"--text must have at least {num_tokens} tokens for prompts of this length; this split has "
                f"{len(self.ids)}"
            )
        first = int(seed * GOLDEN % 1 * len(self.starts))
        begin = self.starts[first]
        ids = (self.ids[begin:] + self.ids[:begin])[:num_tokens]
        places = [(start - begin) % len(self.ids) for start in self.starts[first:] + self.starts[:first]]
        return ids, [place for place in places if place < num_tokens]


def _pieces(paragraph: str) -> list[str]:
    """Cut a paragraph at line ends into pieces of about `LONGEST` characters; the last one ends with an empty line."""
    pieces = [""]
    for line in paragraph.split("\n"):
        if len(pieces[-1]) + len(line) > LONGEST and pieces[-1]:
            pieces.append("")
        pieces[-1] += line + "\n"
    pieces[-1] += "\n"
    return pieces
