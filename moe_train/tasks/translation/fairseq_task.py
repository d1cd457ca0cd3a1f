"""The translation task on fairseq's command lines: ``--task moe_translation`` over a folder made by moe-prepare.

Batches are fairseq's there: sorted by length, cut under ``--max-tokens`` per rank, shuffled; every sentence comes once
an epoch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor, nn

from moe_train.config import ModelConfig, RunConfig, TaskConfig
from moe_train.data.folder import DataFolder
from moe_train.data.length_buckets import in_length_order
from moe_train.data.text.tokenizer import Tokenizer
from moe_train.errors import ConfigError
from moe_train.fairseq_compat import apply
from moe_train.tasks.base import Sample
from moe_train.tasks.flags import MoETranslationFlags
from moe_train.tasks.translation.parallel_text import Indices, ParallelText
from moe_train.tasks.translation.task import TranslationTask

apply()
from fairseq.data import FairseqDataset  # noqa: E402
from fairseq.tasks import FairseqTask, register_task  # noqa: E402

_log = logging.getLogger(__name__)
# in_length_order only needs an order here: the budget sets the width of its buckets.
_BUCKET_BUDGET = 4096


@register_task("moe_translation", dataclass=MoETranslationFlags)
class FairseqTranslationTask(TranslationTask):
    """The same task, configured by flags, with fairseq's interface."""

    def __init__(self, cfg: Any) -> None:
        folder = DataFolder.open(cfg.data)
        if not dist.is_initialized() or dist.get_rank() == 0:  # one of fairseq's ranks reads it for all
            folder.verify()
        super().__init__(RunConfig(data=cfg.data, seed=cfg.seed, task=_task_config(cfg)), folder)
        self.cfg = cfg

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> nn.Module:  # type: ignore[override]
        """The model by fairseq's registry, which calls :meth:`build_configured`."""
        return FairseqTask.build_model(self, cfg, from_checkpoint)  # type: ignore[no-any-return]

    def build_configured(self, model: ModelConfig, routing: Mapping[str, Any]) -> nn.Module:
        """The model of a composed config."""
        self.with_config(model=model, routing=routing)
        return super().build_model()

    def build_criterion(self, cfg: Any) -> nn.Module:  # type: ignore[override]
        """The criterion by fairseq's registry."""
        return FairseqTask.build_criterion(self, cfg)  # type: ignore[no-any-return]

    def load_dataset(self, split: str, combine: bool = False, task_cfg: Any = None, **unused: Any) -> None:
        """Opens a split; with a checkpoint's ``task_cfg`` the tags are those that its model was trained with."""
        if task_cfg is not None:
            self.cfg.source_tag, self.cfg.target_tag = task_cfg.source_tag, task_cfg.target_tag
            self.with_config(task=_task_config(self.cfg))
        self.datasets[split] = PairDataset(self.split(split), shuffle=split == "train")

    def inference_step(
        self, generator: Any, models: Any, sample: Sample, prefix_tokens: Any = None, constraints: Any = None
    ) -> Any:
        """Beam search from the direction's first token."""
        first = sample["net_input"].pop("prev_output_tokens", None)
        start = self.decoder_prefix(self._only_direction()) if first is None else int(first[0, 0])
        return generator.generate(models, sample, prefix_tokens=prefix_tokens, constraints=constraints, bos_token=start)

    def build_bpe(self, args: Any) -> Any:
        """``--bpe`` if given, else the folder's SentencePiece model, so that D- lines are plain text."""
        return FairseqTask.build_bpe(self, args) or FolderPieces(self.folder.tokenizer(), self.dictionary)

    def build_dataset_for_inference(
        self, src_tokens: Sequence[Tensor], src_lengths: Sequence[int], **unused: Any
    ) -> FairseqDataset:
        """Typed sentences (ids and an end), for ``moe-fairseq interactive``."""
        direction = self._only_direction()
        source, target = direction.split("-")
        for number, tokens in enumerate(src_tokens, 1):
            if len(tokens) - 1 > (room := self.source_room(direction)):
                _log.warning("sentence %d of %d tokens was cut to the model's first %d", number, len(tokens) - 1, room)
        samples = [
            self.inference_sample([tokens[:-1]], source, target, [number]) for number, tokens in enumerate(src_tokens)
        ]
        return TypedDataset(samples, self.dictionary.pad())

    def _only_direction(self) -> str:
        if len(self.directions) != 1:
            raise ConfigError("the direction is not known", remedy="give --source-lang and --target-lang")
        return self.directions[0]


