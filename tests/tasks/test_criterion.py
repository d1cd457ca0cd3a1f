"""The criterion against fairseq's own cross-entropy, and: every routing loss is counted once."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moe_train.config import RunConfig
from moe_train.data.batching import split_micro_batch
from moe_train.data.folder import DataFolder
from moe_train.tasks.criterion import mean_over_layers, repeat_batch, symmetric_divergence, unwrap
from moe_train.tasks.translation.task import TranslationTask
from tests.routing.helpers import ThreadRanks, on_ranks
from tests.tasks.helpers import in_double, make_task

LOSSES = {"name": "switch", "num_experts": 4, "balance_weight": 0.3, "z_weight": 0.2}
BATCH = np.arange(0, 1200, 90)


def run(model: nn.Module, criterion: nn.Module, sample: dict[str, Any]) -> tuple[Tensor, dict[str, Any], list[Tensor]]:
    """Loss, logging and gradients."""
    model.zero_grad()
    loss, _, logging = criterion(model, sample)
    loss.backward()
    return loss.detach(), logging, [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]


def with_world_tokens(task: TranslationTask, rows: np.ndarray, tokens: int) -> dict[str, Any]:
    return {**task.train_sample(rows), "world_ntokens": torch.tensor(tokens)}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_dense_model_has_fairseqs_label_smoothed_loss_and_gradient(tiny_data: DataFolder, smoothing: float) -> None:
    from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss

    task = make_task(tiny_data, routing={"name": "dense"}, label_smoothing=smoothing)
    model, sample = in_double(task).train(), task.train_sample(BATCH)
    loss, logging, gradients = run(model, task.build_criterion(), sample)
    model.zero_grad()
    logits, _ = model(**sample["net_input"])
    expected, nll = label_smoothed_nll_loss(
        torch.log_softmax(logits.view(-1, logits.shape[-1]), -1), sample["target"].view(-1), smoothing, ignore_index=1
    )
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert float(logging["nll_loss"]) == pytest.approx(nll.item(), rel=1e-12)
    for ours, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-9, atol=1e-9)


def test_routing_losses_are_weighted_means_over_layers_times_target_tokens(tiny_data: DataFolder) -> None:
    task = make_task(tiny_data, routing=LOSSES)
    model, sample = in_double(task).train(), task.train_sample(BATCH)
    loss, logging, _ = run(model, task.build_criterion(), sample)
    plain = make_task(tiny_data, routing={**LOSSES, "balance_weight": 0.0, "z_weight": 0.0})
    alone = run(model, plain.build_criterion(), sample)[0]  # the same model: its routers carry the weights
    _, extra = model(**sample["net_input"])
    records = extra["routing"]
    assert len(records) == 2
    tokens = sample["ntokens"]
    cross_entropy = loss - tokens * sum(
        weight * torch.stack([r.losses[name].value for r in records]).mean()
        for name, weight in (("balance_loss", 0.3), ("z_loss", 0.2))
    )
    assert alone.item() == pytest.approx(loss.item(), rel=1e-12)
    model.eval()
    evaluated = task.build_criterion()(model, sample)[0]
    assert cross_entropy.item() == pytest.approx(evaluated.item(), rel=1e-6)  # routers' losses are fp32
    for name in ("balance_loss", "z_loss"):
        mean = mean_over_layers(records)[name].mean.item()
        assert float(logging[name]) == pytest.approx(tokens * mean, rel=1e-6)
    assert loss.item() > evaluated.item() + 0.2 * tokens


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_together_compute_what_one_process_does(tiny_data: DataFolder, size: int) -> None:
    task = make_task(tiny_data, routing=LOSSES)
    model, criterion = in_double(task).train(), task.build_criterion()
    whole = task.train_sample(BATCH)
    loss, logging, gradients = run(model, criterion, {**whole, "world_ntokens": torch.tensor(whole["ntokens"])})

    def rank(ranks: ThreadRanks) -> tuple[Tensor, dict[str, Any], list[Tensor]]:
        mine = copy.deepcopy(model)
        mine.set_ranks(ranks)  # type: ignore[operator]
        return run(
            mine, criterion, with_world_tokens(task, split_micro_batch(BATCH, ranks.rank, size), whole["ntokens"])
        )

    parts = on_ranks(size, rank)
    assert sum(p[0].item() for p in parts) == pytest.approx(loss.item(), rel=1e-6)
    for name in ("loss", "nll_loss", "ntokens", "nsentences", "balance_loss", "z_loss"):
        assert sum(float(p[1][name]) for p in parts) == pytest.approx(float(logging[name]), rel=1e-6), name
    for layer, statistics in logging["routing"].items():
        assert torch.equal(sum(p[1]["routing"][layer].load for p in parts), statistics.load)
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    for index, expected in enumerate(gradients):
        assert (sum(p[2][index] for p in parts) - expected).norm() < 1e-6 * norm


def test_a_loss_counts_once_whatever_the_accumulation(tiny_data: DataFolder) -> None:
    task = make_task(tiny_data, routing=LOSSES)
    model, criterion = in_double(task).train(), task.build_criterion()
    sample = task.train_sample(BATCH)
    once = run(model, criterion, sample)
    model.zero_grad()
    total = 0.0
    for _ in range(3):  # an update of three micro-batches, all alike: its objective per token is that of one
        loss, _, _ = criterion(model, sample)
        (loss / (3 * sample["ntokens"])).backward()
        total += loss.item() / (3 * sample["ntokens"])
    assert total == pytest.approx(once[0].item() / sample["ntokens"], rel=1e-12)
    for expected, parameter in zip(once[2], model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected / sample["ntokens"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("routing", [LOSSES, {"name": "thor", "num_experts": 3}], ids=["switch", "thor"])
def test_recomputation_changes_nothing(tiny_data: DataFolder, routing: dict[str, Any]) -> None:
    task = make_task(tiny_data, routing=routing)
    model, criterion = in_double(task).train(), task.build_criterion()
    sample = task.train_sample(BATCH)
    kept = run(model, criterion, sample)
    model.set_recompute(True)  # type: ignore[operator]
    again = run(model, criterion, sample)
    assert again[0].item() == pytest.approx(kept[0].item(), rel=1e-12)
    for one, other in zip(kept[2], again[2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def thor(folder: DataFolder, num_experts: int, weight: float) -> TranslationTask:
    return make_task(folder, routing={"name": "thor", "num_experts": num_experts, "consistency_weight": weight})


def test_two_passes_of_one_expert_agree_and_cost_twice_the_cross_entropy(tiny_data: DataFolder) -> None:
    task = thor(tiny_data, num_experts=1, weight=5.0)
    model, sample = in_double(task).train(), task.train_sample(BATCH)
    loss, logging, _ = run(model, task.build_criterion(), sample)
    model.eval()
    evaluated = task.build_criterion()(model, sample)
    assert float(logging["consistency_loss"]) == pytest.approx(0.0, abs=1e-9)
    assert loss.item() == pytest.approx(2 * evaluated[0].item(), rel=1e-12)
    assert float(logging["nll_loss"]) == pytest.approx(float(evaluated[2]["nll_loss"]), rel=1e-12)
    assert logging["sample_size"] == sample["ntokens"]  # the tokens of one pass, as in THOR's code


@pytest.mark.parametrize("weight", [0.0, 2.5])
def test_the_objective_of_two_passes_is_that_of_two_separate_forwards(tiny_data: DataFolder, weight: float) -> None:
    task = thor(tiny_data, num_experts=4, weight=weight)
    model, sample = in_double(task).train(), task.train_sample(BATCH)
    loss, logging, gradients = run(model, task.build_criterion(), sample)
    model.zero_grad()
    real = sample["target"].ne(1)
    single = make_task(tiny_data, routing={"name": "thor", "num_experts": 4, "passes": 1, "consistency_weight": 0.0})
    logits, expected = [], torch.zeros((), dtype=torch.float64)
    for index in range(2):
        inputs = {**sample["net_input"], "pass_index": torch.full((len(BATCH),), index)}
        logits.append(model(**inputs)[0][real])
        expected = expected + single.build_criterion()(model, {**sample, "net_input": inputs})[0]
    expected = expected + weight * symmetric_divergence(*logits)
    expected.backward()
    assert not torch.allclose(logits[0], logits[1])  # the passes drew other experts
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    for ours, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-7, atol=1e-9)
    if weight:
        assert float(logging["consistency_loss"]) > 0


def test_padding_does_not_change_the_objective(tiny_data: DataFolder) -> None:
    task = thor(tiny_data, num_experts=4, weight=2.0)
    model, criterion, sample = in_double(task).train(), task.build_criterion(), task.train_sample(BATCH)
    wider = {
        **sample,
        "target": nn.functional.pad(sample["target"], (0, 5), value=1),
        "net_input": dict(sample["net_input"]),
    }
    for name in ("src_tokens", "prev_output_tokens"):
        wider["net_input"][name] = nn.functional.pad(sample["net_input"][name], (0, 5), value=1)
    plain, padded = run(model, criterion, sample), run(model, criterion, wider)
    assert padded[0].item() == pytest.approx(plain[0].item(), rel=1e-9)
    assert float(padded[1]["consistency_loss"]) == pytest.approx(float(plain[1]["consistency_loss"]), rel=1e-9)


def test_the_divergence_is_symmetric_nonnegative_and_the_mean_of_two_kl() -> None:
    one, other = torch.randn(2, 50, 30, dtype=torch.float64).unbind()
    kl = nn.functional.kl_div
    logs = one.log_softmax(-1), other.log_softmax(-1)
    expected = 0.5 * (
        kl(logs[0], logs[1], reduction="sum", log_target=True) + kl(logs[1], logs[0], reduction="sum", log_target=True)
    )
    assert symmetric_divergence(one, other).item() == pytest.approx(expected.item(), rel=1e-12)
    assert symmetric_divergence(other, one).item() == pytest.approx(expected.item(), rel=1e-12) and expected > 0
    assert symmetric_divergence(one[:0], other[:0]).item() == 0
    certain = torch.tensor([[0.0, -6e4, 50.0]], dtype=torch.float16, requires_grad=True)
    divergence = symmetric_divergence(certain, certain.detach().flip(1))  # probabilities of 0: no NaN
    divergence.backward()
    assert math.isfinite(divergence.item()) and certain.grad is not None and certain.grad.isfinite().all()


@pytest.mark.parametrize("routing", [LOSSES, {"name": "thor", "num_experts": 3}], ids=["switch", "thor"])
def test_an_empty_share_gives_zero_a_graph_and_the_same_keys(tiny_data: DataFolder, routing: dict[str, Any]) -> None:
    task = make_task(tiny_data, routing=routing)
    model, criterion = task.build_model().train(), task.build_criterion()
    full = run(model, criterion, with_world_tokens(task, BATCH, 100))
    loss, logging, gradients = run(model, criterion, with_world_tokens(task, BATCH[:0], 100))
    assert loss.item() == 0 and all(not g.any() for g in gradients)
    assert logging.keys() == full[1].keys() and logging["routing"].keys() == full[1]["routing"].keys()
    assert logging["ntokens"] == 0


def test_statistics_are_logged_only_where_our_loop_asks(tiny_data: DataFolder) -> None:
    task = make_task(tiny_data)
    model, criterion = task.build_model().train(), task.build_criterion()
    assert "routing" not in criterion(model, task.train_sample(BATCH))[2]
    logged = criterion(model, with_world_tokens(task, BATCH, 10))[2]["routing"]
    source = int(task.train_sample(BATCH)["net_input"]["src_lengths"].sum())
    assert int(logged[min(logged)].tokens) == source


def test_fairseqs_log_shows_base_two_per_token(tiny_data: DataFolder) -> None:
    from fairseq import metrics

    task = make_task(tiny_data)
    criterion = task.build_criterion()
    with metrics.aggregate() as log:
        criterion.reduce_metrics(  # type: ignore[operator]
            [
                {"loss": torch.tensor(30.0), "nll_loss": 20.0, "ntokens": 10, "nsentences": 1, "balance_loss": 12.0},
                {"loss": 10.0, "nll_loss": 10.0, "ntokens": 10, "nsentences": 1, "balance_loss": 10.0},
            ]
        )
    shown = log.get_smoothed_values()
    assert shown["loss"] == pytest.approx(2 / math.log(2), abs=1e-3)
    assert shown["nll_loss"] == pytest.approx(1.5 / math.log(2), abs=1e-3)
    assert shown["ppl"] == pytest.approx(math.exp(1.5), abs=0.01)
    assert shown["balance_loss"] == pytest.approx(1.1, abs=1e-3)


def test_the_batch_is_doubled_with_a_pass_each() -> None:
    doubled = repeat_batch({"src_tokens": torch.tensor([[1, 2], [3, 4]]), "src_lengths": torch.tensor([2, 2])}, 2)
    assert doubled["src_tokens"].tolist() == [[1, 2], [3, 4], [1, 2], [3, 4]]
    assert doubled["pass_index"].tolist() == [0, 0, 1, 1]


def test_a_wrapped_model_is_found() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    inner = nn.Linear(1, 1)
    assert unwrap(Wrapper(Wrapper(inner))) is inner


def test_the_task_passes_the_routing_on(tiny_data: DataFolder) -> None:
    criterion = thor(tiny_data, 2, 3.0).build_criterion()
    assert (criterion.passes, criterion.consistency_weight) == (2, 3.0)
    assert isinstance(make_task(tiny_data).config, RunConfig)
