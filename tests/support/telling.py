"""How a story is told: a text of steps, some of which are left to chance.

A word is a step, see `tests.support.operations`; its numbers are read by `Values`. There is more:

    v=2w%c                      a number is named, for later steps
    0.5{ STEP... }              done in so many of all cases
    1..3*{ STEP... }            done so many times
    one{ STEP... | STEP... }    one of these is done
"""

from __future__ import annotations

import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from random import Random
from typing import NamedTuple

from jqcow.testing import EVERYTHING, SECTOR_BYTES
from tests.support.operations import Step

_TERM = re.compile(r"([+-]?)(?:(\d+)\.\.)?(\d*)([a-z]?)(?:/(\d+))?(?:%([cs]))?")


class Values(dict[str, int]):
    """Reads the numbers of stories. A number is a sum of terms, such as ``2w+w/2-s``.

    ``c``, ``w`` and ``s`` are the bytes of a cluster, a window and a sector; a story may name more numbers.
    ``1..4`` is a random number from 1 to 4, ``2w%c`` a random multiple of a cluster below two windows,
    ``0|512|all`` one of these; ``all`` is `EVERYTHING`.
    """

    def __init__(self, cluster_bytes: int, window_bytes: int, random: Random) -> None:
        super().__init__({"c": cluster_bytes, "w": window_bytes, "s": SECTOR_BYTES, "": 1})
        self.random = random

    def choose(self, text: str) -> str:
        """Return one of the words of a text."""
        words = text.split("|")
        return self.random.choice(words) if len(words) > 1 else text

    def argument(self, text: str) -> int | str:
        """Return what a step takes: the value of a text, or its word if that is more than a letter."""
        word = self.choose(text)
        return word if len(word) > 1 and word.isalpha() else self.read(word)

    def read(self, text: str) -> int:
        """Return the value of a text. Raises ``ValueError`` for what is none."""
        total, position, text = 0, 0, self.choose(text)
        if text == "all":
            return EVERYTHING
        while position < len(text):
            term = _TERM.match(text, position)
            if term is None or not term[0]:
                raise ValueError(f"not a number: {text}")
            total += -self._term(term) if term[1] == "-" else self._term(term)
            position = term.end()
        return total

    def _term(self, term: re.Match[str]) -> int:
        _, low, count, unit, divisor, step = term.groups()
        number = self.random.randint(int(low), int(count)) if low else int(count or 1)
        value = number * self[unit] // int(divisor or 1)
        return self.random.randrange(value // self[step]) * self[step] if step else value


class Block(NamedTuple):
    """Words in braces: what stands before them, and each of their alternatives."""

    head: str
    choices: tuple[Words, ...]


Words = tuple[str | Block, ...]


@functools.cache
def words_of(text: str) -> Words:
    """Return the words of a text. Raises ``ValueError`` if a block has no end."""
    (words,) = _alternatives(iter([*text.split(), "}"]))
    return words


def _alternatives(words: Iterator[str]) -> tuple[Words, ...]:
    found: list[list[str | Block]] = [[]]
    for word in words:
        if word == "}":
            return tuple(map(tuple, found))
        if word == "|":
            found.append([])
        else:
            found[-1].append(Block(word[:-1], _alternatives(words)) if word.endswith("{") else word)
    raise ValueError("a block has no end")


class Teller(ABC):
    """Tells stories. `perform` says what becomes of a step."""

    def __init__(self, cluster_bytes: int, window_bytes: int, random: Random) -> None:
        """Take the sizes that numbers are made of, and what chance decides by."""
        self.random = random
        self.values = Values(cluster_bytes, window_bytes, random)

    def play(self, text: str) -> None:
        """Tell a story."""
        self.tell(words_of(text))

    def tell(self, words: Words) -> None:
        """Tell all of these words."""
        for word in words:
            if isinstance(word, Block):
                self.tell_block(word)
                continue
            name, is_named, number = word.partition("=")
            if is_named:
                self.values[name] = self.values.read(number)
            else:
                kind, *arguments = word.split(":")
                self.perform(Step(kind, tuple(map(self.values.argument, arguments))))

    def tell_block(self, block: Block) -> None:
        """Tell what a block asks for."""
        if block.head == "one":
            self.tell(self.random.choice(block.choices))
        elif block.head.endswith("*"):
            for _ in range(self.values.read(block.head[:-1])):
                self.tell(block.choices[0])
        elif self.random.random() < float(self.values.choose(block.head)):
            self.tell(block.choices[0])

    @abstractmethod
    def perform(self, step: Step) -> None:
        """Take a step."""
