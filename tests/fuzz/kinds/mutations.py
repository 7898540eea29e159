"""Damage to files and folders, chosen by a random generator; each function says what it did."""

import copy
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 548105171\n"
PAGE = "<!DOCTYPE html><html><head><title>404 Not Found</title></head><body>Not Found</body></html>\n"


# ---- the bytes of a file


def truncated(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(max(1, len(data)))]


def slightly_truncated(rng: random.Random, data: bytes) -> bytes:
    return data[: -rng.randint(1, 8)]


def flipped(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 5, 50))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flipped_at_the_start(rng: random.Random, data: bytes) -> bytes:
    head = min(len(data), 64)
    return flipped(rng, data[:head]) + data[head:]


def inserted(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice((1, 3, 100))) + data[at:]


def without_a_part(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.choice((1, 2, 50, 1000)) :]


def line_twice(rng: random.Random, data: bytes) -> bytes:
    lines = data.splitlines(keepends=True)
    at = rng.randrange(max(1, len(lines)))
    return b"".join([*lines[: at + 1], *lines[at:]])


def line_left_out(rng: random.Random, data: bytes) -> bytes:
    lines = data.splitlines(keepends=True)
    at = rng.randrange(max(1, len(lines)))
    return b"".join([*lines[:at], *lines[at + 1 :]])


BYTES: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "truncated": truncated,
    "slightly truncated": slightly_truncated,
    "with flipped bits": flipped,
    "with flipped bits at the start": flipped_at_the_start,
    "with bytes inserted": inserted,
    "with bytes left out": without_a_part,
    "with a line twice": line_twice,
    "with a line left out": line_left_out,
    "empty": lambda rng, data: b"",
    "only white space": lambda rng, data: b" \n\n\t\n",
    "an LFS pointer": lambda rng, data: LFS.encode(),
    "a web page": lambda rng, data: PAGE.encode(),
    "zeros": lambda rng, data: bytes(len(data)),
    "random bytes": lambda rng, data: rng.randbytes(rng.choice((1, 8, 100, len(data)))),
    "twice": lambda rng, data: data + data,
    "with a byte order mark": lambda rng, data: b"\xef\xbb\xbf" + data,
    "in UTF-16": lambda rng, data: data.decode("utf-8", "replace").encode("utf-16"),
    "not UTF-8": lambda rng, data: data.replace(b"e", b"\xe9", rng.choice((1, 5))),
    "with NUL bytes": lambda rng, data: data.replace(b" ", b"\0", rng.choice((1, 5))),
    "with CRLF": lambda rng, data: data.replace(b"\n", b"\r\n"),
    "deeply nested": lambda rng, data: b"[" * 100_000,
    "JSON null": lambda rng, data: b"null",
    "JSON list": lambda rng, data: b"[]",
    "JSON object": lambda rng, data: b"{}",
}
# After these nothing of a file is left that could be meant.
DESTROYED = ("empty", "only white space", "an LFS pointer", "a web page", "zeros", "deeply nested", "JSON null")


# ---- what a path is


def _replaced(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def missing(path: Path) -> None:
    _replaced(path)


def folder(path: Path) -> None:
    _replaced(path)
    path.mkdir()


def fifo(path: Path) -> None:
    _replaced(path)
    os.mkfifo(path)


def symlink_loop(path: Path) -> None:
    _replaced(path)
    path.symlink_to(path.name)


def dangling(path: Path) -> None:
    _replaced(path)
    path.symlink_to("nowhere")


def nothing(path: Path) -> None:
    _replaced(path)
    path.symlink_to("/dev/null")


PATHS: dict[str, Callable[[Path], None]] = {
    "missing": missing,
    "a folder": folder,
    "a FIFO": fifo,
    "a loop of symbolic links": symlink_loop,
    "a dangling symbolic link": dangling,
    "/dev/null": nothing,
}


def damage(rng: random.Random, path: Path) -> tuple[str, bool]:
    """Damages a file; returns how, and whether nothing of it is left that could be meant."""
    if rng.random() < 0.2:
        how = rng.choice([*PATHS])
        PATHS[how](path)
        return f"{path.name} is {how}", True
    how = rng.choice([*BYTES])
    path.write_bytes(BYTES[how](rng, path.read_bytes()))
    return f"{path.name} is {how}", how in DESTROYED


# ---- JSON

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 10**6, 2**31, 2**63, 10**20, -(2**63) - 1, 0.5, -0.5, 1e-300, 1e308),
    *(float("nan"), float("inf"), -float("inf"), "", "x", "none", "12", "é\ud800", "\0", "x" * 5000, [], {}, [[]]),
    *([1, 2, 3], ["a"], {"a": 1}, [None], "<|endoftext|>", "../..", "float99"),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON value, but for long lists: of those the first few."""
    found = [path] if path else []
    if isinstance(value, dict):
        inside = [*value.items()]
    elif isinstance(value, list):
        inside = [*enumerate(value)]
    else:
        return found
    for key, item in inside[:40]:
        found += places(item, (*path, key))
    return found


def change_json(rng: random.Random, value: Any) -> str:
    """Changes a random place of a JSON object or list; returns how."""
    choices = places(value)
    if not choices:
        return "as it was"
    *parents, last = rng.choice(choices)
    holder = value
    for key in parents:
        holder = holder[key]
    name = ".".join(map(str, [*parents, last]))
    how = rng.choice(("value", "value", "value", "left out", "renamed", "nested", "text", "swapped"))
    if how == "left out":
        del holder[last]
        return f"{name} left out"
    if how == "renamed" and isinstance(holder, dict):
        holder[f"{last}_"] = holder.pop(last)
        return f"{name} renamed"
    if how == "nested":
        for _ in range(rng.choice((1, 3, 300))):
            holder[last] = [holder[last]]
        return f"{name} nested in lists"
    if how == "text":
        holder[last] = str(holder[last])
        return f"{name} as text"
    if how == "swapped" and isinstance(holder[last], int | float) and not isinstance(holder[last], bool):
        holder[last] = holder[last] * rng.choice((-1, 2, 1000, 10**12)) + rng.choice((0, 1))
        return f"{name} = {holder[last]}"
    holder[last] = copy.deepcopy(rng.choice(VALUES))  # which a later change may change
    return f"{name} = {json.dumps(holder[last])[:40]}"


def damage_json(rng: random.Random, path: Path) -> str:
    """Changes one to three places of a JSON file, or of one line of a .jsonl file; returns how."""
    text = path.read_text(encoding="utf-8", errors="replace").rstrip("\n")
    lines = text.split("\n") if path.suffix == ".jsonl" else [text]
    at = rng.randrange(len(lines))
    try:
        value = json.loads(lines[at])
    except ValueError:  # it is damaged already
        return damage(rng, path)[0]
    if rng.random() < 0.1 and isinstance(value, dict) and value:
        key = rng.choice([*value])
        twice = json.dumps(value)[:-1] + f", {json.dumps(key)}: {json.dumps(rng.choice(VALUES))}}}"
        lines[at], changes = twice, [f"{key} twice"]
    else:
        changes = [change_json(rng, value) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
        lines[at] = json.dumps(value)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"{path.name}: {', '.join(changes)}"
