"""The figures of the growth benchmark, and the lengths of its prompts."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import growth
from side_by_side.workplace import generated_dialogues, generated_tokenizer


def rows() -> list[growth.Row]:
    """Time grows with the batch and with the square of the response; memory with the root of the prompt."""
    found = []
    for axis in growth.AXES:
        for factor in growth.FACTORS if axis == "batch_size" else growth.FACTORS[1:]:
            factors = dict.fromkeys(growth.AXES, 1) | {axis: factor}
            found.append(
                {name: times * getattr(growth.BASE, name) for name, times in factors.items()}
                | {
                    "seconds": 3.0 * factors["batch_size"] * factors["response_tokens"] ** 2,
                    "memory_gb": 0.5 * factors["prompt_tokens"] ** 0.5,
                    "collecting_share": 0.4,
                    "operations": 6e11 * factors["batch_size"],
                }
            )
    return found


def test_each_axis_begins_at_the_base_and_has_its_exponent() -> None:
    exponents = {
        "batch_size": {"seconds": 1, "memory_gb": 0, "operations": 1},
        "response_tokens": {"seconds": 2, "memory_gb": 0, "operations": 0},
        "prompt_tokens": {"seconds": 0, "memory_gb": 0.5, "operations": 0},
    }
    for axis, expected in exponents.items():
        found = growth.along(rows(), axis)
        assert [row[axis] for row in found] == [factor * getattr(growth.BASE, axis) for factor in growth.FACTORS]
        for measured, exponent in expected.items():
            assert growth.exponent(found, axis, measured) == pytest.approx(exponent, abs=1e-9)


def test_the_table_has_every_size_and_the_exponents() -> None:
    text = growth.table(rows())
    assert "| 64 | 32 | 32 | 24.00 | 40% | 200 | 0.50 |" in text
    assert "| response length | 2.00 | 2.00 | 0.00 | 0.00 | 0.00 |" in text


def test_prompts_have_the_exact_number_of_tokens() -> None:
    tokenizer = generated_tokenizer(generated_dialogues(), 3000)
    job = replace(growth.BASE, prompt_tokens=21, batch_size=2, updates=2)
    prompts = growth.exact_prompts(tokenizer, job)
    assert [len(ids) for ids in tokenizer(prompts).input_ids] == [21] * 4
