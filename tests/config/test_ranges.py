"""Every number of every config: what cannot be is refused with its key before anything starts, and nothing else is."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from moe_train.config import ClassificationConfig, ImageConfig, LanguageModelConfig, RunConfig, build, check
from moe_train.config.check import Range
from moe_train.config.corpus import PrepareConfig
from moe_train.config.evaluation import EvaluateConfig, ExportConfig, Inference, ReportConfig, TranslateConfig
from moe_train.config.from_mapping import without_unknown
from moe_train.config.paths import configs_directory
from moe_train.config.placement import place
from moe_train.config.planner import PlanConfig
from moe_train.config.serving import ServeConfig
from moe_train.errors import ConfigError, UserError
from moe_train.routing import registered_strategies, routing_config

CLUSTER = OmegaConf.to_container(OmegaConf.load(configs_directory() / "cluster" / "cpu.yaml"))
# A config, the prefix of its keys in messages, and its required keys.
CONFIGS: dict[str, tuple[type, str, dict[str, Any]]] = {
    "train": (RunConfig, "", {"data": "d"}),
    "images": (ImageConfig, "task", {}),
    "lm": (LanguageModelConfig, "task", {}),
    "classification": (ClassificationConfig, "task", {}),
    "evaluate": (EvaluateConfig, "", {"run": "r"}),
    "export": (ExportConfig, "", {"run": "r", "out": "o"}),
    "translate": (TranslateConfig, "", {"run": "r", "source": "en", "target": "de"}),
    "serve": (ServeConfig, "", {"run": "r"}),
    "report": (ReportConfig, "", {"runs": ["r"]}),
    "inference": (Inference, "", {}),
    "prepare": (PrepareConfig, "", {"out": "o", "corpus": {"name": "text"}}),
    "plan": (PlanConfig, "", {"cluster": CLUSTER}),
    **{name: (entry.config, "routing", {"name": name}) for name, entry in registered_strategies().items()},
}
HOSTILE = [float("nan"), float("inf"), -float("inf"), -1, 0, 10**30, -(10**30), 2**63, 1e300, -1e300, 1e-300, 10**400]
WRONG = ["many", "", True, {}, {"a": 1}, [[1]], [None], b"1"]


def kinds(hint: Any) -> set[Any]:
    """The plain types in a type, those of a list's items included."""
    if typing.get_origin(hint) is typing.Literal:
        return {typing.Literal}
    return {kind for part in typing.get_args(hint) for kind in kinds(part)} or {hint}


