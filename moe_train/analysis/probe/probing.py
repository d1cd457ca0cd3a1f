"""Records inputs and routing of the sparse blocks of a trained model on held-out data.

Checkpoints of one run on the same data give X-MoE's measures over training (Chi et al., 2022, §4.5).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_train.analysis.probe.collapse import representation_collapse
from moe_train.analysis.probe.drops import count_drops
from moe_train.analysis.probe.groups import (
    load_by_group,
    load_statistics,
    mean_by_label,
    pairs_by_group,
    requested_capacity_by_layer,
    specialisation,
)
from moe_train.analysis.probe.mixes import mix_statistics
from moe_train.analysis.probe.stability import fluctuation_ratio
from moe_train.evaluation.loading import open_run
from moe_train.layers import Block, RoutingRecord
from moe_train.layers.batch_context import BatchContext
from moe_train.layers.stack import DecoderStack
from moe_train.models.routed import stacks

_MIN_COUNT = 10  # occurrences of a token for which requested capacity is reported


@dataclass
class LayerProbe:
    """One sparse block; T tokens in the order of the data. Blocks of slots (Soft MoE) have mixes instead of choices.

    Attributes:
        stack: ``encoder`` or ``decoder``.
        states: T rows [.., d] of inputs of the router; with strata, of the first gate.
        choices, kept: [T, k] expert ids before drops, and whether each was kept; with L strata [T, L·k], pass by pass.
        passes: [T] requested passes of each token (strata only).
        language, token_id: [T].
        mixes: means of Soft MoE's mixes, per batch.
        strongest: [T] of each batch, the expert with the largest combine weight (slots only).
    """

    num_experts: int
    stack: str = "encoder"
    states: list[Tensor] = field(default_factory=list)
    choices: list[Tensor] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    passes: list[Tensor] = field(default_factory=list)
    language: list[Tensor] = field(default_factory=list)
    token_id: list[Tensor] = field(default_factory=list)
    mixes: list[dict[str, float]] = field(default_factory=list)
    strongest: list[Tensor] = field(default_factory=list)

    @property
    def first(self) -> Tensor:
        """[T] first choices."""
        return torch.cat(self.choices)[:, 0]


def probe(model: nn.Module, samples: Sequence[Mapping[str, Any]]) -> dict[int, LayerProbe]:
    """Runs samples through a model in eval mode; layer number → its record."""
    found: dict[int, LayerProbe] = {}
    with _recording(model.eval(), found), torch.no_grad():
        for sample in samples:
            model(**sample["net_input"])
    return dict(sorted(found.items()))


@contextmanager
def _recording(model: nn.Module, found: dict[int, LayerProbe]) -> Iterator[None]:
    names: dict[Any, str] = {}

    def record_block(block: Any, inputs: tuple[Tensor, BatchContext], output: tuple[Tensor, RoutingRecord]) -> None:
        layer = found.setdefault(block.layer, LayerProbe(block.pool.num_experts, names[block]))
        _record(layer, block, inputs[0], inputs[1], output[1])

    for stack in stacks(model):
        name = "decoder" if isinstance(stack, DecoderStack) else "encoder"
        names |= {block: name for block in stack.modules() if isinstance(block, Block) and hasattr(block, "router")}
    handles = [block.register_forward_hook(record_block) for block in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _record(layer: LayerProbe, block: Block, x: Tensor, context: BatchContext, record: RoutingRecord) -> None:
    seen = block.observe(x, context, record)
    layer.states.append(seen.states.float().cpu())
    layer.language.append(context.routing.language.cpu())
    layer.token_id.append(context.routing.token_id.cpu())
    if seen.mixes is not None:
        dispatch, combine = (weights.cpu() for weights in seen.mixes)
        padding = None if context.padding is None else context.padding.cpu()
        layer.mixes.append(mix_statistics(dispatch, combine, layer.num_experts, padding))
        by_expert = combine.reshape(*combine.shape[:2], layer.num_experts, -1).sum(-1).argmax(-1)
        layer.strongest.append(by_expert.reshape(-1) if padding is None else by_expert[~padding])
    if record.routing:
        layer.choices.append(torch.cat([routing.choices for routing in record.routing], dim=1).cpu())
        layer.kept.append(torch.cat([routing.kept for routing in record.routing], dim=1).cpu())
    if seen.passes is not None:
        layer.passes.append(seen.passes.cpu())


def describe_probe(layer: LayerProbe) -> dict[str, Any]:
    """The measures of one block, ready for JSON.

    ``collapse_by_expert`` and ``collapse_by_token``: Tr(Σ_W Σ_B⁺) with the first expert and the vocabulary id as the
    class. Of processed (token, expert) pairs, over all choices and passes: ``load`` [E], its ``max_over_mean``,
    ``variation`` and ``dead``; where languages are known ``load_by_language`` (fractions) and ``specialisation``.
    ``dropped_fraction`` of the tokens, ``dropped_pairs`` of the requested pairs. With strata ``requested_capacity``,
    also by language, and by vocabulary id for those that occur at least ten times. With slots the values of
    :func:`mix_statistics`.
    """
    states, language, token = (torch.cat(part) for part in (layer.states, layer.language, layer.token_id))
    content: dict[str, Any] = {"tokens": states.shape[0]}
    if len(torch.unique(token)) > 1:
        content["collapse_by_token"] = representation_collapse(states, token)
    if layer.mixes:
        names = layer.mixes[0]
        content |= {name: sum(mix[name] for mix in layer.mixes) / len(layer.mixes) for name in names}
    if layer.choices:
        first, chosen = layer.first, layer.first >= 0
        if len(torch.unique(first[chosen])) > 1:
            content["collapse_by_expert"] = representation_collapse(states[chosen], first[chosen])
        content |= _loads(layer, language)
    if layer.passes:
        content |= _capacities(torch.cat(layer.passes), language, token)
    return content


def _loads(layer: LayerProbe, language: Tensor) -> dict[str, Any]:
    choices, kept = torch.cat(layer.choices), torch.cat(layer.kept)
    chosen = choices >= 0
    processed = chosen & kept
    load = torch.bincount(choices[processed], minlength=layer.num_experts)
    content: dict[str, Any] = {"load": load.tolist(), **load_statistics(load)}
    if language.numel() and int(language.min()) >= 0:
        languages = language.unsqueeze(1).expand_as(choices)[processed]
        counts = pairs_by_group(choices[processed], languages, layer.num_experts, int(language.max()) + 1)
        content["load_by_language"] = load_by_group(counts).tolist()
        content["specialisation"] = specialisation(counts)
    content["dropped_fraction"] = count_drops(choices, kept).dropped_fraction
    content["dropped_pairs"] = 1.0 - int(processed.sum()) / max(int(chosen.sum()), 1)
    return content


def _capacities(passes: Tensor, language: Tensor, token: Tensor) -> dict[str, Any]:
    frequent = torch.bincount(token)[token] >= _MIN_COUNT
    return {
        "requested_capacity": float(passes.double().mean()),
        "requested_capacity_by_language": mean_by_label(passes, language),
        "requested_capacity_by_token": mean_by_label(passes[frequent], token[frequent]),
    }


def capacity_by_stack(layers: Mapping[int, LayerProbe]) -> dict[str, float]:
    """Requested capacity averaged over the blocks of ``encoder`` and ``decoder``; nothing for those without strata."""
    passes = {number: torch.cat(layer.passes) for number, layer in layers.items() if layer.passes}
    places = {number: layers[number].stack for number in passes}
    return {
        stack: requested_capacity_by_layer(passes, [number for number in passes if places[number] == stack])
        for stack in dict.fromkeys(places.values())
    }


def probe_run(run: Path | str, max_sentences: int = 100, checkpoints: Sequence[int] = ()) -> dict[str, Any]:
    """X-MoE's measures at the checkpoints of a run, on its validation data.

    Args:
        max_sentences: number of sentences of each validation set, from its beginning.
        checkpoints: updates; empty: all checkpoints.

    Returns:
        ``checkpoints``: update → layer → :func:`describe_probe`; ``fluctuation``: layer → the ratio between each
        checkpoint and the one before; ``requested_capacity``: update → :func:`capacity_by_stack`.

    Raises:
        ConfigError, CheckpointError, DataError: as :func:`moe_train.evaluation.loading.open_run`.
    """
    folder = Path(run) / "checkpoints"
    kept = sorted(int(path.name.removeprefix("step_")) for path in folder.glob("step_*") if path.is_dir())
    described: dict[str, Any] = {}
    before: dict[int, Tensor] = {}
    fluctuation: dict[str, list[float]] = {}
    capacity: dict[str, dict[str, float]] = {}
    for update in checkpoints or kept:
        opened = open_run(run, str(update))
        layers = probe(opened.load().model, _samples(opened.task, max_sentences))
        capacity[str(update)] = capacity_by_stack(layers)
        described[str(update)] = {str(number): describe_probe(layer) for number, layer in layers.items()}
        now = {number: layer.first for number, layer in layers.items() if layer.choices}
        for number in now.keys() & before.keys():
            fluctuation.setdefault(str(number), []).append(fluctuation_ratio(before[number], now[number]))
        before = now
    return {"checkpoints": described, "fluctuation": fluctuation, "requested_capacity": capacity}


def _samples(task: Any, max_sentences: int) -> list[Mapping[str, Any]]:
    """Validation batches, the same at every checkpoint."""
    samples = []
    for name, batches in task.validation_sets().items():
        left = max_sentences
        for batch in batches:
            if left > 0:
                samples.append(task.validation_sample(name, batch[:left]))
                left -= len(batch)
    return samples
