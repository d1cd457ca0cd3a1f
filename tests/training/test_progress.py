"""What the screen says of an update."""

from __future__ import annotations

from moe_train.training.progress import training_text


def test_what_found_no_expert_is_said() -> None:
    line = {"loss": 2.5, "lr": 1e-3, "words_per_second": 1234.0}
    assert training_text(line) == "loss 2.500, lr 1.00e-03, 1,234 words/s"
    assert training_text({**line, "exchange_dropped": 4224}).endswith("4,224 pairs beyond layout.fixed_rows")
    loads = {"load_max_over_mean": {"0": 1.5}, "dead_experts": 0, "dropped": 3, "dropped_fraction": 0.11}
    assert "load max/mean 1.50, dropped 11.0%" in training_text({**line, **loads})
