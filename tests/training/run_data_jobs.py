"""What ranks do in the tests of a run's data."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from moe_train.data import verification
from moe_train.data.folder import DataFolder
from moe_train.errors import DataError
from moe_train.training.run.run_data import verify_data
from moe_train.training.runtime.world import World


def verified(path: str, how: Any) -> tuple[list[str], str]:
    """The files that this rank has read for their checksums, and what was found wrong."""
    data, said = DataFolder.open(path), ""
    with mock.patch.object(verification, "sha256", wraps=verification.sha256) as reads:
        try:
            verify_data(data, SimpleNamespace(vocabulary=data), how, World.current())  # type: ignore[arg-type]
        except DataError as error:
            said = str(error)
    return [Path(call.args[0]).name for call in reads.call_args_list], said
