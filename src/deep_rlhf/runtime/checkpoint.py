"""Checkpoints of a training state that survive a kill at any moment: a folder counts only once it is whole.

`<folder>/step-<N>/{state.safetensors, state.json}`: the tensors, and the tree that holds them, without pickle. Both are
written and synced under a temporary name, which is renamed when they are complete; only then older ones are removed.
"""

import hashlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from deep_rlhf.errors import UserError

logger = logging.getLogger(__name__)

TENSORS, TREE = "state.safetensors", "state.json"
_NAME = re.compile(r"step-(\d+)|\.step-(\d+)\.old")  # the second one while a checkpoint of the same step replaces it


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was read whole; its tensors are on the CPU."""

    path: Path
    step: int
    state: dict[str, Any]


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any], *, keep: int = 2) -> Path:
    """Writes `state` to `<folder>/step-<step>`, then removes all but the newest `keep` checkpoints up to `step`.

    `state`: any nesting of dicts (keys str or int), lists, tuples, None, bool, int, float, str and tensors; tensors
    that are the same view of one storage are written once. Call it on one process. Raises UserError when the disk
    refuses, the earlier checkpoints intact, and TypeError for a value that cannot be stored.
    """
    tensors: dict[str, Tensor] = {}
    tree = _encode(dict(state), tensors, {})
    whole, temporary = folder / f"step-{step}", folder / f".step-{step}.tmp"
    try:
        _remove(folder.glob(".step-*.tmp"))
        temporary.mkdir(parents=True)
        save_file(_unshared(tensors), temporary / TENSORS)
        content = {"step": step, "sha256": file_digest(temporary / TENSORS), "state": tree}
        (temporary / TREE).write_text(json.dumps(content), encoding="utf-8")
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
        raise UserError(cannot_write(f"The checkpoint of step {step}", folder, error, _newest_whole(folder))) from error
    kept = [path for number, path in _checkpoints(folder) if number <= step and path.name[0] != "."][:keep]
    _remove(path for _, path in _checkpoints(folder) if path not in kept)
    return whole


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in `folder` that reads whole, None without one; a line in the log names each torn one."""
    for step, path in _checkpoints(folder):
        try:
            return Checkpoint(path, step, _decode(_read_tree(path), load_file(path / TENSORS)))
        except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
            logger.warning("The checkpoint %s is skipped: it is torn (%s).", path, error)
    return None


def remove_checkpoints(folder: Path) -> None:
    """Removes every checkpoint in `folder`, whole or not: a run that starts from the beginning must not resume them."""
    _remove([path for _, path in _checkpoints(folder)] + list(folder.glob(".step-*.tmp")))


def changed_flags(saved: Mapping[str, Any], now: Mapping[str, Any], *, free: Collection[str]) -> str:
    """Every flag outside `free` that differs, as "name (old when the run began, now new)", joined by commas."""
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
    """Restores what `random_states` returned; CUDA devices beyond those here are left out."""
    random.setstate(states["python"])
    numpy_state = dict(states["numpy"])
    numpy_state["state"] = {**numpy_state["state"], "key": np.array(numpy_state["state"]["key"], dtype=np.uint32)}
    np.random.set_state(numpy_state)
    torch.set_rng_state(states["torch"])
    for device, state in zip(range(torch.cuda.device_count()), states["cuda"], strict=False):
        torch.cuda.set_rng_state(state, device)


def sync(path: Path) -> None:
    """Returns once the file or the folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cannot_write(what: str, folder: Path, error: Exception, previous: Path | None) -> str:
    """The sentence for a disk that refused: what, where, why, what is left, and what to do."""
    why = getattr(error, "strerror", None) or error
    left = f"the previous checkpoint {previous} is intact" if previous else "there is no earlier checkpoint"
    todo = "make room and go on with --resume" if previous else "make room, or choose another output_dir"
    return f"{what} could not be written to {folder} ({why}): {left}; {todo}."


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders, the newest first, a replaced one behind its replacement."""
    found = [(match, path) for path in folder.glob("*") if (match := _NAME.fullmatch(path.name))]
    return sorted(((int(match[1] or match[2]), path) for match, path in found), reverse=True)


def _newest_whole(folder: Path) -> Path | None:
    for _, path in _checkpoints(folder):
        try:
            _read_tree(path)
        except (OSError, ValueError, LookupError, TypeError):
            continue
        return path
    return None


def _read_tree(path: Path) -> Any:
    """The tree in `path`; raises ValueError, or what reading raises, if the checkpoint is not whole."""
    content = json.loads((path / TREE).read_text(encoding="utf-8"))
    if file_digest(path / TENSORS) != content["sha256"]:
        raise ValueError(f"{TENSORS} is not what was written")
    return content["state"]


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        shutil.rmtree(path, ignore_errors=True)


def _encode(value: Any, tensors: dict[str, Tensor], names: dict[Any, str]) -> Any:
    """`value` as JSON, in which an object has one key that says what it is; fills `tensors`, each view once."""
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


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    return {key: _decode(item, tensors) for key, item in content}


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU and contiguous; different views of one storage are copied, for safetensors refuses them."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return result
