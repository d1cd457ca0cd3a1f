"""Initialises a sparse model from a dense one (Komatsuzaki et al., 2023, "Sparse Upcycling")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from moe_train.errors import CheckpointError
from moe_train.experts import ExpertPool
from moe_train.models.accounting import RoutedBlock, sparse_blocks

_PARTS = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")


@torch.no_grad()
def upcycle(dense: Mapping[str, Tensor], sparse: nn.Module) -> nn.Module:
    """Fills ``sparse`` from the state of a dense model of the same shape.

    Every expert becomes a copy of the dense feed-forward that it replaces, and all other common parameters are copied.
    Routers, norms that only the sparse model has, and inserted blocks keep their initial weights. If a token's weights
    sum to one, the function is unchanged; with Switch's weight, which is below one, it is not.

    A shared expert keeps its initial weights too: as a copy, it would double the feed-forward's output.

    Args:
        dense: state dict of a model built with ``routing=dense`` (or converted from fairseq), perhaps from a
            checkpoint. A tied tensor may have any of its names, or several.
        sparse: built with the same model config; changed in place, and returned.

    Raises:
        CheckpointError: a tensor is missing or has another shape, tied tensors differ, or an expert is not one
            feed-forward of that width.
    """
    remaining = dict(dense)
    blocks = sparse_blocks(sparse)
    for name, block in blocks.items():
        if not _inserted(name):
            _fill_experts(block.pool, remaining, name)
            if block.owns_residual:
                _fill_norms(block, remaining, name)
    for tensor, names in _by_tensor(sparse):
        key = names[0]
        if not (_inserted(key) or any(key.startswith(f"{name}.") for name in blocks)):
            tensor.copy_(_same_shape(_take_tied(remaining, names), tensor, key))
    if remaining:
        raise CheckpointError(
            f"the sparse model has no tensor {', '.join(sorted(remaining)[:3])}",
            remedy="build both with the same model config",
        )
    return sparse


def _by_tensor(module: nn.Module) -> list[tuple[Tensor, list[str]]]:
    """Parameters and persistent buffers, each once, with all its names (several if it is tied)."""
    state = module.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    return [(state[group[0]], group) for group in names.values()]


def _inserted(name: str) -> bool:
    return ".inserted." in f"{name}."


def _fill_experts(pool: ExpertPool, dense: dict[str, Tensor], name: str) -> None:
    if len(pool.sublayers) != 1:
        raise CheckpointError(
            f"{name}: an expert of {len(pool.sublayers)} sub-layers cannot start as one feed-forward",
            remedy="set routing.expert_sublayers=1, or insert the block with model.sparse_layers=insert_after:N",
        )
    stack = pool.sublayers[0]
    for part in _PARTS:
        parameter = getattr(stack, part)
        source = _take(dense, f"{name}.{part.replace('_', '.')}")
        if parameter is not None:
            # Pools compute x @ W, nn.Linear x @ W.T.
            copy = source.t() if source.dim() == 2 else source
            parameter.copy_(_same_shape(copy, parameter[0], f"{name}.{part}").expand_as(parameter))


def _fill_norms(block: RoutedBlock, dense: dict[str, Tensor], name: str) -> None:
    """Initialises all norms of a stratified block with the norm of the feed-forward that it replaces."""
    layer = name.removesuffix(".block")
    for part in ("weight", "bias"):
        source = _take(dense, f"{layer}.residual.norm.{part}")
        for norm in cast(nn.Module, block).norms:  # type: ignore[union-attr]
            getattr(norm, part).copy_(source)


def _take(dense: dict[str, Tensor], key: str) -> Tensor:
    if key not in dense:
        raise CheckpointError(
            f"the dense checkpoint has no {key}", remedy="give one made with routing=dense and the same model config"
        )
    return dense.pop(key)


def _take_tied(dense: dict[str, Tensor], names: list[str]) -> Tensor:
    """Removes and returns a tied tensor: under one of its names, or under several with equal values."""
    present = [name for name in names if name in dense] or names[:1]
    first, *others = [_take(dense, name) for name in present]
    if any(not torch.equal(first, other) for other in others):
        raise CheckpointError(
            f"{' and '.join(present)} are one tensor in the model and differ in the dense checkpoint",
            remedy="set model.share_embeddings as it was set for the dense model",
        )
    return first


def _same_shape(source: Tensor, target: Tensor, key: str) -> Tensor:
    if source.shape != target.shape:
        raise CheckpointError(
            f"{key} is {list(source.shape)} in the dense checkpoint and {list(target.shape)} in the model",
            remedy="build both with the same model config, and experts as wide as model.ffn_dim",
        )
    return source
