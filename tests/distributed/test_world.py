"""The ranks that tests run on: what goes wrong there ends them, so that no answer is taken for another's."""

from __future__ import annotations

import time

import pytest

from tests.distributed.world import Worlds

pytestmark = pytest.mark.processes


def test_a_call_that_was_given_up_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    worlds = Worlds()
    try:
        given_up = worlds(1)
        with monkeypatch.context() as hurried:
            hurried.setattr("tests.distributed.world.TIMEOUT", 0.05)
            with pytest.raises(TimeoutError, match="rank 0 of 1 gave no answer"):
                given_up.run(time.sleep, 0.3)
        assert not given_up.usable() and worlds(1) is not given_up
        assert worlds(1).run(abs, -4) == [4], "and not sleep's None"
        with pytest.raises(RuntimeError, match="rank 0:"):
            worlds(1).run(divmod, 1, 0)
    finally:
        worlds.close()
