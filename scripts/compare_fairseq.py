#!/usr/bin/env python
"""Compares our dense Transformer with that of stock fairseq 0.12.2 on the CPU: loss, speed, BLEU.

    python scripts/compare_fairseq.py DATA_FOLDER --updates 400 --directions de-en en-de

Both models have the same dimensions and start from the same weights (with different initial weights either may be 2 %
ahead after a few hundred updates, by chance). They get the same micro-batches in the same order and alternate after
each update, so that other load of the machine affects both. Stock is fairseq's model, criterion, gradient clipping and
Adam without its Trainer (which would only slow it down); ours is model, criterion and engine as in ``moe-train``.
In the first ``--bf16-updates`` our model in bf16 takes its turn as well; its speed is compared with stock's in fp32.
Then our model gets stock's weights, and fairseq's SequenceGenerator and our beam search translate the same batches.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from moe_train.config import (
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    SearchConfig,
    TaskConfig,
    TrainingConfig,
    ValidationConfig,
)
from moe_train.data.folder import DataFolder
from moe_train.evaluation.scoring.bleu_chrf import Scorer
from moe_train.evaluation.search.beam_search import BeamSearch
from moe_train.evaluation.translations import Batch
from moe_train.evaluation.translator import encode
from moe_train.fairseq_compat import apply
from moe_train.models.from_fairseq import convert_state_dict
from moe_train.tasks import build_task
from moe_train.training.engines import EngineInputs, build_engine
from moe_train.training.optim.lr_schedule import learning_rate
from moe_train.training.runtime.world import World
from moe_train.training.step import seed_generators

apply()
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion  # noqa: E402
from fairseq.models.transformer import TransformerModel, base_architecture  # noqa: E402
from fairseq.optim.adam import Adam  # noqa: E402
from fairseq.sequence_generator import SequenceGenerator  # noqa: E402
from fairseq.utils import clip_grad_norm_  # noqa: E402

STOCK_KEYS = ("src_tokens", "src_lengths", "prev_output_tokens")
WARM_UP = 5
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Side:
    """One of the two implementations: its loss and update functions, and their times."""

    name: str
    model: nn.Module
    step: Callable[[dict[str, Any], float], None]
    nll: Callable[[dict[str, Any]], float]
    clock: Callable[[], float]
    seconds: list[float] = field(default_factory=list)
    words: list[int] = field(default_factory=list)

    def words_per_second(self, updates: int | None = None) -> float:
        """Target words per second of the first ``updates`` (all), without the very first."""
        words, seconds = self.words[:updates], self.seconds[:updates]
        warm = min(WARM_UP, len(words) - 1)
        return sum(words[warm:]) / sum(seconds[warm:]) if words else math.nan


def main() -> None:
    """Trains both, translates with both, prints the table."""
    options = parse()
    torch.set_num_threads(options.threads)
    config = run_config(options)
    task: Any = build_task(config, DataFolder.open(options.data))
    console = Console()
    clock = CLOCKS[options.clock]
    stock, ours = stock_side(task, config, clock), our_side(task, config, clock)
    ours.model.load_state_dict(convert_state_dict(stock.model.state_dict()))
    bf16 = our_side(task, config, clock, bf16=True)
    bf16.model.load_state_dict(ours.model.state_dict())
    shape = train(task, config, (stock, ours), bf16, options.bf16_updates, console)
    report: dict[str, Any] = {"words_per_second": {s.name: s.words_per_second() for s in (stock, ours)}}
    report["words_per_second_bf16"] = {stock.name: stock.words_per_second(options.bf16_updates)}
    report["words_per_second_bf16"]["ours"] = bf16.words_per_second()
    report["shape"] = shape
    report["valid_nll"] = {side.name: validate(task, side) for side in (stock, ours)}
    report |= search(task, config, stock.model, ours.model, options)
    report["settings"] = {key: str(value) for key, value in vars(options).items()}
    show(report, console)
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder made by moe-prepare")
    parser.add_argument("--directions", nargs="*", default=[], help="all of the folder unless given")
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=2500, help="target tokens of an update")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--ffn-dim", type=int, default=768)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--beam", type=int, default=4)
    parser.add_argument("--split", default="test", help="split to translate")
    parser.add_argument("--sentences", type=int, default=150, help="at most, of each direction")
    parser.add_argument("--bf16-updates", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: fair on a busy machine, with --threads 1")
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    return parser.parse_args()


def run_config(options: argparse.Namespace) -> RunConfig:
    """The config of both sides."""
    return RunConfig(
        data=str(options.data),
        seed=options.seed,
        model=ModelConfig(
            encoder_layers=options.layers,
            decoder_layers=options.layers,
            embed_dim=options.dim,
            ffn_dim=options.ffn_dim,
            num_heads=options.heads,
            attention_dropout=0.0,
            sparse_layers="none",
        ),
        task=TaskConfig(directions=tuple(options.directions)),
        training=TrainingConfig(
            max_updates=options.updates,
            tokens_per_update=options.tokens,
            optimizer=OptimizerConfig(lr=options.lr),
            schedule=ScheduleConfig(warmup_updates=max(options.updates // 5, 1)),
            validation=ValidationConfig(max_sentences=options.sentences),
        ),
        search=SearchConfig(beam=options.beam),
    )


def stock_side(task: Any, config: RunConfig, clock: Callable[[], float]) -> Side:
    """fairseq's model, criterion, clipping and optimizer."""
    torch.manual_seed(config.seed)
    model, training = stock_model(task, config.model), config.training
    criterion = LabelSmoothedCrossEntropyCriterion(task, sentence_avg=False, label_smoothing=training.label_smoothing)
    adam = training.optimizer
    optimizer = Adam(model.parameters(), lr=adam.lr, betas=adam.betas, eps=adam.eps)

    def step(sample: dict[str, Any], lr: float) -> None:
        loss, size, _ = criterion(model, plain(sample))
        optimizer.zero_grad()
        (loss / size).backward()
        clip_grad_norm_(list(model.parameters()), training.clip_norm)
        set_lr(optimizer, lr)
        optimizer.step()

    def nll(sample: dict[str, Any]) -> float:
        return float(criterion(model, plain(sample))[2]["nll_loss"])

    return Side("stock fairseq", model, step, nll, clock)


