"""Program that another Python runs, for :mod:`moe_train.evaluation.scoring.comet`; it needs unbabel-comet alone.

Standard input has a line ``{"model", "batch_size", "gpus"}``, then a line ``{"src", "mt", "ref"}`` per sentence.
Standard output gets a line ``{"version", "model", "sha256"}``, then a line ``{"score"}`` per sentence.
"""

import hashlib
import json
import os
import sys
from importlib.metadata import version


def main() -> None:
    """Reads all lines, and writes as many."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    job, *segments = (json.loads(line) for line in sys.stdin.buffer)

    from comet import load_from_checkpoint

    model = load_from_checkpoint(job["model"])
    found = model.predict(segments, batch_size=job["batch_size"], gpus=job["gpus"], num_workers=0, progress_bar=False)
    digest = hashlib.sha256()
    with open(job["model"], "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    about = {"version": version("unbabel-comet"), "model": os.path.basename(job["model"]), "sha256": digest.hexdigest()}
    for answer in (about, *({"score": float(score)} for score in found.scores)):
        answers.write(json.dumps(answer) + "\n")
    answers.close()


if __name__ == "__main__":
    main()
