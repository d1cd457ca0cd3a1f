"""The experts of each token of a sentence and its translation, by layer and choice, in encoder and decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_train.evaluation.search.target_scores import with_target
from moe_train.evaluation.translations import LayerExperts, SentenceExperts
from moe_train.layers import Block, RoutingRecord
from moe_train.layers.batch_context import BatchContext

_Choices = list[list[tuple[int, float]]]  # (expert, weight) of each token of a sentence
_Layers = dict[int, list[_Choices]]  # of each sentence, by layer


@torch.no_grad()
def find_experts(
    model: Any, net_input: Mapping[str, Any], targets: Sequence[Sequence[int]], dictionary: Any
) -> list[SentenceExperts]:
    """The experts of a batch of sentences and their translations, in one forward pass.

    Args:
        model: in eval mode, with ``encoder`` and ``decoder``.
        net_input: as for a search.
        targets: ids of each sentence's translation, without tag and end.
        dictionary: fairseq's Dictionary of both sides.
    """
    given = with_target(net_input, targets, dictionary.pad())
    with _recorded(model.encoder) as encoder, _recorded(model.decoder) as decoder:
        model(**given)
    sources, inputs = (_tokens(given[name], dictionary) for name in ("src_tokens", "prev_output_tokens"))
    return [
        SentenceExperts(source, target, _of_sentence(encoder, row), _of_sentence(decoder, row))
        for row, (source, target) in enumerate(zip(sources, inputs, strict=True))
    ]


def _tokens(ids: Tensor, dictionary: Any) -> list[tuple[str, ...]]:
    pad = dictionary.pad()
    return [tuple(dictionary[i] for i in row if i != pad) for row in ids.tolist()]


def _of_sentence(layers: _Layers, row: int) -> tuple[LayerExperts, ...]:
    return tuple(
        LayerExperts(
            layer,
            tuple(tuple(expert for expert, _ in token) for token in sentences[row]),
            tuple(tuple(round(weight, 6) for _, weight in token) for token in sentences[row]),
        )
        for layer, sentences in sorted(layers.items())
    )


@contextmanager
def _recorded(part: nn.Module) -> Iterator[_Layers]:
    """Yields the choices of the forward pass that is made in the context."""
    found: _Layers = {}

    def record(block: Any, inputs: tuple[Tensor, BatchContext], output: tuple[Tensor, RoutingRecord | None]) -> None:
        if output[1] is not None:
            found[output[1].layer] = _by_sentence(block, *inputs, output[1])

    handles = [module.register_forward_hook(record) for module in part.modules() if isinstance(module, Block)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _by_sentence(block: Block, x: Tensor, context: BatchContext, record: RoutingRecord) -> list[_Choices]:
    sentences: list[_Choices] = [[] for _ in range(context.batch)]
    mixes = None if record.routing else block.observe(x, context, record).mixes
    choices = _chosen(context, record) if mixes is None else _mixed(context, record, mixes[1])
    for row, own in zip(context.routing.sentence.tolist(), choices, strict=True):
        sentences[row].append(own)
    return sentences


def _chosen(context: BatchContext, record: RoutingRecord) -> _Choices:
    choices: _Choices = [[] for _ in context.routing.sentence]
    for routing in record.routing:
        pairs = routing.assignment
        triples = zip(pairs.token.tolist(), pairs.expert.tolist(), pairs.weight.tolist(), strict=True)
        weights = {(token, expert): weight for token, expert, weight in triples}
        for token, experts in enumerate(routing.choices.tolist()):
            choices[token] += [(expert, weights.get((token, expert), 0.0)) for expert in experts if expert >= 0]
    return choices


def _mixed(context: BatchContext, record: RoutingRecord, combine: Tensor) -> _Choices:
    """From combine weights [B, S, s]; the slots of an expert are contiguous."""
    by_expert = combine.unflatten(2, (record.statistics.load.numel(), -1)).sum(3)
    return [list(enumerate(row)) for row in context.pack(by_expert).tolist()]