def keys(cls: type, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Range | None]]:
    """Dotted places of all numbers of a config and its groups, with their types and declared ranges."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        groups = [kind for kind in kinds(hint) if dataclasses.is_dataclass(kind)]
        for group in groups:
            if hint is group:
                yield from keys(typing.cast(type, group), (*place, field.name))
        if not groups and kinds(hint) & {int, float}:
            yield (*place, field.name), hint, check.ranges(cls).get(field.name)


NUMBERS = [(name, place, hint, found) for name, (cls, *_) in CONFIGS.items() for place, hint, found in keys(cls)]
EVERY_NUMBER = pytest.mark.parametrize(
    ("name", "place", "hint", "allowed"), NUMBERS, ids=[f"{name}:{'.'.join(place)}" for name, place, *_ in NUMBERS]
)


def with_value(name: str, place: tuple[str, ...], value: Any) -> Any:
    """The config with one value set."""
    cls, group, given = CONFIGS[name]
    content = json.loads(json.dumps(given))
    target = content
    for step in place[:-1]:
        target = target.setdefault(step, {})
    target[place[-1]] = value
    return routing_config(content) if group == "routing" else build(cls, content, group)


def is_list(hint: Any) -> bool:
    return any(typing.get_origin(part) is tuple for part in (hint, *typing.get_args(hint)))


@EVERY_NUMBER
def test_a_number_declares_its_range(name: str, place: tuple[str, ...], hint: Any, allowed: Range | None) -> None:
    assert allowed is not None, "a new number: Annotated[int, Range(…)]"
    limits = [end for end in (allowed.least, allowed.above, allowed.most, allowed.below) if end is not None]
    assert all(abs(end) <= 2**63 - 1 for end in limits)
    if int in kinds(hint):
        assert allowed.most is not None or name in ("evaluate", "export", "translate", "serve"), (
            "else it overflows somewhere"
        )


@EVERY_NUMBER
def test_invalid_numbers_name_their_key(name: str, place: tuple[str, ...], hint: Any, allowed: Range | None) -> None:
    """A number is taken where its field says that it may be, unless other keys contradict, which is said by name."""
    key = ".".join((CONFIGS[name][1], *place)).strip(".")
    assert allowed is not None
    for value in HOSTILE:
        whole = float not in kinds(hint)
        inside = value in allowed and not (whole and isinstance(value, float)) and abs(value) <= 1.8e308
        try:
            with_value(name, place, [value, value] if is_list(hint) else value)
        except UserError as error:
            said = str(error)
            assert key in said, f"{value}: {said}"
            assert inside or f"'{key}" in said, f"{value}: {said}"
            assert error.remedy, value
        else:
            assert inside, f"{key}={value} is outside of {allowed}"


@EVERY_NUMBER
def test_values_of_another_type_name_their_key(
    name: str, place: tuple[str, ...], hint: Any, allowed: Range | None
) -> None:
    key = ".".join((CONFIGS[name][1], *place)).strip(".")
    for value in WRONG:
        if isinstance(value, str) and str in kinds(hint) and place[-1] == "checkpoint":
            continue  # a name
        with pytest.raises(UserError) as raised:
            with_value(name, place, value)
        assert key in str(raised.value), value


@EVERY_NUMBER
def test_the_ends_of_a_range_are_its_own(name: str, place: tuple[str, ...], hint: Any, allowed: Range | None) -> None:
    """What lies inside is taken, unless other keys contradict; what lies just beyond is not."""
    assert allowed is not None
    step = 1 if int in kinds(hint) else 0.0
    for end, outwards in ((allowed.least, -1), (allowed.most, 1)):
        if end is None:
            continue
        beyond = end + outwards * (step or max(abs(end), 1.0) * 1e-9)
        with pytest.raises(ConfigError, match="must"):
            with_value(name, place, [beyond, beyond] if is_list(hint) else beyond)


@given(st.sampled_from(NUMBERS), st.data())
def test_any_number_is_taken_or_refused_by_name(
    number: tuple[str, tuple[str, ...], Any, Range], data: st.DataObject
) -> None:
    name, place, hint, allowed = number
    numbers = st.integers() if float not in kinds(hint) else st.floats() | st.integers()
    value = data.draw(st.lists(numbers, max_size=4) if is_list(hint) else numbers)
    try:
        with_value(name, place, value)
    except UserError as error:
        assert ".".join(place) in str(error)
    else:
        assert all(item in allowed for item in (value if isinstance(value, list) else [value]))


def test_a_config_that_is_made_directly_is_checked_too() -> None:
    from moe_train.config import OptimizerConfig, SearchConfig, TrainingConfig

    for make in (
        lambda: TrainingConfig(temperature=1e-9),
        lambda: OptimizerConfig(betas=(1.0, 1.0)),
        lambda: OptimizerConfig(betas=(0.9,)),
        lambda: OptimizerConfig(lr=float("nan")),
        lambda: SearchConfig(length_penalty=float("nan")),
        lambda: SearchConfig(beam=2**40),
    ):
        with pytest.raises(ConfigError):
            make()


@pytest.mark.parametrize(
    ("value", "allowed", "said"),
    [
        (float("nan"), Range(above=0), "'k' must be a finite number, not nan. Set k to a number above 0."),
        (-1.0, Range(above=0), "'k' must be above 0, not -1. Set k to a number above 0."),
        (-1, Range(least=0, most=3), "'k' must not be negative, not -1. Set k to a number from 0 and up to 3."),
        (0.5, Range(least=0.9, most=1), "'k' must be 0.9 or more, not 0.5. Set k to a number from 0.9 and up to 1."),
        (4, Range(most=3), "'k' must be 3 or less, not 4. Set k to a number up to 3."),
        (1.0, Range(least=0, below=1), "'k' must be below 1, not 1. Set k to a number from 0 and below 1."),
        (10**9000, Range(most=3), "'k' must be 3 or less, not a number of 29898 bits. Set k to a number up to 3."),
    ],
    ids=["nan", "above", "negative", "least", "most", "below", "huge"],
)
def test_message_of_a_value_out_of_range(value: float, allowed: Range, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        allowed.check("k", value)
    assert str(raised.value) == said


@pytest.mark.parametrize("spec", ["every:²", "every:9999999999", "insert_after:१", "every:1:1:1", "every:-1"])
def test_placements_that_only_look_like_numbers(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.sparse_layers"):
        place(spec, 6)


def test_what_earlier_versions_recorded_is_in_range(root: Any) -> None:
    for run in ("finished", "unfinished", "export"):
        content: Mapping[str, Any] = json.loads((root / "tests" / "old_runs" / run / "config.json").read_text())
        assert build(RunConfig, without_unknown(RunConfig, content["config"])[0])
