"""The routing atlas of a run: which expert takes which language's tokens, by layer and checkpoint, on held-out text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_train.analysis.probe.collapse import representation_collapse
from moe_train.analysis.probe.drops import count_drops
from moe_train.analysis.probe.groups import load_by_group, load_statistics, pairs_by_group, specialisation
from moe_train.analysis.probe.probing import LayerProbe, probe
from moe_train.analysis.probe.stability import fluctuation_ratio
from moe_train.evaluation.loading import open_run
from moe_train.models.routed import block_names
from moe_train.training.checkpoint.store import CheckpointStore, load_model

_TOKENS = {"encoder": "src_tokens", "decoder": "prev_output_tokens"}
_SHOWN = 24  # sentences with the expert of each token
_LENGTHS = range(6, 41)  # tokens of a sentence that is shown, where there is one


def routing_atlas(run: Path | str, checkpoints: Sequence[int], max_sentences: int) -> dict[str, Any]:
    """Routing at checkpoints of a run, on the first sentences of each held-out set of the split ``valid``.

    Args:
        checkpoints: updates, in their order; sentences are shown with the experts of the last one.
        max_sentences: of all sets together.

    Returns:
        ``checkpoints``; ``sentences``, how many there are; ``layers``, a list of :func:`_layer_over_checkpoints`;
        ``examples``: for each its ``set``, its tokens by stack, and its experts by number of the layer.

    Raises:
        ConfigError, CheckpointError, DataError: as :func:`moe_train.evaluation.loading.open_run`.
    """
    opened = open_run(run, checkpoints[0]).load()
    store, names = CheckpointStore(opened.folder.checkpoints), block_names(opened.model)
    sets = _samples(opened.task, max_sentences)
    probes: list[dict[int, LayerProbe]] = []
    for update in checkpoints:
        if probes:  # one model, whose weights are replaced: opening the run builds two
            load_model(store.resolve(update), opened.model)
        probes.append(probe(opened.model, [sample for _, sample in sets]))
    return {
        "checkpoints": list(checkpoints),
        "sentences": sum(int(sample["nsentences"]) for _, sample in sets),
        "layers": [
            {"number": number, "name": names[number], **_layer_over_checkpoints([p[number] for p in probes], sets)}
            for number in probes[-1]
        ],
        "examples": _examples(probes[-1], sets, opened.task.vocabulary),
    }


Sets = Sequence[tuple[str, Mapping[str, Any]]]  # name of the set, batch


def _samples(task: Any, max_sentences: int) -> Sets:
    names = [name for name, batches in task.evaluation_sets("valid", 1).items() if batches][:max_sentences]
    found = task.evaluation_sets("valid", max(1, max_sentences // max(1, len(names))))
    return [(name, task.evaluation_sample("valid", name, batch)) for name in names for batch in found[name]]


def _choices(layer: LayerProbe) -> list[Tensor]:
    """Of each batch [T, k] experts; of slots [T, 1], the expert with the largest part in the token's output."""
    return layer.choices or [strongest.unsqueeze(1) for strongest in layer.strongest]


def _layer_over_checkpoints(probes: Sequence[LayerProbe], sets: Sets) -> dict[str, Any]:
    """``stack``, ``experts``, ``soft``; ``groups`` (languages, or names of sets) and ``load`` [G, E] of each group's
    pairs at the last checkpoint; by checkpoint ``specialisation``, ``collapse``, ``largest_load`` (over the mean),
    ``dead`` experts, ``dropped`` share of tokens, and ``fluctuation`` from the one before."""
    last = probes[-1]
    groups, members = _groups(last, sets)
    content: dict[str, Any] = {"stack": last.stack, "experts": last.num_experts, "soft": not last.choices}
    content |= {"groups": groups, "load": load_by_group(_pairs(last, members, len(groups))).tolist()}
    measured = [_measures(layer, members, len(groups)) for layer in probes]
    content |= {name: [values[name] for values in measured] for name in measured[0]}
    firsts = [torch.cat(_choices(layer))[:, 0] for layer in probes]
    changes = [fluctuation_ratio(*pair) for pair in pairwise(firsts)]
    return content | {"fluctuation": [None, *changes]}


