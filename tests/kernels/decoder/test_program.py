"""Products and attention of a decoder's step by C kernels, against plain formulas, in any number of threads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from moe_train.kernels.cpu import thread_pool
from moe_train.kernels.decoder.program import (
    PackedExperts,
    Program,
    State,
    WeightFormat,
    addresses,
    continue_hypotheses,
    is_supported,
    pack,
)

pytestmark = pytest.mark.skipif(not is_supported(torch.zeros(1)), reason="no matrix units (AMX) here, or no C compiler")
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "int8": 2e-2}  # of the product's scale


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(
    st.integers(1, 70),
    st.integers(1, 150),
    st.integers(1, 100),
    st.sampled_from(["fp32", "bf16", "int8"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_products(
    rows: int, inputs: int, outputs: int, kind: WeightFormat, normed: bool, relu: bool, add: bool
) -> None:
    x, weight, bias, before = draw(1, rows, inputs), draw(2, outputs, inputs), draw(3, outputs), draw(4, rows, outputs)
    norm, found, program = nn.LayerNorm(inputs), before.clone(), Program(rows)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    program.product(x, pack(weight, kind), found, bias, norm if normed else None, relu, add)
    program.run(State(sentences=rows, beam=1))
    with torch.no_grad():
        wanted = F.linear(norm(x) if normed else x, weight, bias)
        scale = (norm(x) if normed else x).norm(dim=1, keepdim=True) * weight.norm(dim=1)
    wanted = (F.relu(wanted) if relu else wanted) + (before if add else 0)
    assert ((found - wanted).abs() <= TOLERANCE[kind] * scale + 1e-5).all()


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_a_row_does_not_depend_on_the_others(kind: WeightFormat) -> None:
    x, weight = draw(1, 40, 100), pack(draw(2, 50, 100), kind)
    x[7] *= 1e4

    def product(rows: Tensor) -> Tensor:
        to, program = torch.empty(rows.shape[0], 50), Program(rows.shape[0])
        program.product(rows, weight, to)
        program.run(State(sentences=rows.shape[0], beam=1))
        return to

    assert torch.equal(product(x)[20], product(x[20:21].clone())[0])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dim", [24, 64])
def test_attention_over_the_own_ancestors(threads: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hypotheses continue others at random, and the middle sentence leaves."""
    monkeypatch.setattr(thread_pool, "_MIN_PARALLEL_FLOPS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    batch, beam, heads, steps = 3, 4, 2, 9
    tables = {
        "place": torch.arange(batch),
        "table": torch.zeros(batch, beam, steps, dtype=torch.int32),
        "source_start": torch.tensor([0, 5, 6]),
        "source_length": torch.tensor([5, 1, 3]),
    }
    shape = {"heads": heads, "dim": dim, "room": steps, "slots": beam * steps}
    state = State(sentences=batch, beam=beam, **shape, **addresses(**tables))
    qkv, memory = torch.empty(batch * beam, 3 * dim), draw(5, 9, 2 * dim)
    keys, values = torch.empty(2, batch, beam * steps, dim).unbind(0)
    own, cross = torch.empty(2, batch * beam, dim).unbind(0)
    program = Program(batch * beam)
    program.self_attention(qkv, keys, values, own)
    program.cross_attention(qkv.view(-1, 3 * dim)[:, :dim].contiguous(), memory, cross)
    query = program._kept[-4]
    past: list[Tensor] = [torch.empty(0, 2 * dim)] * (batch * beam)
    left, order = list(range(batch)), None
    for step in range(steps):
        rows = len(left) * beam
        qkv[:rows] = draw(step, rows, 3 * dim)
        query[:rows] = qkv[:rows, :dim]
        continue_hypotheses(state, order, len(left))
        program.run(state)
        state.position += 1
        past = [torch.cat([past[r], qkv[r : r + 1, dim:]]) for r in range(rows)]
        for row in range(rows):
            sentence = left[row // beam]
            start, count = int(tables["source_start"][sentence]), int(tables["source_length"][sentence])
            for found, history in ((own, past[row]), (cross, memory[start : start + count])):
                q, k, v = (part.reshape(-1, heads, dim // heads) for part in (qkv[row, :dim], *history.split(dim, 1)))
                weights = torch.einsum("qhc,thc->ht", q, k).div((dim // heads) ** 0.5).softmax(1)
                wanted = torch.einsum("ht,thc->hc", weights, v).reshape(-1)
                torch.testing.assert_close(found[row], wanted, rtol=1e-5, atol=1e-5)
        kept = [0, 2] if step == 4 else list(range(len(left)))
        parents = torch.randint(beam, (len(kept), beam), generator=torch.Generator().manual_seed(step))
        order = (torch.tensor(kept)[:, None] * beam + parents).view(-1)
        left, past = [left[i] for i in kept], [past[i] for i in order.tolist()]
    assert left == [0, 2]


def test_rows_of_different_sentences_are_refused() -> None:
    tables = {"place": torch.arange(2), "table": torch.zeros(2, 2, 3, dtype=torch.int32)}
    state = State(sentences=2, beam=2, room=3, slots=6, **addresses(**tables))
    for rows in ([0, 2, 3, 3], [2, 3, 0, 1]):
        with pytest.raises(ValueError, match="beams of one sentence"):
            continue_hypotheses(state, torch.tensor(rows), 2)


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any),
    st.integers(1, 80),
    st.integers(1, 80),
    st.sampled_from(["fp32", "bf16", "int8"]),
    st.booleans(),
)
def test_experts(counts: list[int], dim: int, hidden: int, kind: WeightFormat, biased: bool) -> None:
    experts = len(counts)
    x, w1, w2 = draw(1, sum(counts), dim), draw(2, experts, hidden, dim), draw(3, experts, dim, hidden)
    b1, b2 = (draw(4, experts, hidden), draw(5, experts, dim)) if biased else (None, None)
    found = PackedExperts([pack(w, kind) for w in w1], b1, [pack(w, kind) for w in w2], b2).run(x, counts)
    wanted, scale = [], []
    for e, rows in enumerate(x.split(counts)):
        inner = F.relu(F.linear(rows, w1[e], None if b1 is None else b1[e]))
        wanted.append(F.linear(inner, w2[e], None if b2 is None else b2[e]))
        most = F.linear(rows.abs(), w1[e].abs()) + (0 if b1 is None else b1[e].abs())
        scale.append(F.linear(most, w2[e].abs()) + 1)
    assert ((found - torch.cat(wanted)).abs() <= 3 * TOLERANCE[kind] * torch.cat(scale)).all()
