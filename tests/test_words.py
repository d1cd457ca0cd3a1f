"""Names and words that were replaced do not come back: plain technical English in the field's terms."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

# Files of moe_train, by their stems.
OLD_FILES = """
    about after_training background board candidates catalogues cutting drawing draws expected extension guard hooks
    in_step initial integrity interfaces joining journal keeper leaving measured meeting menders overlap peers
    perturb pulse records reuse selection sharding standing steps storage submitted tensor_files ungated verdict
""".split()  # noqa: SIM905
# Classes and functions of moe_train, methods included.
OLD_DEFINITIONS = """
    Alone AskedToStop Background Beat Board Cargo Display Encoded Flight Held Inner Keeper Loop Outcome Parts Peers
    ProcessRanks Pulse Ranks Records Routed SampleLoader Seal SearchableModel Spread Stepper Sums TokenRows Trip
    Words _agent_was_told _asked _beat_of _beats _culprit _fallen_silent _give_up_old _give_way _go_on _judge
    _judged _last_words _leave _mend _passing_on_signals _put_down _say_once _telling _told _unheard _verdict
    _welcome affine affine_into agents_file agree batched_affine blas_is_at_home born carry clip_gradients come_back
    culprits decode_in_step depart die_with displaced everywhere forget_folder fullest_part fullest_share give_slots
    is_awaited joining judge lend mix_rows most_choices outer_into over_parts retold said_by said_once
    same_on_replicas say_error say_interrupted say_unread serves settle take_place tell_agent told told_number
    travel ungated unlike_sets way_out world_aside world_tokens
""".split()  # noqa: SIM905
# Functions and classes of one module, whose names are right elsewhere: (file, name).
OLD_PLACES = [
    ("parallel/permute.py", "gather_rows"),
    ("routing/all_gather.py", "gather_rows"),
    ("routing/expected_load.py", "Choices"),
    ("routing/token_choice.py", "Scores"),
    ("training/metrics/interval.py", "Interval"),
]

# Words that are wrong in any prose: pattern (whole words, capitals as written) -> what to say.
WRONG = {
    "comes? back|came back": "is returned, is sent back",
    "travels?|travelled": "is sent",
    "for ever|anew": "always, again",
    "so many": "N",
    "fullest": "largest load",
    "Trip|Cargo|Flight|Keeper": "dispatch, inputs, AllToAll, CheckpointManager",
    "come_back|go_on": "combine, resume",
    "such a one": "one",
    "by hand of|whosoever|whence|thereof|therein": "plain English",
    "[Bb]eside(?!:)": "with, compared with, next to",  # an attribute has the name
    "[Ww]hoever": "the rank that, anyone who",
    "said once": "printed once",
    "(?:goes|go|going|went) on": "resumes, continues",
    "[Nn]obody": "no rank, none",
    "mends?|mended": "correct, fix",
    "(?:is|are|was|were) (?:told|said)": "is printed, is named",
    "foresees?|foretells?": "predicts",
    "lends?|lent": "gives",
    "culprits?": "blocking ranks",
    "asked to stop": "interrupted",
}
# Words that are wrong in the documents. A word goes to WRONG when the code is free of it, too.
WRONG_IN_DOCUMENTS = {
    "verdicts?": "diagnosis",
}


def definitions(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)}


def test_replaced_files_and_definitions_are_gone(root: Path) -> None:
    package = root / "moe_train"
    files = list(package.rglob("*.py"))
    assert len(files) > 200 and not {path.stem for path in files} & set(OLD_FILES)
    found = {path: definitions(path) for path in files}
    assert "MoELayer" in set.union(*found.values())
    assert not {
        str(path): names & set(OLD_DEFINITIONS) for path, names in found.items() if names & set(OLD_DEFINITIONS)
    }
    assert not [(file, name) for file, name in OLD_PLACES if name in found.get(package / file, ())]


def prose_of_code(source: str) -> Iterator[tuple[int, str]]:
    """Comments and strings (docstrings and messages) with their lines."""
    middle = getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)  # of f-strings, from Python 3.12 on
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING, middle):
            yield token.start[0], token.string


def documents(root: Path) -> Iterator[tuple[Path, int, str]]:
    """README, CONTRIBUTING, the pages but for decisions, unreleased changes, configs' comments, the Dockerfile's."""
    pages = [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").glob("*.md"))]
    for path in [*pages, *sorted((root / "configs").rglob("*.yaml")), root / "Dockerfile"]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            yield path, number, line if path.suffix == ".md" else line.partition("#")[2]
    changes = (root / "CHANGELOG.md").read_text(encoding="utf-8").partition("## [0.1.0]")[0]
    yield from ((root / "CHANGELOG.md", number, line) for number, line in enumerate(changes.splitlines(), 1))


def code(root: Path) -> Iterator[tuple[Path, int, str]]:
    """Comments, docstrings and messages of the package, its Hydra plug-ins and the scripts."""
    for folder in ("moe_train", "hydra_plugins", "scripts"):
        for path in sorted((root / folder).rglob("*.py")):
            for number, text in prose_of_code(path.read_text(encoding="utf-8")):
                yield from ((path, number + i, line) for i, line in enumerate(text.splitlines()))
        for path in sorted(p for end in ("sh", "sbatch") for p in (root / folder).rglob(f"*.{end}")):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                yield path, number, line


def wrong(lines: Iterator[tuple[Path, int, str]], words: dict[str, str]) -> list[str]:
    patterns = {re.compile(rf"\b(?:{pattern})\b"): better for pattern, better in words.items()}
    return [
        f"{path}:{number}: {found.group()} -> {better}"
        for path, number, line in lines
        for pattern, better in patterns.items()
        if (found := pattern.search(line))
    ]


def test_documents_are_plain(root: Path) -> None:
    assert not wrong(documents(root), {**WRONG, **WRONG_IN_DOCUMENTS})


def test_comments_docstrings_and_messages_are_plain(root: Path) -> None:
    assert not wrong(code(root), WRONG)


@pytest.mark.parametrize(
    "text", ["# a Trip\n", "def f():\n    '''Such.\n\n    A Keeper.'''\n", "x = f'{1} such a one'\n"]
)
def test_the_check_sees_what_it_should(text: str) -> None:
    assert wrong(((Path("x"), number, line) for number, line in prose_of_code(text)), WRONG)
