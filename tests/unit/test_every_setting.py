"""Every number of every command that cannot be meant is refused at its field, before anything is loaded."""

import dataclasses
import math
from typing import Any, get_args, get_type_hints

import pytest
from facts import assert_names

from deep_rlhf.algorithms.grpo import GRPOConfig
from deep_rlhf.algorithms.ppo import PPOConfig
from deep_rlhf.algorithms.reinforce_plus_plus import ReinforcePlusPlusConfig
from deep_rlhf.algorithms.rloo import RLOOConfig
from deep_rlhf.algorithms.trpo import TRPOConfig
from deep_rlhf.cli.demo import DemoConfig
from deep_rlhf.cli.label import LabelConfig
from deep_rlhf.cli.loop_config import LoopConfig
from deep_rlhf.cli.teach import TeachConfig
from deep_rlhf.errors import ConfigError

# test_supervised_config.py does the same for the flags of transformers.TrainingArguments.
CLASSES: list[Any] = [
    *(PPOConfig, TRPOConfig, RLOOConfig, GRPOConfig, ReinforcePlusPlusConfig),
    *(LoopConfig, TeachConfig, DemoConfig, LabelConfig),
]


def numbers(kind: Any) -> list[str]:
    """The fields that hold a whole or another number."""
    hints = get_type_hints(kind)
    return [
        field.name
        for field in dataclasses.fields(kind)
        if field.init and {int, float} & {hints[field.name], *get_args(hints[field.name])}
    ]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("value", [-2, math.nan, math.inf, -math.inf, 1e308, 10**20, "text", "1", [1], {}, 1j])
def test_a_number_that_cannot_be_meant_names_its_field(kind: Any, value: Any) -> None:
    names = numbers(kind)
    assert names
    for name in names:
        with pytest.raises(ConfigError) as error:
            kind(**{name: value})
        assert_names(error.value, name)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_no_whole_number_is_a_fraction_and_no_text_is_blank(kind: Any) -> None:
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        value = 1.5 if int in (hint, *get_args(hint)) and float not in get_args(hint) else None
        value = "  " if str in (hint, *get_args(hint)) else value
        if value is not None and field.init:
            with pytest.raises(ConfigError) as error:
                kind(**{field.name: value})
            assert_names(error.value, field.name)
