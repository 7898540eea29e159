"""From the command line and a YAML file to validated dataclasses: one flag per field, flags override the file."""

import dataclasses
import difflib
import sys
from pathlib import Path
from typing import Any, NoReturn

import yaml
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser

from deep_rlhf.types import UserError

# Spellings that users' scripts still have and newer transformers dropped.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
}


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence instead of a page of usage."""
        raise UserError(f"{message[:1].upper()}{message[1:]}. Run with --help to see every flag.")


def parse_flags(argv: list[str] | None, *dataclass_types: Any, prog: str, description: str) -> tuple[Any, ...]:
    """One instance of each dataclass, from `--config file.yaml` and, over it, the flags.

    Raises UserError for an unknown flag or key (naming the closest one), a wrong value, or an unreadable file.
    """
    argv = _with_new_spellings(sys.argv[1:] if argv is None else argv)
    parser = _Parser(dataclass_types, prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="a YAML file of flags; flags on the command line override it")
    config = _config_file(argv)
    if config is not None:
        parser.set_defaults(**_read_yaml(Path(config), _known(parser)))
        for action in parser._actions:  # a required flag may be given by the file
            if action.dest in parser._defaults:
                action.required = False
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        close = difflib.get_close_matches(name.lstrip("-"), _known(parser), n=1)
        hint = f"Did you mean --{close[0]}?" if close else "Run with --help to see every flag."
        raise UserError(f"Unknown argument {name}. {hint}")
    values = vars(namespace)
    return tuple(_built(kind, values) for kind in dataclass_types)


def save_config(path: Path, *configs: Any) -> None:
    """Writes every field of the dataclasses as one flat YAML file that `--config` reads again."""
    values: dict[str, Any] = {}
    for config in configs:
        fields = {field.name for field in dataclasses.fields(config) if field.init}
        asdict = config.to_dict() if hasattr(config, "to_dict") else dataclasses.asdict(config)
        values |= {name: value for name, value in asdict.items() if name in fields and value is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def print_config(*configs: Any) -> None:
    """Prints every field that differs from its default, as a table."""
    table = Table(title="configuration (what differs from the defaults)", title_justify="left")
    table.add_column("name")
    table.add_column("value", overflow="fold")
    for config in configs:
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if field.init and value != default:
                table.add_row(field.name, str(value))
    Console().print(table)


def _known(parser: HfArgumentParser) -> list[str]:
    return [action.dest for action in parser._actions if action.dest not in ("help", "config")]


def _with_new_spellings(argv: list[str]) -> list[str]:
    renamed = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        new = RENAMED.get(name.removeprefix("--")) if name.startswith("--") else None
        renamed.append(f"--{new}{equals}{value}" if new else argument)
    return renamed


def _config_file(argv: list[str]) -> str | None:
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        if argument.startswith("--config="):
            return argument.partition("=")[2]
        if argument == "--config":
            return following
    return None


def _read_yaml(path: Path, known: list[str]) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no configuration file '{path}'.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"Cannot read the configuration file '{path}': {reason}.") from None
    if not isinstance(values, dict):
        raise UserError(f"The configuration file '{path}' must hold `name: value` lines, one per flag.")
    values = {RENAMED.get(name, name): value for name, value in values.items()}
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"Did you mean '{close[0]}'?" if close else "Run with --help to see every name."
            raise UserError(f"Unknown key '{name}' in '{path}'. {hint}")
    return values


def _built(kind: Any, values: dict[str, Any]) -> Any:
    names = [field.name for field in dataclasses.fields(kind) if field.init]
    try:
        return kind(**{name: values[name] for name in names})
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(" ".join(str(error).split())) from error
