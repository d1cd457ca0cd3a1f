"""Translates standard input with a trained run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task, TimeElapsedColumn
from rich.text import Text

from moe_train.config.evaluation import TranslateConfig
from moe_train.console import write_output
from moe_train.errors import DataError, plural
from moe_train.evaluation.inference.output_lines import OUTPUTS, join_translations
from moe_train.evaluation.inference.stream import buffers, check_languages, prompt
from moe_train.evaluation.inference.translation_model import TranslationModel
from moe_train.evaluation.loading import choose_device, open_run
from moe_train.evaluation.long_lines import cut_note, name_lines, sentence_parts
from moe_train.evaluation.translations import Translation
from moe_train.evaluation.translator import Translator
from moe_train.safe_text import for_terminal
from moe_train.screen import Screen


def translate_input(config: TranslateConfig) -> None:
    """Translates standard input to standard output, line by line (blank lines stay blank).

    Where both are a terminal it shows a prompt. Everything but translations is written to standard error.

    Raises:
        ConfigError, CheckpointError: as :func:`moe_train.evaluation.loading.open_run`.
        DataError: a language that the model does not know; or input that is closed, unreadable or not UTF-8.
        KeyboardInterrupt: Ctrl-C, also at the prompt.
        SystemExit: the output cannot be written (:func:`moe_train.console.end_without_output`).
    """
    if sys.stdin is None:  # Python's way to say that it was closed
        raise DataError("standard input is closed", remedy="redirect text to it: moe-translate … < FILE")
    console = Screen(stderr=True, highlight=False)
    if config.threads:
        torch.set_num_threads(config.threads)
    run = open_run(config.run, config.checkpoint, config.data, config.inference, verify=config.data_verify)
    run.translating_task  # noqa: B018  (raises before weights are read)
    source, target = config.source, config.target
    check_languages(source, target, run.data.languages)
    if f"{source}-{target}" not in run.trained:
        console.print(f"note: {source}-{target} was not trained in this run (zero-shot)")
    device = choose_device(config.device)
    model = TranslationModel(run.load(device), config.search, device)

    def print_note(note: str) -> None:
        console.print(f"note: {note}", markup=False, soft_wrap=True)

    translator = model.translator.with_settings(config.search, config.token_scores)
    split = config.long_lines == "split"
    translate = LineTranslator(translator, source, target, print_note, split, config.output, config.prefixes)
    if sys.stdin.isatty() and sys.stdout.isatty():
        console.print(f"{run.checkpoint.name}: type a sentence, or Ctrl-D to end")
        prompt(lambda line: translate([line]), source, target)
    else:
        _pipe(translate, config.buffer, console)


class LineTranslator:
    """Translates lines in buffers, and reports which of them are longer than the model's longest source.

    Args:
        report: called with a note that names lines by their numbers in the whole input.
        split: translate such lines in parts that end at sentence ends; else they are truncated.
        output: name of the form of a line's output, in :data:`OUTPUTS`.
        prefixes: a line is a sentence, a tab, and a target prefix, with which its translation begins.
    """

    def __init__(
        self,
        translator: Translator,
        source: str,
        target: str,
        report: Callable[[str], None],
        split: bool,
        output: str = "text",
        prefixes: bool = False,
    ) -> None:
        self._translator, self._source, self._target, self._report = translator, source, target, report
        self._split, self._output, self._prefixes = split, OUTPUTS[output], prefixes
        self._room = translator.task.source_room(f"{source}-{target}")
        self._done = 0  # lines of earlier buffers
        self._remedy_shown = False

    def __call__(self, lines: Sequence[str], progress: Callable[[int], None] | None = None) -> list[str]:
        """The output lines of the lines, ``search.n_best`` each as text; blank ones stay blank.

        ``progress`` as in :meth:`Translator.translate`.
        """
        pairs = [line.partition("\t")[::2] if self._prefixes else (line, "") for line in lines]
        parts = [self._parts(line) for line, _ in pairs]
        flat = [part for own in parts for part in own]
        forced = [text for own, (_, text) in zip(parts, pairs, strict=True) for text in (text, *[""] * (len(own) - 1))]
        rest = iter(self._translator.translate(flat, self._source, self._target, progress, forced))
        found = [[next(rest) for _ in own] for own in parts]
        self._report_long_lines(found)
        settings, first = self._translator.config, self._done + 1
        self._done += len(lines)
        joined = [join_translations(own, settings.length_penalty) for own in found]
        return [line for number, own in enumerate(joined, first) for line in self._output(number, own, settings.n_best)]

    def _parts(self, line: str) -> list[str]:
        if not self._split or self._fits(line):
            return [line]
        return sentence_parts(line, self._fits)

    def _fits(self, text: str) -> bool:
        return len(self._translator.task.folder.tokenizer().encode(text)) <= self._room

    def _report_long_lines(self, found: Sequence[Sequence[Translation]]) -> None:
        longest = self._translator.task.max_positions()[0]
        numbered = list(enumerate(found, self._done + 1))
        if several := [number for number, own in numbered if len(own) > 1]:
            self._report(f"{name_lines(several)}: longer than the model's {longest} tokens, translated in parts")
        if cut := [number for number, own in numbered if any(part.cut for part in own)]:
            remedy = ""
            if self._split:
                remedy = " (no sentence end found)"
            elif not self._remedy_shown:
                remedy, self._remedy_shown = "; long_lines=split translates such lines in parts, at sentence ends", True
            self._report(f"{cut_note(cut, longest)}{remedy}")


class _Translated(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"translated {plural(int(task.completed), 'sentence')}")


def _pipe(translate: LineTranslator, size: int, console: Console) -> None:
    columns = _Translated(), TimeElapsedColumn()
    with Progress(*columns, console=console, redirect_stdout=False) as progress:
        task = progress.add_task("", total=None)
        for buffer in buffers(sys.stdin.buffer, size):
            lines = translate(buffer, lambda count: progress.advance(task, count))
            if sys.stdout.isatty():
                lines = [for_terminal(line) for line in lines]
            write_output("".join(f"{line}\n" for line in lines).encode("utf-8"))
