from __future__ import annotations

import pytest

from tests.required import skip_or_fail


def test_a_skip_of_what_must_be_there_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REQUIRE_SLURM", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no Slurm"):
        skip_or_fail("slurm", "no Slurm")
    monkeypatch.setenv("REQUIRE_SLURM", "1")
    with pytest.raises(pytest.fail.Exception, match="no Slurm; REQUIRE_SLURM is set"):
        skip_or_fail("slurm", "no Slurm")
