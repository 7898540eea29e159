"""Checkpoints that survive a kill at any moment: supervised and online training share this one format.

`<folder>/step-<N>/{state.safetensors, state.json}` holds the tensors and the tree around them, without pickle;
`<folder>/history.jsonl` the rows that all checkpoints share (`runtime.history`). `state.json` holds the digests of the
tensors, of its part of the history and of itself, so a change of any byte is found. Both files are written and synced
under a temporary name, which is renamed when they are complete. Only then are older checkpoints removed, the oldest
first.
"""

import hashlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deep_rlhf.errors import CheckpointError
from deep_rlhf.runtime.history import HISTORY, History, refuse_pipes

if TYPE_CHECKING:
    from deep_rlhf.runtime.processes import Runtime

logger = logging.getLogger(__name__)

TENSORS, TREE = "state.safetensors", "state.json"
# The second name is given while a checkpoint is replaced by one of the same step.
_NAME = re.compile(r"step-(0|[1-9]\d*)|\.step-(0|[1-9]\d*)\.old", re.ASCII)
_HEAD = re.compile(rb'\{"sha256": "([0-9a-f]{64})", "content": ')  # of state.json; a brace ends the file
_DAMAGE = (OSError, ValueError, LookupError, TypeError, SafetensorError)  # what reading a damaged checkpoint raises


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint; its tensors are on the CPU."""

    path: Path
    step: int
    state: dict[str, Any]
    history: History  # the rows up to this step; none if it was saved without a history


def save_checkpoint(
    folder: Path,
    step: int,
    state: Mapping[str, Any],
    *,
    keep: int | None = 2,
    needs: Sequence[int] = (),
    history: History | None = None,
) -> Path:
    """Writes `state` to `<folder>/step-<step>`, then removes older checkpoints.

    state: any nesting of dicts (keys str or int), lists, tuples, None, bool, int, float, str and tensors; tensors that
    are the same view of one storage are written once. keep: how many of the newest checkpoints up to `step` stay (None:
    all). needs: steps of earlier checkpoints that this one refers to; they stay as long as it does. history: rows that
    are appended to those of the earlier checkpoints. Call it on one process. Raises CheckpointError if the disk refuses
    the write, which leaves the earlier checkpoints intact, and TypeError for a value that cannot be stored.
    """
    tensors: dict[str, Tensor] = {}
    tree = _encode(dict(state), tensors, {})
    whole, temporary = folder / f"step-{step}", folder / f".step-{step}.tmp"
    try:
        _remove(folder.glob(".step-*.tmp"))
        temporary.mkdir(parents=True)
        save_file(_unshared(tensors), temporary / TENSORS)
        content = {
            "step": step,
            "needs": [*needs],
            "bytes": (temporary / TENSORS).stat().st_size,
            "sha256": file_digest(temporary / TENSORS),
            "history": history.save(folder) if history is not None else None,
            "state": tree,
        }
        (temporary / TREE).write_bytes(_sealed(content))
        for path in (temporary / TENSORS, temporary / TREE, temporary):
            sync(path)
        replaced = folder / f".step-{step}.old"
        if whole.exists():
            _remove([replaced])
            os.rename(whole, replaced)
        os.rename(temporary, whole)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(_write_failure(step, folder, error)) from error
    own = {number: path for number, path in _checkpoints(folder) if number <= step and path.name[0] != "."}
    newest = list(own)[:keep] if keep else list(own)
    kept = {*newest, *(needed for number in newest for needed in _needs(own[number]))}
    _remove(path for number, path in _checkpoints(folder)[::-1] if number not in kept or path.name[0] == ".")
    return whole


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint in `folder`, or None; a warning names each damaged one and what is wrong with it.

    A checkpoint is complete if those that it needs are complete, too.
    """
    for _, path in _checkpoints(folder):
        try:
            return _read(path)
        except _DAMAGE as error:
            logger.warning("The checkpoint %s is damaged and skipped (%s).", path, _reason(error))
    return None


def latest_on_all(folder: Path, runtime: "Runtime") -> Checkpoint | None:
    """As `latest_checkpoint`, on every process the one that the main process finds.

    Raises CheckpointError on all processes if one of them cannot read it.
    """
    found = latest_checkpoint(folder) if runtime.is_main else None
    path = runtime.from_main(found.path if found else None)
    failure: CheckpointError | None = None
    if path is not None and found is None:
        try:
            found = read_checkpoint(path)
        except CheckpointError as error:
            failure = error
    runtime.raise_first(failure)
    return found


