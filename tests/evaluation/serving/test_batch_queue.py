"""The queue of moe-serve: batches across requests, a limit, and what happens to a batch that fails."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from moe_train.evaluation.serving.batch_queue import BatchQueue, QueueFull
from moe_train.evaluation.translations import Translation


class Gate:
    """A translation that waits until it is opened, and keeps its batches."""

    def __init__(self) -> None:
        self.batches: list[tuple[list[str], str, str, bool]] = []
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self, sentences: Sequence[str], source: str, target: str, experts: bool) -> list[Translation]:
        self.batches.append((list(sentences), source, target, experts))
        self.entered.set()
        assert self.opened.wait(30)
        if "fail" in sentences:
            raise RuntimeError("no memory")
        return [Translation(sentence.upper(), 0.0, 1) for sentence in sentences]


def test_requests_of_a_kind_share_a_batch_oldest_first() -> None:
    gate = Gate()
    queue = BatchQueue(gate, limit=100, batch=4)
    first = queue.put(["a"], "de", "en", False)
    assert gate.entered.wait(30)
    answers = [
        queue.put(["b", "c"], "de", "en", False),
        queue.put(["d"], "en", "de", False),
        queue.put(["e"], "de", "en", True),
        queue.put(["f", "g"], "de", "en", False),
        queue.put(["h"], "de", "en", False),
        queue.put(list("ijklmn"), "de", "en", False),  # more than a batch
    ]
    gone = queue.put(["o"], "de", "en", False)
    assert gone.cancel() and queue.waiting == 14
    gate.opened.set()
    texts = [[one.text for one in answer.result(30)] for answer in (first, *answers)]
    assert texts == [["A"], ["B", "C"], ["D"], ["E"], ["F", "G"], ["H"], list("IJKLMN")]
    queue.close()
    assert gate.batches == [
        (["a"], "de", "en", False),
        (["b", "c", "f", "g"], "de", "en", False),
        (["d"], "en", "de", False),
        (["e"], "de", "en", True),
        (["h"], "de", "en", False),
        (list("ijklmn"), "de", "en", False),
    ]


def test_a_full_or_closed_queue_refuses_and_a_closed_one_answers_what_waits() -> None:
    gate = Gate()
    queue = BatchQueue(gate, limit=3, batch=2)
    queue.put(["a"], "de", "en", False)
    assert gate.entered.wait(30)
    waiting = queue.put(["b", "c"], "de", "en", False)
    with pytest.raises(QueueFull) as full:
        queue.put(["d", "e"], "de", "en", False)
    assert 1 <= full.value.seconds <= 60
    last = queue.put(["d"], "de", "en", False)
    closing = threading.Thread(target=queue.close)
    closing.start()
    gate.opened.set()
    closing.join(30)
    assert waiting.done() and [one.text for one in last.result(0)] == ["D"]
    with pytest.raises(QueueFull):
        queue.put(["f"], "de", "en", False)


def test_a_batch_that_fails_is_an_error_of_its_requests_alone() -> None:
    gate = Gate()
    gate.opened.set()
    queue = BatchQueue(gate, limit=10, batch=1)
    with pytest.raises(RuntimeError, match="no memory"):
        queue.put(["fail"], "de", "en", False).result(30)
    assert queue.put(["a"], "de", "en", False).result(30)[0].text == "A"
    queue.close()
