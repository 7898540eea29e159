"""Parses the command line and a YAML file into validated dataclasses: one flag per field; flags override the file."""

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

from deep_rlhf.errors import CheckpointError, ConfigError, ResourceError, UserError, one_line
from deep_rlhf.runtime.run_files import check_names

# Names of transformers' arguments that scripts still use and newer releases dropped.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
}


class _Loader(yaml.SafeLoader):
    """SafeLoader with an error of YAML's own for a key that is there twice, and for a value that is not of its tag."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """As SafeLoader's. Raises ConstructorError for what its constructors fail on, such as `!!bool perhaps`."""
        try:
            return super().construct_object(node, deep)
        except (KeyError, AttributeError, TypeError, ValueError, OverflowError) as error:
            value = f"'{node.value[:60]}'" if isinstance(node, yaml.ScalarNode) else "this"
            problem = f"{value} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As SafeLoader's. Raises ConstructorError for a key that is there twice."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key '{key.value}' is there twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help with one line of usage, one spelling of each flag, and no default that is None."""

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
    """HfArgumentParser with literal % in help texts, JSON for dicts, and errors of one sentence."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.flags: dict[str, argparse.Action] = {}  # by field
        super().__init__(*args, **options)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """As argparse's, but a % in the help is a per cent sign, and a dict is given as JSON."""
        options["help"] = (options.get("help") or "").replace("%%", "%").replace("%", "%%")
        if get_origin(options.get("type")) is dict:
            options["type"] = _mapping
        action = super().add_argument(*names, **options)
        if action.option_strings[0].startswith("--no_"):  # HfArgumentParser adds it for a bool that is True
            action.help = argparse.SUPPRESS
        if action.dest not in ("help", "config"):
            self.flags.setdefault(action.dest, action)
        return action

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError with one sentence, where argparse prints the usage and exits."""
        message = re.sub(r"^argument (--\w+)(/--[\w-]+)?", r"\1", message).rstrip(".")
        raise ConfigError(f"{message}. Run with --help to see every flag.")


def parse_flags(argv: list[str] | None, *dataclass_types: Any, prog: str, description: str) -> tuple[Any, ...]:
    """Returns one instance of each dataclass, from the flags in `argv` and those of `--config file.yaml`.

    Flags override the file. Raises ConfigError for an unknown flag or key, with the closest known one, for an invalid
    value, and for an unreadable file.
    """
    argv = _with_new_spellings(sys.argv[1:] if argv is None else argv)
    parser = _Parser(dataclass_types, prog=prog, description=description, allow_abbrev=False, formatter_class=_Help)
    parser.add_argument("--config", help="a YAML file of flags; flags on the command line override it")
    _shorten_help(parser, dataclass_types)
    namespace, unknown = parser.parse_known_args([*_flags_of_file(parser, argv), *argv])
    if unknown:
        name = unknown[0].split("=")[0]
        close = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), parser.flags, n=1)
        hint = f"Did you mean --{close[0]}?" if close else "Run with --help to see every flag."
        raise ConfigError(f"Unknown argument {name}. {hint}")
    values = vars(namespace)
    for name, action in parser.flags.items():
        if isinstance(values[name], list) and action.nargs not in ("+", "*"):  # argparse makes [] of --flag=--
            raise ConfigError(f"--{name} needs a value, not '--'.")
    _check_encoding(values)
    return tuple(_built(kind, values) for kind in dataclass_types)


def output_folder(name: str | Path) -> Path:
    """Creates the folder of a run's results and returns its absolute path, which a later `os.chdir` does not change.

    Raises ConfigError for a URL, and CheckpointError if the results cannot be written there.
    """
    if "://" in str(name):
        raise ConfigError(f"--output_dir '{name}' is a URL: give a folder.")
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CheckpointError(f"Cannot write to --output_dir '{folder}': {error.strerror}.") from error
    check_names(folder)
    return folder.absolute()


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
    """Prints a table of the fields that differ from their defaults."""
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


def _check_encoding(values: dict[str, Any]) -> None:
    """Raises ConfigError for bytes that are not UTF-8, and for NUL: libraries cannot read or write such a path."""
    for name, value in values.items():
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str):
                continue
            try:
                problem = "has a null character" if b"\0" in text.encode() else ""
            except UnicodeEncodeError:
                problem = "is not UTF-8 text"
            if problem:
                raise ConfigError(f"--{name} {text!r} {problem}: rename it, or give another value.")


def _mapping(text: str) -> dict[str, Any]:
    """Parses the JSON object of a flag."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected JSON like '{{\"name\": 1}}', not {text}")
    return value