def has_checkpoints(folder: Path) -> bool:
    """Whether there is a checkpoint in `folder`, complete or not."""
    return bool(_checkpoints(folder))


def newest_step(folder: Path, key: str) -> tuple[int, Any] | None:
    """Step and the entry `key`, which holds no tensor, of the newest checkpoint whose state.json can be read.

    Its tensors are not read. The entry is None if there is none of this name; the result is None without checkpoints.
    Raises CheckpointError if no state.json can be read.
    """
    reasons = []
    for step, path in _checkpoints(folder):
        try:
            return step, _decode(dict(_read_content(path)["state"]["dict"]).get(key), _no_tensor)
        except _DAMAGE as error:
            reasons.append(f"{path}: {_reason(error)}")
    if reasons:
        raise CheckpointError(f"No checkpoint in '{folder}' can be read ({'; '.join(reasons)})")
    return None


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a folder that `save_checkpoint` wrote."""
    return (path / TREE).is_file()


def read_checkpoint(path: Path, keys: Collection[str] | None = None) -> Checkpoint:
    """The checkpoint at `path`; of its state only the entries named by `keys`, so that less memory is needed.

    With `keys` the history is not read. Raises CheckpointError if it is damaged.
    """
    try:
        return _read(path, keys)
    except _DAMAGE as error:
        raise CheckpointError(
            f"The checkpoint '{path}' cannot be read ({_reason(error)}): choose another one."
        ) from error


def remove_checkpoints(folder: Path) -> None:
    """Removes every checkpoint in `folder`, complete or not, so that a later run cannot resume them.

    The oldest goes first and the history last, so that a kill in between leaves the newest one whole.
    """
    _remove([*(path for _, path in _checkpoints(folder)[::-1]), *folder.glob(".step-*.tmp"), *folder.glob(HISTORY)])


def changed_flags(saved: Mapping[str, Any], now: Mapping[str, Any], *, free: Collection[str]) -> str:
    """Every flag outside `free` that differs, as "name (old value when the run began, now new value)", with commas."""
    names = sorted((saved.keys() | now.keys()) - set(free))
    return ", ".join(
        f"{name} ({saved.get(name)!r} when the run began, now {now.get(name)!r})"
        for name in names
        if saved.get(name) != now.get(name)
    )


def random_states() -> dict[str, Any]:
    """The random states of Python, NumPy, torch and every CUDA device, as `save_checkpoint` takes them."""
    numpy_state: Any = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    return {
        "python": random.getstate(),
        "numpy": numpy_state,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Restores what `random_states` returned; states of CUDA devices that this machine lacks are ignored."""
    random.setstate(states["python"])
    numpy_state = dict(states["numpy"])
    numpy_state["state"] = {**numpy_state["state"], "key": np.array(numpy_state["state"]["key"], dtype=np.uint32)}
    np.random.set_state(numpy_state)
    torch.set_rng_state(states["torch"])
    for device, state in zip(range(torch.cuda.device_count()), states["cuda"], strict=False):
        torch.cuda.set_rng_state(state, device)