def stock_model(task: Any, config: ModelConfig) -> nn.Module:
    """fairseq's ``transformer`` of the same dimensions."""
    sides = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in {
            "layers": getattr(config, f"{side}_layers"),
            "embed_dim": config.embed_dim,
            "ffn_embed_dim": config.ffn_dim,
            "attention_heads": config.num_heads,
            "normalize_before": config.norm_order == "pre",
        }.items()
    }
    flags = argparse.Namespace(
        **sides,
        share_all_embeddings=True,
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
        activation_dropout=config.activation_dropout,
        max_source_positions=config.max_positions,
        max_target_positions=config.max_positions,
    )
    base_architecture(flags)
    model: nn.Module = TransformerModel.build_model(flags, task)
    return model


def our_side(task: Any, config: RunConfig, clock: Callable[[], float], bf16: bool = False) -> Side:
    """Our model, criterion and engine, as the training loop uses them."""
    model, criterion = task.build_model(), task.build_criterion()
    training = replace(config.training, precision="bf16" if bf16 else "fp32")
    engine = build_engine(EngineInputs(model, config.engine, training, World()))

    def step(sample: dict[str, Any], lr: float) -> None:
        with engine.accumulate(last=True):
            with engine.autocast():
                loss, size, _ = criterion(engine.model, sample)
            engine.backward(loss / size)
        engine.step(lr)

    def nll(sample: dict[str, Any]) -> float:
        return float(criterion(model, sample)[2]["nll_loss"])

    return Side("ours, bf16" if bf16 else "ours", model, step, nll, clock)


