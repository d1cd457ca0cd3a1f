"""The joint SentencePiece model: text to dictionary ids and back.

Ids are those of the data folder's fairseq dictionary. fairseq begins with <s>, <pad>, </s>, <unk>; SentencePiece
(trained with <unk> as its only special symbol) begins with <unk>. So id = piece + 3 for every piece.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from moe_train.errors import DataError

OFFSET = 3
BOS, PAD, EOS, UNK = 0, 1, 2, 3


class Tokenizer:
    """Encodes sentences with a trained SentencePiece model.

    Args:
        path: the data folder's ``spm.model``.

    Raises:
        DataError: the file is missing or not a SentencePiece model.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_proto=self.path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"cannot read the SentencePiece model ({error})", str(path), "run moe-prepare again"
            ) from error

    def __len__(self) -> int:
        """Number of pieces; the dictionary also has special symbols, tags and the mask."""
        return int(self._processor.get_piece_size())

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[Path]]:
        return Tokenizer, (self.path,)

    @property
    def pieces(self) -> list[str]:
        """All pieces after <unk>, in the dictionary's order."""
        return [self._processor.id_to_piece(i) for i in range(1, len(self))]

    def encode(self, text: str) -> list[int]:
        """Dictionary ids of one sentence, without end symbol and tag."""
        return [piece + OFFSET for piece in self._processor.encode(text, out_type=int)]

    def encode_batch(self, lines: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Raw SentencePiece numbers (add :data:`OFFSET`) of many sentences, in ``threads`` native threads."""
        return self._processor.encode(list(lines), out_type=int, num_threads=threads)  # type: ignore[no-any-return]

    def decode(self, ids: Iterable[int]) -> str:
        """Detokenised text of dictionary ids, without end symbols, padding, tags and the mask."""
        limit = len(self) + OFFSET
        return self._processor.decode([int(i) - OFFSET for i in ids if OFFSET <= int(i) < limit])  # type: ignore[no-any-return]

    def to_pieces(self, text: str) -> list[str]:
        """The pieces of one sentence as text, e.g. for fairseq's interactive tools."""
        return self._processor.encode(text, out_type=str)  # type: ignore[no-any-return]
