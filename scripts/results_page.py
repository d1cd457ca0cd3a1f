"""Makes one HTML page over the committed results of the studies (results/*.json).

scripts/results_page.py                       # writes results/index.html, which git ignores
scripts/results_page.py FOLDER --out PAGE
"""

from __future__ import annotations

import argparse
from pathlib import Path

from moe_train.analysis.report.study_page import study_page
from moe_train.utils.atomic_io import replace_text

RESULTS = Path(__file__).resolve().parents[1] / "results"


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--out", type=Path, default=None, help="the page; index.html in the folder if not given")
    options = parser.parse_args(arguments)
    out = options.out or options.folder / "index.html"
    replace_text(out, study_page(options.folder))
    print(f"written: {out}")


if __name__ == "__main__":
    main()