def plain(sample: dict[str, Any]) -> dict[str, Any]:
    """The sample without keys that stock fairseq does not know."""
    return {**sample, "net_input": {key: sample["net_input"][key] for key in STOCK_KEYS}}


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the coming update."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def train(
    task: Any, config: RunConfig, sides: tuple[Side, Side], bf16: Side, bf16_updates: int, console: Console
) -> dict[str, Any]:
    """Runs the same updates on all sides, alternating; ``bf16`` takes part in the first ``bf16_updates``.

    Returns:
        The mean shape of a micro-batch: ``sentences``, ``source`` and ``target`` (columns), and ``target_tokens``.
    """
    training, batches = config.training, task.train_batches()
    shapes = []
    for update in range(training.max_updates):
        rate = learning_rate(training.schedule, training.optimizer.lr, training.max_updates, update + 1)
        samples = [task.train_sample(indices) for indices in batches.update(update).micro_batches]
        turn = (*sides, bf16) if update < bf16_updates else sides
        for side in turn if update % 2 else turn[::-1]:
            timed_update(side, samples, rate, config.seed, update)
        for sample in samples:
            inputs = sample["net_input"]
            rows, columns = inputs["src_tokens"].shape
            shapes.append((rows, columns, inputs["prev_output_tokens"].shape[1], sample["ntokens"]))
        if (update + 1) % 50 == 0:
            speeds = ", ".join(f"{side.name} {side.words_per_second():.0f} words/s" for side in turn)
            console.print(f"update {update + 1}: {speeds}", highlight=False)
    names = "sentences", "source", "target", "target_tokens"
    return {name: math.fsum(each) / len(each) for name, each in zip(names, zip(*shapes, strict=True), strict=True)}


def timed_update(side: Side, samples: list[dict[str, Any]], rate: float, seed: int, update: int) -> None:
    """One update of one side."""
    side.model.train()
    seed_generators(seed, update)
    start = side.clock()
    for sample in samples:
        side.step(sample, rate)
    side.seconds.append(side.clock() - start)
    side.words.append(sum(sample["ntokens"] for sample in samples))


@torch.no_grad()
def validate(task: Any, side: Side) -> float:
    """Negative log-likelihood per target token over all validation sets, in nats."""
    side.model.eval()
    total, tokens = 0.0, 0
    for name, batches in task.validation_sets().items():
        for indices in batches:
            sample = task.validation_sample(name, indices)
            total += side.nll(sample)
            tokens += sample["ntokens"]
    return total / tokens


def search(
    task: Any, config: RunConfig, stock: nn.Module, ours: nn.Module, options: argparse.Namespace
) -> dict[str, Any]:
    """Both searches over the same batches with stock's weights: mean BLEU over directions, and tokens per second."""
    ours.load_state_dict(convert_state_dict(stock.state_dict()))
    stock.eval(), ours.eval()
    settings, words = config.search, task.target_dictionary
    generator = SequenceGenerator(
        [stock],
        words,
        beam_size=settings.beam,
        max_len_a=settings.max_length_ratio,
        max_len_b=settings.max_length_offset,
        min_len=settings.min_length,
        unk_penalty=settings.unk_penalty,
    )
    beam = BeamSearch(ours, words, settings)  # type: ignore[arg-type]

    def theirs(net_input: dict[str, Any]) -> list[list[int]]:
        first = int(net_input["prev_output_tokens"][0, 0])
        sample = {"net_input": {key: net_input[key] for key in STOCK_KEYS[:2]}}
        found = generator.generate([stock], sample, bos_token=first)
        return [[t for t in sentence[0]["tokens"].tolist() if t != words.eos()] for sentence in found]

    def own(net_input: dict[str, Any]) -> list[list[int]]:
        return beam(net_input).best()

    sides = {"stock fairseq": theirs, "ours": own}
    bleu: dict[str, list[float]] = {name: [] for name in sides}
    seconds, tokens = dict.fromkeys(sides, 0.0), dict.fromkeys(sides, 0)
    same = total = 0
    for direction in task.directions:
        results = translate(task, direction, settings, sides, options, seconds, tokens)
        references = task.folder.raw(options.split, direction)[1][: options.sentences]
        for name, lines in results.items():
            bleu[name].append(Scorer(direction.split("-")[1]).score(lines, references).bleu)
        same += sum(a == b for a, b in zip(*results.values(), strict=True))
        total += len(references)
    return {
        "bleu": {name: math.fsum(values) / len(values) for name, values in bleu.items()},
        "tokens_per_second": {name: tokens[name] / seconds[name] for name in sides},
        "same_translations": same / total,
    }


