"""The language of stories: words, numbers and blocks, as a teller that writes its steps down reads them."""

from __future__ import annotations

from random import Random

import pytest

from tests.support.operations import Step
from tests.support.telling import Teller


class Scribe(Teller):
    """Writes down what it tells, in clusters of 4096 bytes and windows of eight."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(4096, 8 * 4096, Random(seed))
        self.steps: list[str] = []

    def perform(self, step: Step) -> None:
        self.steps.append(str(step))


def told(text: str, seed: int = 0) -> list[str]:
    scribe = Scribe(seed)
    scribe.play(text)
    return scribe.steps


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("flush write:2w+w/2-s:3s", ["flush", "write:81408:1536"]),
        ("v=c write:v:2v v=s write:v:s", ["write:4096:8192", "write:512:512"]),
        ("2*{ flush 0*{ close } } look", ["flush", "flush", "look"]),
        ("1{ flush } 0{ close }", ["flush"]),
        ("one{ flush } one{ look | look }", ["flush", "look"]),
        ("fail:pwrite:1:EIO:all", ["fail:pwrite:1:EIO:all"]),
    ],
)
def test_what_a_text_tells(text: str, steps: list[str]) -> None:
    assert told(text) == steps


def test_chance_meets_all_that_it_may() -> None:
    text = "write:1..3:c 0.5{ look } one{ flush | 2*{ close } } return:2c%s|7"
    met = {" ".join(told(text, seed)) for seed in range(400)}
    assert {story.split()[0] for story in met} == {f"write:{number}:4096" for number in (1, 2, 3)}
    assert len({story.split()[-1] for story in met}) == 17
    assert any("look" in story for story in met) and not all("look" in story for story in met)
    assert {story.count("close") for story in met} == {0, 2}


@pytest.mark.parametrize("text", ["2*{ flush", "one{ flush | { look }", "write:2x", "never{ flush }"])
def test_what_is_no_story_is_refused(text: str) -> None:
    with pytest.raises((ValueError, KeyError)):
        told(text)
