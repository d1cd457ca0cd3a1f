"""Notes for the user before a session begins."""

from __future__ import annotations

import math

from moe_train.config import RunConfig
from moe_train.training.checkpoint.store import CheckpointStore
from moe_train.training.optim.lr_schedule import learning_rate
from moe_train.training.optim.schedule_extension import ends_with_session, run_ends
from moe_train.training.run.run_folder import RunFolder


def session_notes(folder: RunFolder, config: RunConfig) -> list[str]:
    """Notes on a session that is about to begin or resume the run in ``folder``."""
    notes, optimizer = [], config.training.optimizer
    if optimizer.weight_decay and optimizer.name != "adamw":
        notes.append(
            f"training.optimizer.name={optimizer.name} adds weight_decay to the gradient (L2);"
            " fairseq's adam decays decoupled, as adamw does here"
        )
    if folder.exists and folder.note_on_user_dir:
        notes.append(folder.note_on_user_dir)
    if folder.exists and (jump := _jump_of_rate(folder, config)):
        notes.append(jump)
    return notes


def _jump_of_rate(folder: RunFolder, config: RunConfig) -> str:
    """A note that another ``max_updates`` changes the learning rate of the next update; "" if it does not."""
    before, info = folder.config, folder.info
    done = max(CheckpointStore(folder.checkpoints).updates(), default=0)
    ends = ends_with_session(info, before, config)
    if not done or (ends and ends[-1].update == done and ends[-1].extend):  # asked for
        return ""
    rates = []
    for each, its_ends in ((before, run_ends(info)), (config, ends)):
        peak, last = each.training.optimizer.lr, each.training.max_updates
        rates.append(learning_rate(each.training.schedule, peak, last, done + 1, its_ends))
    if math.isclose(*rates, rel_tol=1e-6, abs_tol=1e-12):
        return ""
    text = (
        f"the learning rate of update {done + 1} is {rates[1]:.3g} where the config of the session before gives"
        f" {rates[0]:.3g}: the schedule '{config.training.schedule.name}' ends at training.max_updates,"
        f" {before.training.max_updates} then and {config.training.max_updates} now"
    )
    choices = "training.schedule.extend=hold keeps the last rate, restart gives the further updates their own schedule"
    return f"{text}. {choices}" if folder.finished else text