def _task_config(cfg: Any) -> TaskConfig:
    chosen = tuple(filter(None, cfg.directions.split(",")))
    if cfg.source_lang and cfg.target_lang:
        chosen = (f"{cfg.source_lang}-{cfg.target_lang}",)
    for tag in (cfg.source_tag, cfg.target_tag):
        if tag not in ("source", "target", "none"):
            raise ConfigError(f"a tag cannot be '{tag}'", remedy="choose source, target or none")
    return TaskConfig(directions=chosen, source_tag=cfg.source_tag, target_tag=cfg.target_tag)


class PairDataset(FairseqDataset):  # type: ignore[misc]
    """:class:`ParallelText` for fairseq's iterators: an item is its number until the batch is made."""

    def __init__(self, text: ParallelText, shuffle: bool) -> None:
        self.text, self.shuffle = text, shuffle
        self.src_sizes, self.tgt_sizes = text.source_lengths, text.target_lengths
        self.sizes = np.maximum(self.src_sizes, self.tgt_sizes)

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, index: int) -> int:
        return int(index)

    def collater(self, samples: Sequence[int]) -> Sample:
        """The batch of these items; an empty dict where there are none, as fairseq expects."""
        return self.text.sample(np.asarray(samples, np.int64)) if len(samples) else {}

    def num_tokens(self, index: int) -> int:
        """Tokens of the longer side, which ``--max-tokens`` limits."""
        return int(self.sizes[index])

    def num_tokens_vec(self, indices: Indices) -> Indices:
        """:meth:`num_tokens` of many."""
        return self.sizes[indices]  # type: ignore[no-any-return]

    def size(self, index: int) -> tuple[int, int]:
        """Source and target tokens."""
        return int(self.src_sizes[index]), int(self.tgt_sizes[index])

    def ordered_indices(self) -> Indices:
        """Short to long; fairseq seeds NumPy's generator around this call."""
        order = np.random.permutation(len(self)) if self.shuffle else np.arange(len(self))  # noqa: NPY002
        return order[in_length_order(self.src_sizes[order], self.tgt_sizes[order], _BUCKET_BUDGET)]


class TypedDataset(FairseqDataset):  # type: ignore[misc]
    """Typed sentences, one sample each until they are batched."""

    def __init__(self, samples: Sequence[Sample], pad: int) -> None:
        self.samples, self.pad = samples, pad
        self.sizes = np.array([int(s["net_input"]["src_lengths"][0]) for s in samples], np.int64)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> int:
        return int(index)

    def collater(self, samples: Sequence[int]) -> Sample:
        """Right-pads the sources."""
        from fairseq.data import data_utils
        from torch import cat

        parts = [self.samples[i] for i in samples]
        net_input = {name: cat([p["net_input"][name] for p in parts]) for name in _PER_SENTENCE}
        tokens = [p["net_input"]["src_tokens"][0] for p in parts]
        net_input["src_tokens"] = data_utils.collate_tokens(tokens, self.pad)
        return {"id": cat([p["id"] for p in parts]), "nsentences": len(parts), "net_input": net_input}

    def num_tokens(self, index: int) -> int:
        """Source tokens."""
        return int(self.sizes[index])

    def size(self, index: int) -> int:
        """Source tokens."""
        return int(self.sizes[index])


_PER_SENTENCE = ("src_lengths", "prev_output_tokens", "sentence_uid", "src_lang", "tgt_lang")


class FolderPieces:
    """The folder's SentencePiece model in the form of a fairseq BPE."""

    def __init__(self, tokenizer: Tokenizer, dictionary: Any) -> None:
        self.tokenizer, self.dictionary = tokenizer, dictionary

    def encode(self, text: str) -> str:
        """Text to pieces, joined by spaces."""
        return " ".join(self.tokenizer.to_pieces(text))

    def decode(self, text: str) -> str:
        """Pieces joined by spaces to text, tags left out; text that ``--post-process`` has joined is unchanged."""
        if _WORD_START not in text:
            return text
        return self.tokenizer.decode(self.dictionary.index(piece) for piece in text.split(" "))


_WORD_START = "\u2581"  # SentencePiece's mark of a space; every sentence that has not been joined begins with it
