"""What the ranks of a world compute with an imported model whose experts are divided over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moe_train.config import SearchConfig
from moe_train.evaluation.decode_ep import decode_on_rank
from moe_train.evaluation.loading import open_run
from moe_train.evaluation.translator import Batch, length_batches
from moe_train.parallel.layout import ExpertLayout
from moe_train.parallel.layout_plan import LayoutPlan
from moe_train.training.checkpoint.state_dict import EXPERT, model_tensors


def translations(folder: str, sentences: Sequence[tuple[int, ...]], source: str, target: str) -> dict[str, str]:
    """This rank's translations by the sentences' ids."""
    size = dist.get_world_size()
    run, plan = open_run(folder), LayoutPlan(size, size, size)
    groups = length_batches(list(map(len, sentences)), 40)
    batches = [Batch(source, target, tuple(sentences[i] for i in group), tuple(group)) for group in groups]
    found = decode_on_rank(run, batches, SearchConfig(beam=5, max_length_offset=10), plan, torch.device("cpu"))
    return {
        str(ids): one.text
        for number, result in found
        for ids, one in zip(batches[number].sentences, result.translations, strict=True)
    }


def logits(folder: str, inputs: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Logits of a batch that every rank has, and the number of expert tensors that this rank holds."""
    size = dist.get_world_size()
    model = open_run(folder).load(layout=ExpertLayout.build(LayoutPlan(size, size, size))).model
    with torch.no_grad():
        return model(**inputs)[0], sum(EXPERT in name for name in model_tensors(model))
