"""Checks of the files of a model folder before a library reads them, so that an error names the file and its fault."""

import json
import os
import stat
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from deep_rlhf.errors import ModelError

CONFIG, ADAPTER = "config.json", "adapter_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_JSON = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
TOKENIZER_TEXT = ("merges.txt", "vocab.txt", "chat_template.jinja")
TOKENIZER_BINARY = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
LFS_POINTER = b"version https://git-lfs"
MOST_HEADER_BYTES = 100_000_000  # as in the safetensors library


class Stored(NamedTuple):
    """What the header of a file says of a tensor: the name of its dtype there, such as F32 or BF16, and its shape."""

    dtype: str
    shape: tuple[int, ...]


def model_folder(name: str) -> Path | None:
    """The local folder that a name stands for; None for a name on the Hub.

    Raises ModelError for an empty name, a path that cannot exist, a file, and a path to a folder that does not exist.
    """
    if not name.strip():
        raise ModelError("The name of a model is empty: give a folder written by save_pretrained, or a Hub name.")
    path = Path(name)
    try:
        name.encode()
        kind = None if not os.path.lexists(path) else "folder" if path.is_dir() else "other"
        if kind == "other":
            path.stat()  # says why a link leads nowhere
    except (OSError, ValueError) as error:
        raise ModelError(f"{name!r} cannot be the folder of a model: {_why(error)}.") from error
    if kind == "folder":
        return path
    if kind == "other":
        raise ModelError(f"'{name}' is a file: give the folder of the model, written by save_pretrained.")
    if name.startswith((".", "/", "~")):
        raise ModelError(f"There is no folder '{name}': give a folder written by save_pretrained, or a Hub name.")
    return None


def check_tokenizer_files(folder: Path) -> None:
    """Raises ModelError for a file of the tokenizer that is damaged; those that do not exist are not needed here."""
    for name in (*TOKENIZER_JSON, CONFIG):
        if os.path.lexists(folder / name):
            read_object(folder / name)
    for name in (*TOKENIZER_TEXT, *TOKENIZER_BINARY):
        path = folder / name
        if os.path.lexists(path):
            content = _read(path)
            if name in TOKENIZER_TEXT:
                _text(path, content)


def check_model_files(folder: Path) -> dict[str, Stored]:
    """All tensors of a model, by their names in its files; empty for a folder of adapters.

    Raises ModelError for a configuration or a file of weights that is missing or damaged.
    """
    if os.path.lexists(folder / ADAPTER):
        base = read_object(folder / ADAPTER).get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise ModelError(f"'{folder / ADAPTER}' does not name the model of its adapters (base_model_name_or_path).")
        check_safetensors(folder / "adapter_model.safetensors")
        if not os.path.lexists(folder / CONFIG):
            return {}
    config = read_object(folder / CONFIG)
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"'{folder / CONFIG}' does not say the kind of the model: its model_type must be a text.")
    if os.path.lexists(folder / "generation_config.json"):
        read_object(folder / "generation_config.json")
    if os.path.lexists(folder / WEIGHTS):
        return check_safetensors(folder / WEIGHTS)
    if os.path.lexists(folder / INDEX):
        return _check_shards(folder)
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"'{folder}' has its weights only as a pickle ({pickles[0]}), which can run code when it is opened: write"
            " it again as safetensors, with save_pretrained."
        )
    raise ModelError(f"'{folder}' holds no weights: {WEIGHTS} is missing.")


def check_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors in a safetensors file. Raises ModelError if it is missing, cut off or damaged."""
    _check_is_file(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(len(LFS_POINTER))
            if start == LFS_POINTER:
                raise _is_pointer(path)
            if size == 0:
                raise ModelError(f"'{path}' is empty: copy it again.")
            length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else size
            if 8 + length > size or length > MOST_HEADER_BYTES:
                raise ModelError(f"'{path}' is cut off or no safetensors file: copy it again.")
            file.seek(8)
            header = file.read(length)
    except (OSError, ValueError) as error:
        raise ModelError(f"'{path}' cannot be read: {_why(error)}.") from error
    try:
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        found = {name: Stored(str(it["dtype"]), tuple(map(int, it["shape"]))) for name, it in tensors.items()}
        end = 8 + length + max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"The header of '{path}' is damaged: copy it again.") from error
    if end != size:
        raise ModelError(f"'{path}' has {size} bytes, but its header speaks of {end}: copy it again.")
    return found


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ModelError if the file is missing, unreadable or something else."""
    text = _text(path, _read(path))
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair could not be saved again
    except ValueError as error:
        raise ModelError(f"'{path}' is not valid JSON ({error}): copy or write it again.") from error
    except RecursionError as error:
        raise ModelError(f"'{path}' is not valid here: its JSON is nested too deeply.") from error
    if not isinstance(value, dict):
        raise ModelError(f"'{path}' must hold a JSON object, not {type(value).__name__}: copy or write it again.")
    return value


def file_of_tensor(folder: Path, name: str) -> Path:
    """The file that holds the tensor `name` of a model; the folder if no file holds a tensor of such a name."""
    files = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else sorted(folder.glob("*.safetensors"))
    for path in files:
        if any(known.endswith(name) or name.endswith(known) for known in check_safetensors(path)):
            return path
    return folder


def _check_shards(folder: Path) -> dict[str, Stored]:
    shards = read_object(folder / INDEX).get("weight_map")
    is_map = isinstance(shards, dict) and shards and all(isinstance(file, str) for file in shards.values())
    if not is_map:
        raise ModelError(f"'{folder / INDEX}' must name the file of each tensor in its weight_map.")
    assert isinstance(shards, dict)
    tensors: dict[str, Stored] = {}
    for file in sorted(set(shards.values())):
        if Path(file).name != file:
            raise ModelError(f"'{folder / INDEX}' names '{file}', which is no file in its folder.")
        found = check_safetensors(folder / file)
        missing = {name for name, where in shards.items() if where == file} - found.keys()
        if missing:
            raise ModelError(f"'{folder / file}' lacks the tensor '{min(missing)}', which '{INDEX}' says it holds.")
        tensors |= found
    return tensors


def _check_is_file(path: Path) -> None:
    """Raises ModelError for a pipe or a device, on which reading would wait for ever, and for an impossible name."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise ModelError(f"'{path}' cannot be read: {_why(error)}.") from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ModelError(f"'{path}' is a pipe or a device: put the file of the model there.")


def _read(path: Path) -> bytes:
    _check_is_file(path)
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise ModelError(f"'{path}' cannot be read: {_why(error)}.") from error
    if content.startswith(LFS_POINTER):
        raise _is_pointer(path)
    if not content and path.suffix != ".jinja":
        raise ModelError(f"'{path}' is empty: copy or write it again.")
    return content


def _text(path: Path, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ModelError(f"'{path}' is not UTF-8 text (byte {error.start + 1}): copy or write it again.") from error


def _is_pointer(path: Path) -> ModelError:
    return ModelError(f"'{path}' is a pointer of Git LFS, not the file itself: run `git lfs pull` in its repository.")


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())


def names_of(tensors: Iterable[str]) -> str:
    """Up to three names, and how many more there are."""
    names = sorted(tensors)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"'{name}'" for name in names[:3]) + more
