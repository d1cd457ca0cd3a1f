"""Translating standard input with a trained run."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task, TimeElapsedColumn
from rich.text import Text

from moe_train.config.evaluation import TranslateConfig
from moe_train.console import write_output
from moe_train.errors import DataError, plural
from moe_train.evaluation.decoding import Translator
from moe_train.evaluation.loading import choose_device, open_run
from moe_train.evaluation.stream import buffers, check_languages, prompt
from moe_train.safe_text import for_terminal
from moe_train.screen import Screen

Translate = Callable[[list[str], Callable[[int], None] | None], list[str]]


def translate_input(config: TranslateConfig) -> None:
    """Standard input to standard output, line by line (blank lines stay blank); a prompt where both are a terminal.

    Everything that is not a translation goes to standard error.

    Raises:
        ConfigError, CheckpointError: as :func:`moe_train.evaluation.loading.open_run`.
        DataError: a language that the model does not know; input that is closed, cannot be read or is not UTF-8.
        KeyboardInterrupt: Ctrl-C, at the prompt too.
        SystemExit: the output cannot be written (:func:`moe_train.console.end_without_output`).
    """
    if sys.stdin is None:  # so Python says that it was closed
        raise DataError("standard input is closed", remedy="give it text: moe-translate … < FILE")
    console = Screen(stderr=True, highlight=False)
    if config.threads:
        torch.set_num_threads(config.threads)
    run = open_run(config.run, config.checkpoint, config.data, config.inference, verify=config.data_verify)
    source, target = config.source, config.target
    check_languages(source, target, run.data.languages)
    if f"{source}-{target}" not in run.trained:
        console.print(f"note: {source}-{target} was not trained in this run (zero-shot)")
    device = choose_device(config.device)
    translator = Translator(run.task, run.load(device).model, config.search, device)

    def translate(lines: list[str], done: Callable[[int], None] | None = None) -> list[str]:
        return [translation.text for translation in translator.translate(lines, source, target, done)]

    if sys.stdin.isatty() and sys.stdout.isatty():
        console.print(f"{run.checkpoint.name}: type a sentence, or Ctrl-D to leave")
        prompt(lambda line: translate([line])[0], source, target)
    else:
        _pipe(translate, config.buffer, console)


class _Translated(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"translated {plural(int(task.completed), 'sentence')}")


def _pipe(translate: Translate, size: int, console: Console) -> None:
    columns = _Translated(), TimeElapsedColumn()
    with Progress(*columns, console=console, redirect_stdout=False) as progress:
        task = progress.add_task("", total=None)
        for buffer in buffers(sys.stdin.buffer, size):
            lines = translate(buffer, lambda count: progress.advance(task, count))
            if sys.stdout.isatty():
                lines = [for_terminal(line) for line in lines]
            write_output("".join(f"{line}\n" for line in lines).encode("utf-8"))
