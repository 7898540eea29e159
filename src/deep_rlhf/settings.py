"""Settings with their bounds: a dataclass field says what it accepts, and one function checks all fields."""

import dataclasses
import math
from collections.abc import Mapping
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from deep_rlhf.errors import ConfigError

LARGEST_SEED = 2**32 - 1  # what NumPy's generators accept
LARGEST = 1e18  # of any number: beyond it integers of 64 bits, and the squares of 32-bit floats, overflow


class BoundedHelp(str):
    """A help text that carries the bounds of its setting.

    The bounds have no metadata key of their own, since HfArgumentParser passes every key to argparse.
    """

    bounds: dict[str, float]


def setting(
    default: Any,
    help: str,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> Any:
    """A dataclass field with its help text and bounds: above < value, least ≤ value, value < below, value ≤ most.

    Every number must also be finite, bounded or not. None is always accepted and means "not given". A list or dict
    `default` is copied for every instance.
    """
    bounds = {"above": above, "least": least, "below": below, "most": most}
    text = BoundedHelp(help)
    text.bounds = {name: bound for name, bound in bounds.items() if bound is not None}
    metadata = {"help": text}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def seed_setting(default: int, help: str) -> Any:
    """A field for a seed that every generator accepts: 0 to 2³² − 1."""
    return setting(default, help, least=0, most=LARGEST_SEED)


def check_settings(config: Any, inherited: Mapping[str, Mapping[str, float]] = MappingProxyType({})) -> None:
    """Checks every field of a dataclass instance against its bounds, its type, and its type's choices.

    inherited: the bounds of fields that another library declares, by name, in the words of `setting`. Raises
    ConfigError for the first number that is out of bounds, not finite or too large for any computation, the first
    value that is not a number where one is expected, the first empty text, the first value that is not one of a
    Literal's choices, and the first value that is not a mapping where a dict is expected.
    """
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is None:
            continue
        text = field.metadata.get("help")
        bounds = text.bounds if isinstance(text, BoundedHelp) else None
        hint = hints[field.name]
        parts = [part for part in get_args(hint) if part is not type(None)]
        kinds = (hint, *(parts if len(parts) == 1 else ()))  # of `X | None`, X
        limits = {**inherited.get(field.name, {}), **(bounds or {})}
        if limits or int in kinds or float in kinds:
            _check_number(field.name, value, limits, whole=int in kinds)
        if isinstance(value, str) and not value.strip() and value != field.default:
            raise ConfigError(f"{field.name} must not be empty: give a value, or leave it out.")
        for kind in kinds:
            if get_origin(kind) is Literal and value not in get_args(kind):
                raise ConfigError(f"{field.name} must be one of {', '.join(map(str, get_args(kind)))}, not {value}.")
            if get_origin(kind) is dict and bounds is not None and not isinstance(value, dict):
                raise ConfigError(f"{field.name} must be a mapping of names to values, not {value!r}.")


def _check_number(name: str, value: Any, bounds: Mapping[str, float], *, whole: bool) -> None:
    if not isinstance(value, Integral if whole else Real):
        raise ConfigError(f"{name} must be {'a whole number' if whole else 'a number'}, not {value!r}.")
    number: Any = value
    if not abs(number) < math.inf:  # NaN, too
        words = [_description(0, **bounds), "finite"]
    elif not _within(number, **bounds):
        words = [_description(number, **bounds)]
    elif abs(number) > LARGEST:
        words = [f"at most {LARGEST:g}"]
    else:
        return
    raise ConfigError(f"{name} must be {' and '.join(filter(None, words))}, not {_short(number)}.")


def _short(value: Any) -> str:
    """A number as it was given, or its magnitude if it has too many digits to be read."""
    return f"about 1e{int(math.log10(abs(value)))}" if isinstance(value, int) and abs(value) > LARGEST else str(value)


def _within(
    value: Any,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
) -> bool:
    return above < value < below and least <= value <= most


def _description(value: float, **bounds: float) -> str:
    """The bounds in words; of an upper one that only keeps out slips, where `value` exceeds it."""
    words = {"above": "greater than", "least": "at least", "below": "less than", "most": "at most"}
    shown = {name: bound for name, bound in bounds.items() if name != "most" or bound < 1000 or value > bound}
    return " and ".join(f"{words[name]} {bound}" for name, bound in shown.items())
