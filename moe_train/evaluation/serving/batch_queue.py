"""A queue of sentences that one thread translates in batches, across requests."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from moe_train.evaluation.translations import Translation

LOG = logging.getLogger("moe_train")
_LONGEST_WAIT = 60  # seconds, of Retry-After

#: Sentences of one direction, source and target language, whether experts are wanted -> a translation for each.
Translate = Callable[[Sequence[str], str, str, bool], Sequence[Translation]]


class QueueFull(Exception):
    """There is no room for the sentences.

    Args:
        seconds: after which there may be.
    """

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds
        super().__init__(seconds)


@dataclass(frozen=True)
class Request:
    """Sentences that are translated together; ``kind`` is what all requests of a batch share."""

    sentences: Sequence[str]
    source: str
    target: str
    experts: bool
    answer: Future[list[Translation]] = field(default_factory=Future)

    @property
    def kind(self) -> tuple[str, str, bool]:
        """Languages, and whether experts are wanted."""
        return self.source, self.target, self.experts


class BatchQueue:
    """Translates what waits, oldest first, together with later requests of the same kind.

    Args:
        limit: sentences that may wait.
        batch: sentences of a batch at most, unless one request has more.
    """

    def __init__(self, translate: Translate, limit: int, batch: int) -> None:
        self._translate, self._limit, self._batch = translate, limit, batch
        self._requests: deque[Request] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._pace = 0.0  # seconds per sentence, a running mean
        self._thread = threading.Thread(target=self._run, name="translate", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Sentences that wait."""
        with self._changed:
            return self._waiting()

    def put(self, sentences: Sequence[str], source: str, target: str, experts: bool) -> Future[list[Translation]]:
        """Queues sentences.

        Raises:
            QueueFull: they do not fit, or the queue is closed.
        """
        request = Request(sentences, source, target, experts)
        with self._changed:
            waiting = self._waiting()
            if self._closed or waiting + len(sentences) > self._limit:
                raise QueueFull(min(max(1, math.ceil(waiting * self._pace)), _LONGEST_WAIT))
            self._requests.append(request)
            self._changed.notify()
        return request.answer

    def close(self) -> None:
        """Takes no more sentences, and returns when those that wait are translated."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _waiting(self) -> int:
        return sum(len(request.sentences) for request in self._requests)

    def _run(self) -> None:
        while (requests := self._next()) is not None:
            if not requests:
                continue
            sentences = [sentence for request in requests for sentence in request.sentences]
            started = time.monotonic()
            try:
                found = list(self._translate(sentences, *requests[0].kind))
            except Exception as error:  # a fault of ours: the requests are answered, and the next ones are translated
                LOG.exception("a batch of %s sentences was not translated", len(sentences))
                for request in requests:
                    request.answer.set_exception(error)
                continue
            pace = (time.monotonic() - started) / max(len(sentences), 1)
            self._pace = 0.8 * self._pace + 0.2 * pace if self._pace else pace
            for request in requests:
                own, found = found[: len(request.sentences)], found[len(request.sentences) :]
                request.answer.set_result(own)

    def _next(self) -> list[Request] | None:
        """The oldest request and later ones of its kind, as far as they fit; None: the queue is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._requests or self._closed)
            chosen: list[Request] = []
            rest: deque[Request] = deque()
            room = self._batch
            for request in self._requests:
                fits = not chosen or (request.kind == chosen[0].kind and len(request.sentences) <= room)
                (chosen if fits else rest).append(request)
                room -= len(request.sentences) if fits else 0
            self._requests = rest
        if not chosen:
            return None
        # Without those whose client has gone, which are cancelled.
        return [request for request in chosen if request.answer.set_running_or_notify_cancel()]
