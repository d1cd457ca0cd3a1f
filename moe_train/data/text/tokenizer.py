"""The joint SentencePiece model: text to dictionary ids and back.

Ids are those of the data folder's fairseq dictionary. fairseq begins with <s>, <pad>, </s>, <unk>; SentencePiece
(trained with <unk> as its only special symbol) begins with <unk>. So id = piece + 3 for every piece, unless the
dictionary is an imported one, which has an order of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from moe_train.errors import DataError

OFFSET = 3
BOS, PAD, EOS, UNK = 0, 1, 2, 3


class Tokenizer:
    """Encodes sentences with a trained SentencePiece model.

    Args:
        path: the data folder's ``spm.model``.
        ids: dictionary id of each piece; None: piece + :data:`OFFSET`.

    Raises:
        DataError: the file is missing or not a SentencePiece model.
    """

    def __init__(self, path: Path | str, ids: Sequence[int] | NDArray[np.int64] | None = None) -> None:
        self.path = Path(path)
        try:
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_proto=self.path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"cannot read the SentencePiece model ({error})", str(path), "run moe-prepare again"
            ) from error
        self.ids = np.arange(len(self)) + OFFSET if ids is None else np.asarray(ids, dtype=np.int64)
        self._pieces = {int(number): piece for piece, number in reversed([*enumerate(self.ids)])}

    def __len__(self) -> int:
        """Number of pieces; the dictionary also has special symbols, tags and the mask."""
        return int(self._processor.get_piece_size())

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[Path, list[int]]]:
        return Tokenizer, (self.path, self.ids.tolist())

    @property
    def pieces(self) -> list[str]:
        """All pieces after <unk>, in the dictionary's order."""
        return [self._processor.id_to_piece(i) for i in range(1, len(self))]

    def encode(self, text: str) -> list[int]:
        """Dictionary ids of one sentence, without end symbol and tag."""
        return self.to_ids(self._processor.encode(text, out_type=int)).tolist()  # type: ignore[no-any-return]

    def to_ids(self, pieces: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Dictionary ids of raw SentencePiece numbers."""
        return self.ids[np.asarray(pieces, dtype=np.int64)]  # type: ignore[no-any-return]

    def encode_batch(self, lines: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Raw SentencePiece numbers (see :meth:`to_ids`) of many sentences, in ``threads`` native threads."""
        return self._processor.encode(list(lines), out_type=int, num_threads=threads)  # type: ignore[no-any-return]

    def decode(self, ids: Iterable[int]) -> str:
        """Detokenised text of dictionary ids, without end symbols, padding, tags and the mask."""
        pieces = [self._pieces[int(i)] for i in ids if int(i) in self._pieces]
        return self._processor.decode(pieces)  # type: ignore[no-any-return]

    def to_pieces(self, text: str) -> list[str]:
        """The pieces of one sentence as text, e.g. for fairseq's interactive tools."""
        return self._processor.encode(text, out_type=str)  # type: ignore[no-any-return]