def sync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """The sha256 of a file, in hexadecimal. Raises ValueError for a pipe or a device."""
    refuse_pipes(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_failure(step: int, folder: Path, error: Exception) -> str:
    """What could not be written, where, why, what is left, and what to do."""
    why = getattr(error, "strerror", None) or error
    previous = _newest_complete(folder)
    left = f"the previous checkpoint {previous} is intact" if previous else "there is no earlier checkpoint"
    action = (
        "free disk space and continue with --resume" if previous else "free disk space, or choose another output_dir"
    )
    return f"The checkpoint of step {step} could not be written to {folder} ({why}): {left}; {action}."


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders, the newest first; a replaced checkpoint follows its replacement."""
    found = [(match, path) for path in folder.glob("*") if (match := _NAME.fullmatch(path.name))]
    return sorted(((int(match[1] or match[2]), path) for match, path in found), reverse=True)


def _newest_complete(folder: Path) -> Path | None:
    for _, path in _checkpoints(folder):
        try:
            _verified(path)
        except _DAMAGE:
            continue
        return path
    return None


def _needs(path: Path) -> list[int]:
    """The steps of the checkpoints that the one at `path` refers to; none if it cannot be read."""
    try:
        return _read_content(path)["needs"]
    except _DAMAGE:
        return []


def _read(path: Path, keys: Collection[str] | None = None) -> Checkpoint:
    """As `read_checkpoint`. Raises one of _DAMAGE if the checkpoint, or one that it needs, is not complete."""
    content = _verified(path)
    for step in content["needs"]:
        needed = path.with_name(f"step-{step}")
        try:
            _verified(needed)
        except _DAMAGE as error:
            raise ValueError(f"it needs {needed}, which is damaged: {_reason(error)}") from error
    marked = content["history"] is not None and keys is None
    history = History.read(path.parent, content["history"]) if marked else History()
    tree = [[key, value] for key, value in content["state"]["dict"] if keys is None or key in keys]
    for extra in sorted({child.name for child in path.iterdir()} - {TENSORS, TREE}):
        logger.warning("'%s' in the checkpoint %s is not part of it and is ignored.", extra, path)
    with safe_open(path / TENSORS, framework="pt") as tensors:
        names: dict[str, Tensor] = {}  # a tensor that occurs twice is one object

        def tensor(name: str) -> Tensor:
            if name not in names:
                names[name] = tensors.get_tensor(name)
            return names[name]

        return Checkpoint(path, content["step"], _decode({"dict": tree}, tensor), history)


def _verified(path: Path) -> dict[str, Any]:
    """The content of state.json, once all digests are those that it names. Raises one of _DAMAGE otherwise."""
    content = _read_content(path)
    size = (path / TENSORS).stat().st_size
    if size != content["bytes"]:
        raise ValueError(f"{TENSORS} has {size} of {content['bytes']} bytes")
    if file_digest(path / TENSORS) != content["sha256"]:
        raise ValueError(f"{TENSORS} was changed: it has another digest than when it was written")
    return content


def _sealed(content: Mapping[str, Any]) -> bytes:
    """The bytes of state.json: the content and its digest."""
    text = json.dumps(content).encode()
    return b'{"sha256": "%s", "content": %s}' % (hashlib.sha256(text).hexdigest().encode(), text)


def _read_content(path: Path) -> dict[str, Any]:
    """The content of state.json. Raises one of _DAMAGE if it is not as it was written."""
    for name in (TREE, TENSORS):
        refuse_pipes(path / name)
    written = (path / TREE).read_bytes()
    head = _HEAD.match(written)
    text = written[head.end() : -1] if head else b""
    if head and written.endswith(b"}") and hashlib.sha256(text).hexdigest().encode() == head[1]:
        content = json.loads(text)
        named = _NAME.fullmatch(path.name)
        if named and int(named[1] or named[2]) != content["step"]:
            raise ValueError(f"{TREE} is of step {content['step']}: the folder was renamed or copied")
        return content
    if written.startswith(b'{"step": '):
        raise ValueError(f"{TREE} was written by an earlier version of this program, or changed")
    raise ValueError(f"{TREE} is empty" if not written else f"{TREE} was cut or changed: it has another digest")


def _reason(error: Exception) -> str:
    """What is wrong, with the name of the file."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{Path(error.filename).name}: {error.strerror}"
    return " ".join(str(error).split())


def _no_tensor(name: str) -> Tensor:
    raise LookupError(f"the tensor {name} is not read")


def _remove(paths: Iterable[Path]) -> None:
    """Removes checkpoints; each loses its name first, so that a kill leaves none that looks damaged."""
    for path in list(paths):
        unnamed = path if path.suffix == ".tmp" else path.with_name(f".{path.name.lstrip('.')}.tmp")
        with suppress(OSError):  # what cannot be removed stays
            if unnamed != path:
                shutil.rmtree(unnamed, ignore_errors=True)
                os.rename(path, unnamed)
            if unnamed.is_dir() and not unnamed.is_symlink():
                shutil.rmtree(unnamed, ignore_errors=True)
            else:
                unnamed.unlink(missing_ok=True)


def _encode(value: Any, tensors: dict[str, Tensor], names: dict[Any, str]) -> Any:
    """`value` as JSON, in which every object has one key, its type; adds each tensor view to `tensors` once."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        view = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        name = names.setdefault(view, str(len(names)))
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, list):
        return [_encode(item, tensors, names) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, tensors, names) for item in value]}
    if isinstance(value, dict) and all(isinstance(key, str | int) for key in value):
        return {"dict": [[key, _encode(item, tensors, names)] for key, item in value.items()]}
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}, or a dict with keys of other types")


def _decode(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensor) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensor(content)
    if kind == "tuple":
        return tuple(_decode(item, tensor) for item in content)
    return {key: _decode(item, tensor) for key, item in content}


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU; different views of one storage are copied, since safetensors refuses them."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return result
