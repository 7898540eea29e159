"""Bounds and choices of settings, checked by one function."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from transformers import HfArgumentParser

from deep_rlhf.errors import ConfigError
from deep_rlhf.settings import check_settings, seed_setting, setting


@dataclass
class Config:
    rate: float = setting(0.5, "a share", above=0, most=1)
    count: int | None = setting(None, "a count", least=1)
    kind: Literal["a", "b"] = setting("a", "a choice")
    optional_kind: Literal["a", "b"] | None = setting(None, "a choice, or none")
    options: dict[str, Any] | None = setting(None, "options by name")
    names: list[str] = setting([], "names")
    seed: int = seed_setting(0, "a seed")
    scale: float = 1.0  # without bounds
    name: str = setting("x", "a name")
    large: int = setting(1, "slips are kept out", least=1, most=2**20)


@pytest.mark.parametrize(
    "values",
    [{}, {"rate": 1}, {"count": 1}, {"kind": "b"}, {"optional_kind": "a"}, {"options": {"x": 1}}, {"seed": 2**32 - 1}],
)
def test_values_within_the_bounds_pass(values: dict[str, Any]) -> None:
    check_settings(Config(**values))


@pytest.mark.parametrize(
    ("values", "facts"),
    [
        ({"rate": 0}, ("rate", "greater than 0", "at most 1")),
        ({"rate": 1.1}, ("rate", "1.1")),
        ({"rate": math.nan}, ("rate", "nan")),
        ({"rate": math.inf}, ("rate", "inf")),
        ({"count": 0}, ("count", "at least 1")),
        ({"kind": "c"}, ("kind", "a, b", "not c")),
        ({"optional_kind": "c"}, ("optional_kind", "a, b")),
        ({"options": "x"}, ("options", "mapping")),
        ({"seed": -1}, ("seed", "at least 0")),
        ({"scale": math.nan}, ("scale", "finite", "nan")),
        ({"scale": -math.inf}, ("scale", "finite", "-inf")),
        ({"scale": 1e308}, ("scale", "1e+308")),
        ({"scale": "1.0"}, ("scale", "a number", "'1.0'")),
        ({"count": 10**5000}, ("count", "1e5000")),
        ({"count": 1.5}, ("count", "whole", "1.5")),
        ({"name": " "}, ("name", "empty")),
        ({"large": 2**20 + 1}, ("large", "at least 1", f"at most {2**20}")),
        ({"seed": 2**32}, ("seed", str(2**32 - 1))),
    ],
)
def test_the_field_and_its_bounds_are_named(values: dict[str, Any], facts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_settings(Config(**values))
    assert isinstance(caught.value, ValueError)
    for fact in facts:
        assert fact in str(caught.value)


def test_a_field_of_another_library_has_bounds_of_its_own() -> None:
    check_settings(Config(scale=2.0), {"scale": {"above": 1}})
    with pytest.raises(ConfigError, match=r"scale must be greater than 1, not 1\.0"):
        check_settings(Config(scale=1.0), {"scale": {"above": 1}})


def test_transformers_parser_reads_settings() -> None:
    (config,) = HfArgumentParser(Config).parse_args_into_dataclasses(["--rate=0.25", "--kind=b", "--seed=3"])
    assert config == Config(rate=0.25, kind="b", seed=3)


def test_instances_do_not_share_a_list() -> None:
    assert Config().names is not Config().names


@dataclass
class TextOrOff:
    value: str | Literal[False] | None = None


@pytest.mark.parametrize("value", ["any text", False, None])
def test_a_choice_beside_another_type_limits_nothing(value: Any) -> None:
    check_settings(TextOrOff(value))
