"""What messages are made of."""

from __future__ import annotations

import pytest

from moe_train.errors import did_you_mean, plural, spelt_out


@pytest.mark.parametrize(
    ("word", "choices", "said"),
    [
        ("swich", ["switch", "sam"], "did you mean 'switch'?"),
        ("k", ["top_k", "name"], "did you mean 'top_k'?"),
        ("k", ["name", "kind"], "known: kind, name"),
    ],
)
def test_near_spellings(word: str, choices: list[str], said: str) -> None:
    assert did_you_mean(word, choices) == said


def test_spellings_of_documents() -> None:
    assert [spelt_out("k"), spelt_out("top_k"), spelt_out("name")] == ["top_k", "top_k", "name"]


def test_plurals() -> None:
    assert [plural(n, "sentence") for n in (0, 1, 2, 2000)] == [
        "0 sentences",
        "1 sentence",
        "2 sentences",
        "2,000 sentences",
    ]
