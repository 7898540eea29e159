"""What must hold after a command, whatever its input was; each function returns what is wrong, as (kind, detail)."""

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from deep_rlhf.cli.commands import ALGORITHMS
from fuzz.case import Case

Fault = tuple[str, str]  # the kind of failure, and its detail

TEMPORARY = re.compile(r"\.tmp$|\.old$|\.incomplete$|^tmp[a-z0-9_]{8}$")
SIDE_FILES = ("-wal", "-shm", "-journal")  # of SQLite
SINGLE = re.compile(r"<[\w.]+ object at 0x|\x1b|\bErrno\b.*\bErrno\b|Traceback|\(most recent call last\)")
SHOWN = 300


def contents(folder: Path) -> dict[str, str]:
    """What every path below a folder is: a digest, or the kind of file."""
    found = {}
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif not stat.S_ISDIR(mode):
            found[str(path.relative_to(folder))] = (
                f"{stat.S_IFMT(mode):o} {os.readlink(path) if path.is_symlink() else ''}"
            )
    return found


def faults(case: Case, folder: Path, before: dict[str, str], code: int | None, out: str, err: str) -> Iterator[Fault]:
    """What is wrong after a case. code: the exit code, minus a signal, or None after the limit of time."""
    if code is None:
        if not case.endless:
            yield "hang", f"no end within {case.seconds:g} s, in {_stuck(err)}"
        return
    yield from words(case, code, out, err)
    yield from damage(case, folder, before, code)
    yield from left_over(folder, before)
    if code == 0:
        if case.refused:
            yield "accepted", f"exit code 0, though {case.what}"
        for path in outputs(folder, before):
            yield from wrong(path)
        if problem := missing_output(case, folder) or case.check(folder):
            yield "wrong result", problem


def words(case: Case, code: int, out: str, err: str) -> Iterator[Fault]:
    """The exit code, and how it is explained."""
    for text in (err, out):
        if "Traceback (most recent call last)" in text or "Exception ignored" in text:
            yield "traceback", _cause(text)
            return
    if code < 0:
        yield f"killed by signal {-code}", _last(err)
    elif code not in ((0, 2, 130) if case.interrupt is not None else (0, 2)):
        yield f"exit code {code}", _last(err)
    elif code == 2:
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        if len(lines) != 1 or err.rstrip().splitlines()[-1] != lines[0]:
            yield "error of several lines", f"{len(lines)} lines begin with 'error: '; the last line: {_last(err)}"
        elif lines[0].strip() == "error:" or SINGLE.search(lines[0]):
            yield "error that is no sentence", lines[0][:SHOWN]
        elif len(lines[0]) > 20_000:
            yield "error of many words", lines[0][:SHOWN]


def damage(case: Case, folder: Path, before: dict[str, str], code: int) -> Iterator[Fault]:
    """Existing files that changed, and files in places where none belong."""
    after = contents(folder)
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) == after.get(name) or _is_own(case, name) or (code == 0 and name in case.replaces):
            continue
        if name not in before:
            yield "file in a strange place", name
        else:
            yield "damaged file", f"{name} is {'changed' if name in after else 'gone'}"


def _is_own(case: Case, name: str) -> bool:
    side = any(name == f"{own}{ending}" for own in before_sides(case) for ending in SIDE_FILES)
    return side or any(name == own or name.startswith(f"{own}/") for own in (*case.writes, "home", "cache"))


def before_sides(case: Case) -> list[str]:
    """Databases beside which SQLite may keep files."""
    return [word.split("=")[-1] for word in case.argv if ".db" in word]


def left_over(folder: Path, before: dict[str, str]) -> Iterator[Fault]:
    """Temporary and half-written files."""
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if TEMPORARY.search(path.name) and not any(old == name or old.startswith(f"{name}/") for old in before):
            yield "left-over file", re.sub(r"\d+", "N", name)
    for path in outputs(folder, before):
        if path.suffix == ".safetensors" and (problem := _unreadable(path)):
            yield "half-written file", f"{path.relative_to(folder)}: {problem}"


def outputs(folder: Path, before: dict[str, str]) -> list[Path]:
    """The regular files that are new or changed; one that was only moved is neither."""
    known = {*before.values()}
    return [folder / name for name, digest in contents(folder).items() if digest not in known and " " not in digest]


def wrong(path: Path) -> Iterator[Fault]:
    """Weights that are not finite, and files that are not what their name says."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - it is no dict
                    tensor = tensors.get_tensor(name)
                    if tensor.is_floating_point() and not tensor.isfinite().all():
                        yield "weights that are not finite", f"{path.name}: {name}"
                        return
        elif path.suffix == ".json" and path.name != "state.json":
            strict(path.read_text(encoding="utf-8"))
        elif path.name in ("metrics.jsonl", "samples.jsonl"):
            for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n"):
                strict(line)
    except Exception as error:  # whatever the file's reader says
        yield "wrong result", f"{path.name} cannot be read: {error}"


def strict(text: str) -> Any:
    """A JSON value, but not NaN or infinity, which JSON lacks."""

    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def missing_output(case: Case, folder: Path) -> str | None:
    """What a command that says it succeeded must have written."""
    supervised = ["summary.json", "config.yaml", "metrics.jsonl"]
    expected = {
        "reward": ["model.safetensors", "reward_model.json", *supervised],
        "dpo": ["model/model.safetensors|model/adapter_model.safetensors", *supervised],
        "loop": ["model"],
        **{name: ["model/config.json|model/adapter_config.json", *supervised] for name in ALGORITHMS},
    }.get(case.argv[0] if case.argv else "", [])
    if {"--help", "-h"} & {*case.argv}:
        return None
    out = folder / next(
        (word.split("=", 1)[1] for word in reversed(case.argv) if word.startswith("--output_dir=")), "out"
    )
    for alternatives in expected:
        if not any((out / name).exists() for name in alternatives.split("|")):
            return f"exit code 0, but there is no {alternatives} in the output folder"
    summary = out / "summary.json"
    if expected and case.argv[0] in ("reward", "dpo") and summary.is_file():
        for name in ("loss", "accuracy"):
            value = json.loads(summary.read_text()).get(name)
            if not isinstance(value, int | float) or not math.isfinite(value):
                return f"{name} in summary.json is {value}"
    return None


def _unreadable(path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt"):
            return None
    except Exception as error:  # of another kind for each kind of damage
        return str(error)[:SHOWN]


def _cause(text: str) -> str:
    """The exception of the last traceback, and the last place of ours in it."""
    lines = text[text.rindex("Traceback" if "Traceback (" in text else "Exception ignored") :].splitlines()
    ours = [re.sub(r'.*/(deep_rlhf/.*)", line (\d+).*', r"\1:\2", line) for line in lines if "/deep_rlhf/" in line]
    exception = next(
        (line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception|Exit|Interrupt|\w)\b", line)), ""
    )
    return f"{exception[:SHOWN]} <- {ours[-1] if ours else lines[0]}"


def _stuck(text: str) -> str:
    """The places of the project in the stacks that a process wrote when it was over its time."""
    stacks = text[text.rfind("hread 0x") :]
    ours = re.findall(r'deep_rlhf/([\w/]+\.py)", line (\d+)', stacks)
    return " < ".join(f"{name}:{line}" for name, line in ours[:3]) or _last(text)


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:SHOWN] if lines else "(nothing on stderr)"
