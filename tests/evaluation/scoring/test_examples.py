"""Examples that an evaluation prints: drawn from many directions, never twice, never by their scores."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.evaluation.scoring.examples import Example, draw_examples, example_text

LINES = {
    name: tuple([f"{kind} {line} of {name}" for line in range(count)] for kind in ("source", "reference", "output"))
    for name, count in (("de-en", 5), ("en-de", 1), ("fr-en", 3), ("ja-en", 0))
}


@given(count=st.integers(0, 12), seed=st.integers(0, 2**31))
def test_samples_are_distinct_lines_of_as_many_directions_as_possible(count: int, seed: int) -> None:
    drawn = draw_examples(LINES, count, seed)
    assert len(drawn) == len(set(drawn)) == min(count, 9)
    assert len({example.direction for example in drawn}) == min(count, 3)
    assert drawn == draw_examples(LINES, count, seed)
    for example in drawn:
        line = example.source.split()[1]
        assert example.reference == f"reference {line} of {example.direction}"
        assert example.translation == f"output {line} of {example.direction}"


def test_a_sample_survives_json_and_is_printed_as_it_is() -> None:
    example = Example("de-en", "a [b]c[/b]", "ü\u202e", "x")
    assert Example.from_json(json.loads(json.dumps(example.to_json()))) == example
    text = example_text([example]).plain
    assert text.splitlines() == ["de-en", "  source       a [b]c[/b]", "  reference    ü\u202e", "  translation  x"]
    for broken in ({}, {**example.to_json(), "source": 3}):
        with pytest.raises((KeyError, TypeError)):
            Example.from_json(broken)
