"""Measures the plan of a large corpus: anonymous memory of some processes, time of an epoch's turn, equal batches.

    python scripts/measure_windows.py FOLDER [pairs=200000000] [ranks=4]

Writes synthetic lengths as fairseq index files to FOLDER (24 bytes a pair) and a sparse file of tokens next to each,
unless they are there. Prints one JSON object.
"""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

CHUNK = 1 << 22


def write_side(prefix: Path, pairs: int, seed: int) -> None:
    """``prefix.idx`` with log-normal lengths, and ``prefix.bin`` of their size without content."""
    start = 0
    with prefix.with_suffix(".idx").open("wb") as sizes, prefix.with_suffix(".idx").open("r+b") as offsets:
        sizes.write(struct.pack("<9sQBQ", b"MMIDIDX\x00\x00", 1, 8, pairs))
        sizes.flush()
        offsets.seek(26 + 4 * pairs)
        for first in range(0, pairs, CHUNK):
            draws = np.random.default_rng([seed, first]).lognormal(3.1, 0.6, min(CHUNK, pairs - first))
            some = np.clip(draws, 2, 250).astype(np.int32)
            ends = start + 2 * np.cumsum(some, dtype=np.int64)
            sizes.write(some.tobytes())
            offsets.write((ends - 2 * some).tobytes())
            start = int(ends[-1])
    with prefix.with_suffix(".bin").open("wb") as tokens:
        tokens.truncate(start)


def anonymous() -> int:
    """Bytes of this process's anonymous memory."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


def rank(folder: Path, rank: int, ranks: int) -> None:
    """One process: plans as training does, and prints what it measured."""
    from moe_train.data.batching import BatchSettings, split_micro_batch
    from moe_train.data.windows import WindowedBatches
    from moe_train.tasks.indexed_dataset import SentenceFile
    from moe_train.tasks.translation.parallel_text import Direction, ParallelText, Tags

    imported, peak, ended = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            peak[0] = max(peak[0], anonymous())

    threading.Thread(target=watch, daemon=True).start()
    begun = time.monotonic()
    direction = Direction("en-de", SentenceFile(folder / "a"), SentenceFile(folder / "b"), Tags(None, 2, 0, 1), 0)
    text = ParallelText([direction], pad=1)
    opened = time.monotonic() - begun
    world = WindowedBatches(text.lengths, text.sizes, BatchSettings(8192), 2**20)
    planned = time.monotonic() - begun - opened
    digest, turn = hashlib.sha256(), world.updates_per_epoch

    def batch(u: int) -> tuple[float, float]:
        wall = time.monotonic()
        micro = world.update(u).micro_batches
        found = time.monotonic()
        for items in micro:
            text.sample(split_micro_batch(items, rank, ranks))
        taken = found - wall, time.monotonic() - found
        for items in micro:
            digest.update(items.tobytes())
        return taken

    batch(0)
    resumed = batch(turn * 5 // 2)[0]
    batch(turn - 1)
    time.sleep(20)  # the last window's updates would be computed now: the next epoch's first window is planned
    at_turn = [batch(u) for u in range(turn, turn + 5)]
    ended.set()
    print(
        json.dumps(
            {
                "opened_s": opened,
                "first_plan_s": planned,
                "resumed_s": resumed,
                "turn_plan_ms": [round(1000 * plan, 1) for plan, _ in at_turn],
                "turn_read_ms": [round(1000 * read, 1) for _, read in at_turn],
                "anonymous_peak_mb": (max(peak[0], anonymous()) - imported) / 1e6,
                "updates_per_epoch": turn,
                "batches": digest.hexdigest()[:16],
            }
        )
    )


def main(folder: Path, pairs: int = 200_000_000, ranks: int = 4) -> None:
    """Runs the ranks together, then one process alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate("ab"):
        index = folder / f"{name}.idx"
        if not index.exists() or index.stat().st_size != 26 + 12 * pairs:
            write_side(folder / name, pairs, seed)

    def run(count: int) -> list[dict[str, object]]:
        words = [[sys.executable, __file__, "rank", str(folder), str(r), str(count)] for r in range(count)]
        started = [subprocess.Popen(word, stdout=subprocess.PIPE, text=True) for word in words]
        return [json.loads(process.communicate()[0]) for process in started]

    together, alone = run(ranks), run(1)
    result = {
        "pairs": pairs,
        "ranks": together,
        "alone": alone,
        "anonymous_peak_mb_of_all": sum(float(str(r["anonymous_peak_mb"])) for r in together),
        "equal": len({str(r["batches"]) for r in together + alone}) == 1,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        rank(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        options = dict(word.split("=", 1) for word in sys.argv[2:])
        main(Path(sys.argv[1]), **{name: int(value) for name, value in options.items()})
