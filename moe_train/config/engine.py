"""Config of the engine, which reduces gradients and steps the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from moe_train.config import check
from moe_train.config.check import NonNegativeInt, Range
from moe_train.errors import ConfigError


@dataclass(frozen=True)
class EngineConfig:
    """The engine and its settings.

    Attributes:
        name: ``ddp`` (torch's DistributedDataParallel) or ``deepspeed`` (ZeRO).
        bucket_mb: gradients are reduced in buckets of about this size.
        zero_stage: ZeRO stage. 0: nothing is sharded; 1: the optimizer's state is sharded over the ranks; 2, DeepSpeed
            only: the reduced gradients too.
        offload_optimizer: DeepSpeed keeps the optimizer's state, and its step, on the host.
    """

    name: Literal["ddp", "deepspeed"] = "ddp"
    bucket_mb: Annotated[int, Range(above=0, most=2**20)] = 25
    zero_stage: NonNegativeInt = 0
    offload_optimizer: bool = False

    def __post_init__(self) -> None:
        check.numbers(self, "engine")
        if self.zero_stage == 3:
            raise ConfigError(
                "engine.zero_stage=3 would shard every parameter over all ranks; experts are divided already, by"
                " layout.expert_parallel, and DeepSpeed does not accept them with ZeRO 3",
                remedy="set engine.zero_stage=2, and layout.expert_parallel to divide the experts",
            )
        if self.zero_stage not in (0, 1, 2):
            raise ConfigError(f"'engine.zero_stage' cannot be {self.zero_stage}", remedy="choose 0, 1 or 2")
        if self.name != "deepspeed" and (self.zero_stage > 1 or self.offload_optimizer):
            raise ConfigError(
                f"engine.zero_stage=2 and engine.offload_optimizer need DeepSpeed, not engine '{self.name}'",
                remedy="add engine=deepspeed",
            )
        if self.offload_optimizer and not self.zero_stage:
            raise ConfigError(
                "engine.offload_optimizer needs ZeRO: with stage 0 torch's optimizer runs on the device",
                remedy="set engine.zero_stage=1 or 2",
            )