def translate(
    task: Any,
    direction: str,
    settings: SearchConfig,
    sides: dict[str, Callable[[dict[str, Any]], list[list[int]]]],
    options: argparse.Namespace,
    seconds: dict[str, float],
    tokens: dict[str, int],
) -> dict[str, list[str]]:
    """Translates one direction with both, alternating by batch; adds to ``seconds`` and ``tokens``."""
    source, target = direction.split("-")
    lines = task.folder.raw(options.split, direction)[0][: options.sentences]
    encoded = encode(task, lines, source, target, settings.batch_tokens)
    results = {name: [""] * len(lines) for name in sides}
    tokenizer = task.folder.tokenizer()
    for number, (batch, places) in enumerate(zip(encoded.batches, encoded.lines, strict=True)):
        for name in sorted(sides, reverse=bool(number % 2)):
            start = CLOCKS[options.clock]()
            with torch.no_grad():
                found = sides[name](net_input_of(task, batch))
            seconds[name] += CLOCKS[options.clock]() - start
            tokens[name] += sum(len(ids) + 1 for ids in found)
            for place, ids in zip(places, found, strict=True):
                results[name][place] = tokenizer.decode(ids)
    return results


def net_input_of(task: Any, batch: Batch) -> dict[str, Any]:
    """A new input for each search, which may change it."""
    sample = task.inference_sample(batch.sentences, batch.source, batch.target, batch.uids)
    return dict(sample["net_input"])


def show(report: dict[str, Any], console: Console) -> None:
    """Prints the comparison as a table, with the project's bounds."""
    table = Table("", "stock fairseq", "ours", "ratio", "promised")
    rows = (
        ("validation loss (nll, nats per token)", "valid_nll", "{:.4f}", "within 2 %"),
        ("training, words/s (fp32)", "words_per_second", "{:,.0f}", "1.6 or more"),
        ("training, words/s (stock fp32, ours bf16)", "words_per_second_bf16", "{:,.0f}", "3.0 or more with AMX"),
        ("BLEU, beam search, same weights", "bleu", "{:.2f}", "± 0.5 BLEU"),
        ("beam search, tokens/s", "tokens_per_second", "{:,.0f}", "1.5 or more"),
    )
    for label, key, form, promise in rows:
        theirs, own = report[key]["stock fairseq"], report[key]["ours"]
        ratio = f"{own / theirs:.3f}" if theirs else "-"
        table.add_row(label, form.format(theirs), form.format(own), ratio, promise)
    console.print(table)
    settings, shape = report["settings"], report["shape"]
    console.print(
        f"{settings['layers']} + {settings['layers']} layers, d = {settings['dim']}, "
        f"feed-forward {settings['ffn_dim']}, {settings['threads']} threads; "
        f"a micro-batch on average: {shape['sentences']:.0f} sentences, "
        f"{shape['source']:.0f} source and {shape['target']:.0f} target columns, "
        f"{shape['target_tokens']:.0f} target tokens",
        highlight=False,
    )
    console.print(f"translations that agree word for word: {report['same_translations']:.1%}", highlight=False)


if __name__ == "__main__":
    main()
