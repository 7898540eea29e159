"""From the command line and a YAML file to validated dataclasses: one flag per field, flags override the file."""

import argparse
import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NoReturn, get_origin

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers.hf_argparser import HfArgumentParser

from deep_rlhf.errors import UserError

# Spellings that users' scripts still have and newer transformers dropped.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
}


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """One line of usage, one spelling of each flag, and no word about a default that is None."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def _format_usage(self, *args: Any, **kwargs: Any) -> str:
        return f"usage: {self._prog} [--flag=value ...]\n\n"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        choices = f"={{{','.join(map(str, action.choices))}}}" if action.choices else ""
        return action.option_strings[-1 if action.dest == "help" else 0] + choices

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """As argparse's, but the help is taken as it reads: a % in it is a per cent sign."""
        options["help"] = (options.get("help") or "").replace("%%", "%").replace("%", "%%")
        if get_origin(options.get("type")) is dict:
            options["type"] = _mapping
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        """One sentence instead of a page of usage."""
        message = re.sub(r"^argument (--\w+)(/--[\w-]+)?", r"\1", message).rstrip(".")
        raise UserError(f"{message}. Run with --help to see every flag.")


def parse_flags(argv: list[str] | None, *dataclass_types: Any, prog: str, description: str) -> tuple[Any, ...]:
    """One instance of each dataclass, from `--config file.yaml` and, over it, the flags.

    Raises UserError for an unknown flag or key (naming the closest one), a wrong value, or an unreadable file.
    """
    argv = _with_new_spellings(sys.argv[1:] if argv is None else argv)
    parser = _Parser(dataclass_types, prog=prog, description=description, allow_abbrev=False, formatter_class=_Help)
    parser.add_argument("--config", help="a YAML file of flags; flags on the command line override it")
    _shorten_help(parser, dataclass_types)
    namespace, unknown = parser.parse_known_args([*_flags_of_file(parser, argv), *argv])
    if unknown:
        name = unknown[0].split("=")[0]
        close = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), _known(parser), n=1)
        hint = f"Did you mean --{close[0]}?" if close else "Run with --help to see every flag."
        raise UserError(f"Unknown argument {name}. {hint}")
    values = vars(namespace)
    return tuple(_built(kind, values) for kind in dataclass_types)


def output_folder(name: str | Path) -> Path:
    """Makes the folder of a run's results, before anything takes time. Raises UserError if nothing can be written."""
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"Cannot write to --output_dir '{folder}': {error.strerror}.") from error
    return folder


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
    table = Table(show_header=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for config in configs:
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if field.init and value != default:
                table.add_row(field.name, escape(str(value)))
    Console().print("Settings that differ from the defaults:", table if table.row_count else "none", sep="\n")


def _mapping(text: str) -> dict[str, Any]:
    """A flag's value of names and values, as JSON."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected JSON like '{{\"name\": 1}}', not {text}")
    return value


def _known(parser: HfArgumentParser) -> list[str]:
    return [action.dest for action in parser._actions if action.dest not in ("help", "config")]


def _shorten_help(parser: HfArgumentParser, dataclass_types: Sequence[Any]) -> None:
    """Explains the flags that are declared here; those inherited from transformers.TrainingArguments are named."""
    inherited = {
        name
        for kind in dataclass_types
        for base in kind.__mro__
        if base.__module__.startswith("transformers.")
        for name in base.__dataclass_fields__.keys() - vars(kind).get("__annotations__", {}).keys()
    }
    for action in parser._actions:
        if action.dest in inherited or action.option_strings[0].startswith("--no_"):
            action.help = argparse.SUPPRESS
    if inherited:
        names = ", ".join(sorted(inherited & set(_known(parser))))
        parser.epilog = f"And every flag of transformers.TrainingArguments: {names}."


def _with_new_spellings(argv: list[str]) -> list[str]:
    renamed = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        new = RENAMED.get(name.removeprefix("--").replace("-", "_")) if name.startswith("--") else None
        renamed.append(f"--{new}{equals}{value}" if new else argument)
    return renamed


def _flags_of_file(parser: HfArgumentParser, argv: list[str]) -> list[str]:
    """What `--config FILE` says, as flags that were checked."""
    only_config = _Parser(add_help=False, allow_abbrev=False)
    only_config.add_argument("--config")
    path = only_config.parse_known_args(argv)[0].config
    if path is None:
        return []
    flags = _as_flags(_read_yaml(Path(path), _known(parser)))
    try:
        parser.parse_args(flags)
    except UserError as error:
        raise UserError(f"In '{path}': {error}") from None
    return flags


def _as_flags(values: dict[str, Any]) -> list[str]:
    """The values of a file as they would be typed, so that they are checked alike; null and [] mean the default."""
    flags = []
    for name, value in values.items():
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)] if value else []
        elif value is not None:
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def _read_yaml(path: Path, known: list[str]) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no configuration file '{path}'.") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"'{path}', line {line}, is not valid YAML: {error.problem}.") from None
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
