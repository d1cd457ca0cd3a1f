"""The Python interface: a trained model that translates, scores translations, and shows the experts of tokens."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moe_train.config import SearchConfig, build
from moe_train.config.evaluation import Inference
from moe_train.config.run import DataVerify
from moe_train.errors import ConfigError, DataError
from moe_train.evaluation.inference.stream import check_languages
from moe_train.evaluation.inference.token_experts import find_experts
from moe_train.evaluation.loading import LoadedRun, choose_device, open_run
from moe_train.evaluation.translations import SentenceExperts, Translation
from moe_train.evaluation.translator import EncodedLines, Translator, encode

Progress = Callable[[int], None]


def load(
    path: Path | str,
    *,
    device: str | torch.device = "auto",
    checkpoint: str | int = "best",
    data: Path | str | None = None,
    data_verify: DataVerify = "once",
    routing: Mapping[str, Any] | None = None,
    draw_seed: int | None = None,
    **search: Any,
) -> TranslationModel:
    """Loads a trained model.

    Args:
        path: a run folder of ``moe-train``, or an export of ``moe-export``.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda``, ``cuda:1`` …
        checkpoint: ``best``, ``last``, ``averaged`` or an update's number; an export has one.
        data: the data folder, if it has moved since training.
        data_verify: when its files are compared with their checksums: ``always``, ``once`` or ``never``.
        routing: keys of the strategy that may change after training, such as ``{"inference": "ensemble"}``.
        draw_seed: seed of strategies that draw experts at inference; None: the run's seed.
        search: keys of ``configs/search/default.yaml``, such as ``beam=4``, for every call that has no others.

    Raises:
        ConfigError: no run folder, a task that does not translate, or an invalid key.
        CheckpointError: the checkpoint is missing or damaged.
        DataError: the data folder is missing or damaged.
        LaunchError: ``cuda`` without a GPU.
    """
    settings = build(SearchConfig, search, "search")
    chosen = choose_device(device) if device in ("auto", "cpu", "cuda") else _device(device)
    run = open_run(path, checkpoint, data, Inference(routing or {}, draw_seed), verify=data_verify)
    run.translating_task  # noqa: B018  (raises before weights are read)
    return TranslationModel(run.load(chosen), settings, chosen)


def _device(name: str | torch.device) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError:
        raise ConfigError(f"there is no device '{name}'", "device", "choose auto, cpu, cuda or cuda:N") from None


class TranslationModel:
    """A trained model on a device. Calls from several threads wait for each other.

    Args:
        run: with its model on ``device``.
        search: settings of calls that have no others.

    Attributes:
        run: the opened run: folder, config, task and checkpoint.
        translator: translates with ``search``.
        languages: codes of the model's languages.
        directions: directions that were trained, such as "en-de"; the model translates others too (zero-shot).
    """

    def __init__(self, run: LoadedRun, search: SearchConfig | None = None, device: torch.device | str = "cpu") -> None:
        self.run = run
        self.translator = Translator(run.translating_task, run.model, search or SearchConfig(), device)
        self.languages: tuple[str, ...] = tuple(run.data.languages)
        self.directions = run.trained
        self._lock = threading.Lock()

    def translate(
        self,
        sentences: Sequence[str],
        source: str,
        target: str,
        *,
        beam: int | None = None,
        n_best: int | None = None,
        return_scores: bool = False,
        return_experts: bool = False,
        prefixes: Sequence[str] = (),
        progress: Progress | None = None,
        **search: Any,
    ) -> list[Translation]:
        """Translates sentences of one direction.

        Args:
            sentences: in any order; they are sorted by length and searched in batches. A blank one stays blank.
            source, target: language codes.
            beam: hypotheses per sentence in the search.
            n_best: of these in the result, :attr:`Translation.hypotheses`.
            return_scores: the result has the log-probability of each token. (``score`` is always there.)
            return_experts: the result has the experts of source and translation (of the best hypothesis).
            prefixes: a text for each sentence with which its translation begins ("": none); empty: none.
            progress: called after each batch, with its number of sentences.
            search: further keys of ``configs/search/default.yaml``, such as ``sampling=True, top_p=0.9``.

        Returns:
            A translation for each sentence, in their order.

        Raises:
            ConfigError: an invalid key.
            DataError: an unknown language, or not as many prefixes as sentences.
        """
        lines = self._checked(sentences, source, target)
        if prefixes and len(prefixes) != len(lines):
            raise DataError(f"{len(prefixes)} prefixes for {len(lines)} sentences")
        given = {"beam": beam, "n_best": n_best, **search}
        changes = {key: value for key, value in given.items() if value is not None}
        settings = build(SearchConfig, {**dataclasses.asdict(self.translator.config), **changes}, "search")
        with self._lock:
            translator = self.translator.with_settings(settings, return_scores)
            found = translator.translate(lines, source, target, progress, prefixes)
            if return_experts:
                experts = self._experts(lines, [self._ids(one) for one in found], source, target)
                found = [
                    dataclasses.replace(one, experts=own) if one.pieces else one
                    for one, own in zip(found, experts, strict=True)
                ]
        return found

    def score(
        self, pairs: Sequence[tuple[str, str]], source: str, target: str, *, progress: Progress | None = None
    ) -> list[Translation]:
        """Log-probabilities of given translations: of each token and, as ``score``, of the whole with its end.

        Args:
            pairs: (sentence, translation).

        Returns:
            For each pair the translation, with ``pieces`` and ``token_scores`` (nats).

        Raises:
            DataError: an unknown language.
        """
        lines = self._checked([sentence for sentence, _ in pairs], source, target)
        tokenizer = self.translator.task.folder.tokenizer()
        targets = [tokenizer.encode(translation) for _, translation in pairs]
        with self._lock:
            encoded = self._encoded(lines, targets, source, target)
            found = encoded.to_lines(self.translator.run_all(encoded, progress))
        return [dataclasses.replace(one, text=translation) for one, (_, translation) in zip(found, pairs, strict=True)]

    def routing(
        self, sentences: Sequence[str], source: str, target: str, *, translations: Sequence[str] | None = None
    ) -> list[SentenceExperts]:
        """The experts of each token, layer and choice, in encoder and decoder.

        Args:
            translations: the decoder's input for each sentence; None: the model's own translation.

        Raises:
            DataError: an unknown language, or not as many translations as sentences.
        """
        lines = self._checked(sentences, source, target)
        if translations is not None and len(translations) != len(lines):
            raise DataError(f"{len(translations)} translations for {len(lines)} sentences")
        tokenizer = self.translator.task.folder.tokenizer()
        with self._lock:
            if translations is None:
                targets = [self._ids(found) for found in self.translator.translate(lines, source, target)]
            else:
                targets = [tokenizer.encode(text) for text in translations]
            return self._experts(lines, targets, source, target)

    def _checked(self, sentences: Sequence[str], source: str, target: str) -> list[str]:
        if isinstance(sentences, str):
            raise TypeError("sentences must be a list of strings, not one string")
        check_languages(source, target, self.languages)
        return list(sentences)

    def _ids(self, translation: Translation) -> list[int]:
        """The dictionary's ids of a translation, without the end."""
        dictionary = self.translator.task.target_dictionary
        return [dictionary.index(piece) for piece in translation.pieces[:-1]]

    def _encoded(
        self, lines: Sequence[str], targets: Sequence[Sequence[int]], source: str, target: str
    ) -> EncodedLines:
        task = self.translator.task
        return encode(task, lines, source, target, self.translator.config.batch_tokens, targets=targets)

    def _experts(
        self, lines: Sequence[str], targets: Sequence[Sequence[int]], source: str, target: str
    ) -> list[SentenceExperts]:
        encoded, dictionary = self._encoded(lines, targets, source, target), self.translator.task.target_dictionary
        found: dict[int, SentenceExperts] = {}
        for batch, numbers in zip(encoded.batches, encoded.lines, strict=True):
            experts = find_experts(self.run.model, self.translator.net_input(batch), batch.targets or (), dictionary)
            found.update(zip(numbers, experts, strict=True))
        return [found[number] for number in range(len(lines))]
