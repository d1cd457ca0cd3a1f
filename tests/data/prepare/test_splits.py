"""Invariants of splits, of sampling for the vocabulary, and of the hashes behind them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.config.corpus import CorpusConfig, SplitConfig, VocabularyConfig
from moe_train.data.corpora import CorpusText
from moe_train.data.prepare.cleaned import CleanedText
from moe_train.data.prepare.sampling import sample_sentences, shares
from moe_train.data.prepare.splits import Selection, select
from moe_train.data.text.dedup_keys import fold, line_keys, uniform
from moe_train.data.text.lines import write_lines
from moe_train.data.text.pairs import Pair
from moe_train.errors import DataError

WORDS = st.sampled_from([f"{a}{b}" for a in "abcdefgh" for b in "xyz"])
LINES = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=60)


def cleaned(folder: Path, name: str, lines: list[tuple[str, str]]) -> CleanedText:
    pair = Pair.parse(name)
    for language, side in zip(pair, zip(*lines, strict=True), strict=True):
        write_lines(folder / f"{name}.{language}", list(side))
    line_keys(lines, 2).tofile(folder / f"{name}.keys")
    text = CorpusText(pair, None, lambda: iter(lines), ())
    return CleanedText(text, folder / name, Counter(read=len(lines)), len(lines))


@given(first=LINES, second=LINES, third=LINES, seed=st.integers(0, 5), share=st.sampled_from([0.1, 0.3]))
def test_no_held_out_sentence_is_trained_on(
    tmp_path_factory: pytest.TempPathFactory,
    first: list[tuple[str, str]],
    second: list[tuple[str, str]],
    third: list[tuple[str, str]],
    seed: int,
    share: float,
) -> None:
    folder = tmp_path_factory.mktemp("selection")
    lines = {"en-de": first, "fr-en": second, "de-fr": third}
    texts = [cleaned(folder, name, pairs) for name, pairs in lines.items()]
    config = CorpusConfig("text", split=SplitConfig(valid=share / 2, test=share, max_sentences=5))
    try:
        selections = select(texts, {}, {text.sides: ["valid", "test"] for text in texts}, config, seed)
    except DataError as error:
        assert "is empty" in str(error)
        return
    held: dict[str, set[str]] = {"en": set(), "de": set(), "fr": set()}
    for selection in selections:
        for split in ("valid", "test"):
            assert 1 <= selection.held_out[split].sum() <= 5
            assert not (selection.held_out[split] & selection.train).any()
            for language in selection.text.sides:
                held[language] |= set(selection.text.lines(language, selection.held_out[split]))
        assert not (selection.held_out["valid"] & selection.held_out["test"]).any()
    for selection in selections:
        for language in selection.text.sides:
            assert not held[language] & set(selection.text.lines(language, selection.train))
        pairs = list(
            zip(*(selection.text.lines(language, selection.train) for language in selection.text.sides), strict=True)
        )
        assert len(set(pairs)) == len(pairs)


def test_draws_are_uniform_and_depend_on_seed_and_purpose() -> None:
    keys = np.arange(100_000, dtype=np.uint64)
    draws = uniform(keys, 1, "split")
    histogram = np.histogram(draws, bins=20, range=(0, 1))[0]
    chi_square = float(((histogram - 5000) ** 2 / 5000).sum())
    assert chi_square < 45  # 19 degrees of freedom: one in a thousand lies above 43.8
    assert not np.array_equal(draws, uniform(keys, 2, "split"))
    assert not np.array_equal(draws, uniform(keys, 1, "sample"))
    assert np.array_equal(draws[:10], uniform(keys[:10], 1, "split"))


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("Open the door.", "open  the DOOR!", True),
        ("Page 3 of 4", "Page 10 of 12", True),
        ("Straße", "STRASSE", True),
        ("12:30", "12:31", False),
        ("किताब", "कतब", False),
        ("open", "opens", False),
    ],
)
def test_what_counts_as_the_same_sentence(left: str, right: str, same: bool) -> None:
    assert (fold(left) == fold(right)) is same


def test_temperature_moves_shares_towards_equality() -> None:
    sizes = {"de": 1000, "fi": 10}
    assert shares(sizes, 1.0)["fi"] == pytest.approx(10 / 1010)
    assert shares(sizes, 2.0)["fi"] == pytest.approx(1 / 11)
    assert shares(sizes, 1e9)["fi"] == pytest.approx(0.5)


@pytest.mark.parametrize(("budget", "expected"), [(100, 100), (10_000, 2 * 220)])
def test_sampled_sentences_fill_the_budget_in_the_shares(tmp_path: Path, budget: int, expected: int) -> None:
    large = [(f"en {i}", f"de {i}") for i in range(200)]
    small = [(f"en {i}", f"fi {i}") for i in range(20)]
    texts = [cleaned(tmp_path, "en-de", large), cleaned(tmp_path, "en-fi", small)]
    selections = [Selection(text, np.ones(text.size, dtype=bool), {}) for text in texts]
    config = VocabularyConfig(sample_sentences=budget, temperature=2.0)
    sample = list(sample_sentences(selections, config, seed=1))
    assert abs(len(sample) - expected) <= 2
    counts = Counter(sentence.split()[0] for sentence in sample)
    wanted = shares({"en": 220, "de": 200, "fi": 20}, 2.0)
    assert all(counts[language] == pytest.approx(wanted[language] * expected, abs=2) for language in wanted)
    assert sample == list(sample_sentences(selections, config, seed=1))
