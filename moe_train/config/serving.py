"""Config of moe-serve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from moe_train.config import check
from moe_train.config.check import PositiveInt, Range, Seed, Threads
from moe_train.config.evaluation import Checkpoint, Inference
from moe_train.config.run import DataVerify, SearchConfig
from moe_train.errors import ConfigError


@dataclass(frozen=True)
class ServeConfig:
    """Translate over HTTP.

    Attributes:
        run, checkpoint, data, data_verify: as in :class:`moe_train.config.evaluation.EvaluateConfig`.
        host, port: the address to listen at; port 0: a free one.
        allowed_hosts: names that a request's ``Host`` header may have, in addition to ``host`` and this machine's own.
        queue: sentences that may wait; a request that does not fit is answered with 429.
        batch_sentences: sentences translated together at most.
        max_sentences: of a request.
        max_characters: of a sentence.
        threads: CPU threads (0: all cores).
        routing, draw_seed: as in :class:`moe_train.config.evaluation.Inference`.
    """

    run: str
    checkpoint: Checkpoint = "best"
    data: str | None = None
    data_verify: DataVerify = "once"
    host: str = "127.0.0.1"
    port: Annotated[int, Range(least=0, most=65535)] = 8000
    allowed_hosts: tuple[str, ...] = ()
    queue: PositiveInt = 1024
    batch_sentences: PositiveInt = 32
    max_sentences: PositiveInt = 64
    max_characters: PositiveInt = 2000
    threads: Threads = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    routing: Mapping[str, Any] = field(default_factory=dict)
    draw_seed: Seed | None = None
    search: SearchConfig = field(default_factory=SearchConfig)

    def __post_init__(self) -> None:
        check.numbers(self, "")
        if self.max_sentences > self.queue:
            what = f"a request may have {self.max_sentences:,} sentences, and the queue takes {self.queue:,}"
            raise ConfigError(what, "max_sentences", "raise queue or lower max_sentences")

    @property
    def inference(self) -> Inference:
        """How the model routes."""
        return Inference(self.routing, self.draw_seed)
