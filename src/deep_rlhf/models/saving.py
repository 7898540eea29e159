"""Saves a model with its tokenizer: the one way in which weights reach a folder that other programs open."""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deep_rlhf.errors import ModelError, ResourceError
from deep_rlhf.models.validation import first_sentence
from deep_rlhf.runtime.finite import check_finite

# What tokenizers and torch write into exceptions of no special type when a file cannot be written.
_DISK = re.compile(r"os error \d+|no space left|file too large|quota|PytorchStreamWriter|unexpected pos", re.IGNORECASE)
_OF_MODEL_FILES = ("model*.safetensors", "model*.safetensors.index.json")


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, what: str = "policy"
) -> None:
    """Writes a plain transformers folder, reads its tensors again, one at a time, and compares them.

    Raises NotFiniteError for a weight that is NaN or infinite, ResourceError if the folder cannot be written, and
    ModelError if a saved weight differs; an earlier model in `folder` then stays as it was.
    """
    check_finite(model, f"The model is not saved in '{folder}'")

    def write(temporary: Path) -> None:
        model.save_pretrained(temporary, safe_serialization=True)
        save_tokenizer(tokenizer, temporary)
        check_saved(model, temporary)

    write_folder(what, folder, write)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a tokenizer without the truncation and padding of its last call, which fast ones keep and would save."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    tokenizer.save_pretrained(folder)


def check_saved(model: PreTrainedModel, folder: Path) -> None:
    """Raises ModelError unless the files in `folder` hold every weight of `model`, to the last bit."""
    weights = model.state_dict()
    saved: set[tuple[Any, ...]] = set()
    are_renamed = False
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                if name not in weights:
                    are_renamed = True
                    continue
                _check_equal(tensors.get_tensor(name), weights[name], name)
                saved.add(_place(weights[name]))
    missing = [name for name, weight in weights.items() if _place(weight) not in saved]
    if missing and not are_renamed:
        raise ModelError(f"The saved {type(model).__name__} lacks '{missing[0]}': save it again.")
    if missing:  # transformers saves some architectures, such as mixtures of experts, under other names
        reopened = type(model).from_pretrained(folder, dtype=model.dtype).state_dict()
        for name in missing:
            _check_equal(reopened[name], weights[name], name)


@contextmanager
def saving(what: str, folder: Path) -> Iterator[None]:
    """Raises ResourceError where the block cannot write a file below `folder`, whichever library writes it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise _not_written(what, folder, error) from error
    except Exception as error:  # tokenizers raise an Exception, torch a RuntimeError
        if not _DISK.search(str(error)):
            raise
        raise _not_written(what, folder, error) from error


def write_folder(what: str, folder: str | Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a temporary folder, and moves its files into `folder` when all are complete.

    Weights of an earlier model in `folder` are removed, other files stay. Raises ResourceError if a file cannot be
    written; `folder` is then as before.
    """
    folder = Path(folder)
    temporary = folder / ".saving"
    with saving(what, folder):
        is_new = not folder.exists()
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            with saving(what, temporary):
                write(temporary)
            written = {path.name for path in temporary.iterdir()}
            for path in [path for pattern in _OF_MODEL_FILES for path in folder.glob(pattern)]:
                if path.name not in written:
                    path.unlink()
            for name in sorted(written):
                if (folder / name).is_dir():  # peft writes one for each further set of adapters
                    shutil.rmtree(folder / name)
                (temporary / name).replace(folder / name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if is_new and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _check_equal(saved: Tensor, weight: Tensor, name: str) -> None:
    if not torch.equal(saved, weight.cpu()):
        raise ModelError(f"The weights that were saved differ from those in memory, in '{name}': save them again.")


def _place(weight: Tensor) -> tuple[Any, ...]:
    """The same for two names of one tensor."""
    return weight.device, weight.data_ptr(), weight.shape, weight.stride()


def _not_written(what: str, folder: Path, error: Exception) -> ResourceError:
    named = getattr(error, "filename", None)
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    last = named or (max(files, key=lambda path: path.stat().st_mtime_ns) if files else folder)
    target = Path(last).name if ".saving" in Path(last).parts else None
    folder = Path(str(folder).removesuffix("/.saving"))
    reason = getattr(error, "strerror", None) or first_sentence(error).rstrip(".")
    return ResourceError(
        f"The {what} could not be written to '{folder / target if target else last}' ({reason}): free disk space, or"
        " give another folder."
    )
