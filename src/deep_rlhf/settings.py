"""Settings with their bounds: a dataclass field says what it accepts, and one function checks all fields."""

import dataclasses
import math
from typing import Any, Literal, get_args, get_origin, get_type_hints

from deep_rlhf.errors import ConfigError

LARGEST_SEED = 2**32 - 1  # what NumPy's generators accept


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

    A bounded setting must also be finite. None is always accepted and means "not given". A list or dict `default` is
    copied for every instance.
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


def check_settings(config: Any) -> None:
    """Checks every field of a dataclass instance against its bounds and its type's choices.

    Raises ConfigError for the first number out of bounds or not finite, the first value that is not one of a Literal's
    choices, and the first value that is not a mapping where a dict is expected.
    """
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is None:
            continue
        text = field.metadata.get("help")
        bounds = text.bounds if isinstance(text, BoundedHelp) else None
        if bounds and not _within(value, **bounds):
            raise ConfigError(f"{field.name} must be {_description(**bounds)}, not {value}.")
        hint = hints[field.name]
        parts = [part for part in get_args(hint) if part is not type(None)]
        for kind in (hint, *(parts if len(parts) == 1 else ())):  # of `X | None`, X
            if get_origin(kind) is Literal and value not in get_args(kind):
                raise ConfigError(f"{field.name} must be one of {', '.join(map(str, get_args(kind)))}, not {value}.")
            if get_origin(kind) is dict and bounds is not None and not isinstance(value, dict):
                raise ConfigError(f"{field.name} must be a mapping of names to values, not {value!r}.")


def _within(
    value: float,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
) -> bool:
    return math.isfinite(value) and above < value < below and least <= value <= most


def _description(**bounds: float) -> str:
    words = {"above": "greater than", "least": "at least", "below": "less than", "most": "at most"}
    return " and ".join(f"{words[name]} {bound}" for name, bound in bounds.items())
