"""What the scripts of the two network hosts plan, without any host: bytes and times of their variants."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def lab(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(root / "scripts" / "netlab"))
    return importlib.import_module("two_hosts")


def speeds(lab: Any, content: dict[str, Any], link: float, products: float) -> Any:
    """The machine as bare exchanges would find it: ``link`` GB/s between hosts, 10 inside, 1 ms for an empty one."""
    sent, empty = content["bare_bytes"], 1e-3
    seconds = {"bare_empty": empty, "bare_node": empty + sent / 10e9, "bare_across": empty + 4 * sent / (link * 1e9)}
    return lab.machine({**seconds, "products": products}, content)


def test_on_a_slow_link_times_go_as_the_bytes_between_hosts(lab: Any) -> None:
    content = lab.job("step", 512, 128, rounds=1, bare_bytes=2 << 20)
    slow = speeds(lab, content, 0.001, 1e-3)
    assert slow.bandwidth_across == pytest.approx(0.001) and slow.bandwidth_node == pytest.approx(10.0)
    sam, by_node, flat = (lab.predict(variant, content, slow) for variant in lab.VARIANTS)
    # A token goes to the other host with probability 1/2 under SAM, 1 - C(8,4)/C(16,4) = 0.96 under top-4 by node, and
    # to each of its two ranks with 1 - C(12,4)/C(16,4) = 0.73 else; gradients of dense weights travel besides.
    assert by_node / sam == pytest.approx(0.96 / 0.5, rel=0.06) and flat / sam == pytest.approx(1.46 / 0.5, rel=0.06)


def test_where_products_take_the_time_they_are_alike(lab: Any) -> None:
    content = lab.job("step", 512, 128, rounds=1, bare_bytes=2 << 20)
    fast = speeds(lab, content, 10.0, 100.0)
    sam, by_node, flat = (lab.predict(variant, content, fast) for variant in lab.VARIANTS)
    assert sam == pytest.approx(flat, rel=0.02) == by_node and sam > 90


def test_the_table_sets_measured_beside_planned(lab: Any) -> None:
    names = [variant["name"] for variant in lab.VARIANTS]
    report = {
        "ratio": {name: {"measured": 2.0, "predicted": 1.8} for name in names},
        "median_seconds": dict.fromkeys(names, 1.5),
        "predicted_seconds": dict.fromkeys(names, 1.2),
        "bytes_across": dict.fromkeys(names, 5e6),
    }
    assert list(lab.step_table(report))[-1] == "| top-4 | 5.00 | 1.500 | 2.00 | 1.200 | 1.80 | -10% |"


def test_two_sets_of_hosts_of_one_process_do_not_meet(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root / "scripts" / "netlab"))
    kind = importlib.import_module("hosts").Hosts
    one, other = kind(2), kind(2)
    assert not {one.hub, *one.names} & {other.hub, *other.names}
