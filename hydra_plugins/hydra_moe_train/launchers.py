"""The launchers ``submitit_local`` and ``submitit_slurm``: Hydra finds launchers in ``hydra_plugins`` only."""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("hydra_plugins.hydra_submitit_launcher") is not None:
    from moe_train.launch.submitit_launcher import LocalJobs, SlurmJobs

    class LocalLauncher(LocalJobs):
        """Jobs of a sweep as processes of this host."""

    class SlurmLauncher(SlurmJobs):
        """Jobs of a sweep as a Slurm array."""