def _shorten_help(parser: _Parser, dataclass_types: Sequence[Any]) -> None:
    """Lists the flags inherited from transformers.TrainingArguments by name only, without their help."""
    inherited = {
        field.name
        for kind in dataclass_types
        for base in kind.__mro__
        if base.__module__.startswith("transformers.")
        for field in dataclasses.fields(base)
        if field.name not in vars(kind).get("__annotations__", {})
    }
    for name in inherited & parser.flags.keys():
        parser.flags[name].help = argparse.SUPPRESS
    if inherited:
        names = ", ".join(sorted(inherited & parser.flags.keys()))
        parser.epilog = f"And every flag of transformers.TrainingArguments: {names}."


def _with_new_spellings(argv: list[str]) -> list[str]:
    renamed = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        new = RENAMED.get(name.removeprefix("--").replace("-", "_")) if name.startswith("--") else None
        renamed.append(f"--{new}{equals}{value}" if new else argument)
    return renamed


def _flags_of_file(parser: _Parser, argv: list[str]) -> list[str]:
    """Returns the content of `--config FILE` as flags, after checking them."""
    only_config = _Parser(add_help=False, allow_abbrev=False)
    only_config.add_argument("--config")
    path = only_config.parse_known_args(argv)[0].config
    if path is None:
        return []
    if not path:
        raise ConfigError("--config needs the name of a YAML file.")
    values = _read_yaml(Path(path), list(parser.flags))
    try:
        flags = _as_flags(values, lists={name for name, action in parser.flags.items() if action.nargs in ("+", "*")})
        _check_encoding(vars(parser.parse_args(flags)))
    except ConfigError as error:
        raise ConfigError(f"In '{path}': {error}") from None
    return flags


def _as_flags(values: dict[str, Any], *, lists: set[str]) -> list[str]:
    """Returns the values of a file as command-line flags, to be checked alike; null and [] mean the default.

    lists: the flags that take several values. Raises ConfigError for a list or a mapping that no flag can be.
    """
    flags = []
    for name, value in values.items():
        if isinstance(value, list):
            if name not in lists and value:
                raise ConfigError(f"{name} takes one value, not a list.")
            flags += [f"--{name}", *map(str, value)] if value else []
        elif value is not None:
            try:
                flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
            except (
                TypeError,
                ValueError,
                RecursionError,
            ) as error:  # a date, or a mapping in itself
                raise ConfigError(f"{name} is no mapping that JSON can hold: {one_line(error)}.") from error
    return flags


def _read_yaml(path: Path, known: list[str]) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"There is no configuration file '{path}'.") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"'{path}', line {line}, is not valid YAML: {error.problem}.") from None
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"Cannot read the configuration file '{path}': {one_line(error)}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"The configuration file '{path}' must hold `name: value` lines, one per flag.")
    for old, new in RENAMED.items():
        if old in values and new in values:
            raise ConfigError(f"'{path}' has both '{old}' and '{new}', which are the same flag: leave out one of them.")
    values = {RENAMED.get(name, name): value for name, value in values.items()}
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"Did you mean '{close[0]}'?" if close else "Run with --help to see every name."
            raise ConfigError(f"Unknown key '{name}' in '{path}'. {hint}")
    return values


def _built(kind: Any, values: dict[str, Any]) -> Any:
    names = [field.name for field in dataclasses.fields(kind) if field.init]
    try:
        return kind(**{name: values[name] for name in names})
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(one_line(error)) from error
    except ImportError as error:
        raise ResourceError(one_line(error)) from error