def _groups(layer: LayerProbe, sets: Sets) -> tuple[list[str], Tensor]:
    """Names of groups, and the group [T] of each token: its language in a direction such as ``de-en``, else its set."""

    def group(name: str) -> str:
        source, _, target = name.partition("-")
        return (target or source) if layer.stack == "decoder" else source

    names = sorted({group(name) for name, _ in sets})
    sizes = [len(choices) for choices in _choices(layer)]
    numbers = torch.tensor([names.index(group(name)) for name, _ in sets])
    return names, numbers.repeat_interleave(torch.tensor(sizes))


def _pairs(layer: LayerProbe, members: Tensor, groups: int) -> Tensor:
    """[G, E] processed pairs."""
    choices = torch.cat(_choices(layer))
    processed = (choices >= 0) & torch.cat(layer.kept) if layer.kept else choices >= 0
    of_pairs = members.unsqueeze(1).expand_as(choices)[processed]
    return pairs_by_group(choices[processed], of_pairs, layer.num_experts, groups)


def _measures(layer: LayerProbe, members: Tensor, groups: int) -> dict[str, float | None]:
    choices, states = torch.cat(_choices(layer)), torch.cat(layer.states)
    pairs = _pairs(layer, members, groups)
    load = load_statistics(pairs.sum(0))
    chosen = choices[:, 0] >= 0
    several = len(torch.unique(choices[chosen, 0])) > 1
    return {
        "specialisation": specialisation(pairs) if groups > 1 else None,
        "collapse": representation_collapse(states[chosen], choices[chosen, 0]) if several else None,
        "largest_load": load["max_over_mean"],
        "dead": load["dead"],
        "dropped": count_drops(choices, torch.cat(layer.kept)).dropped_fraction if layer.kept else 0.0,
    }


def _examples(layers: Mapping[int, LayerProbe], sets: Sets, vocabulary: Any) -> list[dict[str, Any]]:
    """Sentences of text with each token's first expert (-1: none), from as many sets as possible."""
    if vocabulary is None or not layers:
        return []
    dictionary = vocabulary.dictionary()
    found: list[tuple[bool, dict[str, Any]]] = []
    for number, (name, sample) in enumerate(sets):
        tokens = {stack: sample["net_input"][key] for stack, key in _TOKENS.items() if key in sample["net_input"]}
        lengths = {stack: (ids != dictionary.pad()).sum(1).tolist() for stack, ids in tokens.items()}
        firsts = {i: _choices(layer)[number][:, 0] for i, layer in layers.items()}
        if any(len(firsts[i]) != sum(lengths.get(layer.stack, [-1])) for i, layer in layers.items()):
            continue  # routed rows are not the tokens of the text
        experts = {i: firsts[i].split(lengths[layer.stack]) for i, layer in layers.items()}
        for row, length in enumerate(lengths["encoder"]):
            pieces = {
                stack: [dictionary[int(token)] for token in ids[row] if token != dictionary.pad()]
                for stack, ids in tokens.items()
            }
            routed = {str(i): rows[row].tolist() for i, rows in experts.items()}
            found.append((length in _LENGTHS, {"set": name, **pieces, "experts": routed}))
    found.sort(key=lambda entry: not entry[0])  # sentences of a readable length first, in their order
    per_set: dict[str, list[dict[str, Any]]] = {}
    for _, example in found:
        per_set.setdefault(example["set"], []).append(example)
    share = max(1, _SHOWN // max(1, len(per_set)))
    return [example for name, _ in sets if name in per_set for example in per_set.pop(name)[:share]][:_SHOWN]
