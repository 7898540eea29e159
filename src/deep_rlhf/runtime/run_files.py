"""The names of the files and folders that runs write, and what happens to those of an earlier run."""

import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path

from deep_rlhf.errors import CheckpointError

logger = logging.getLogger(__name__)

EARLIER = "earlier_run"  # folder for the results of the run that the folder held before
SETTINGS = "config.yaml"  # every command writes it
LOGS = ("metrics.jsonl", "samples.jsonl", "bad_batches")
RESULTS = ("model", "best", "summary.json", "report.html")
CARD = "reward_model.json"  # a saved reward model lies in the folder itself, with these files
MODEL_FILES = (
    *(CARD, "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja"),
)
FILES = (
    *(SETTINGS, "metrics.jsonl", "samples.jsonl", "summary.json", "report.html", "loop.log", "model.safetensors"),
    *(name for name in MODEL_FILES if "*" not in name),
)
FOLDERS = ("model", "best", "bad_batches", "checkpoints", "rewards", "versions", "reward_model")


def check_names(folder: Path) -> None:
    """Raises CheckpointError if a folder has the name of a file that a run writes, or the other way round.

    Also for a pipe or a device, on which writing would wait for ever, or lose what is written.
    """
    for path in folder.iterdir():
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"'{path}' is a pipe or a device: remove it, or give another output_dir.")
    for name in FILES:
        if (folder / name).is_dir():
            raise CheckpointError(
                f"'{folder / name}' is a folder, but the run writes a file of this name: rename it, or give another"
                " output_dir."
            )
    for name in FOLDERS:
        if (folder / name).exists() and not (folder / name).is_dir():
            raise CheckpointError(
                f"'{folder / name}' is a file, but the run writes a folder of this name: rename it, or give another"
                " output_dir."
            )


def set_aside_earlier_run(folder: Path, inputs: Iterable[str] = (), also: Iterable[str] = ()) -> None:
    """Moves the results of an earlier run in `folder` to `<folder>/earlier_run`, so that none looks like the new run's.

    Only files that our runs write are moved, and only from the folder of a run; what was set aside
    before is replaced. A run without a model or a summary leaves nothing to keep: its log is removed. inputs: paths
    that the new run reads, which stay where they are. also: further names that such a run writes.
    """
    if not _is_run(folder):
        return
    used = [path.resolve() for path in map(Path, inputs) if path.exists()]
    names = [*RESULTS, *also]
    if (folder / CARD).is_file() and folder.resolve() not in used:
        names += [path.name for pattern in MODEL_FILES for path in sorted(folder.glob(pattern))]

    def ours(names: Iterable[str]) -> list[Path]:
        found = [path for name in names if (path := folder / name).exists()]
        return [path for path in found if not any(each.is_relative_to(path.resolve()) for each in used)]

    if not (results := ours(names)):
        for path in ours(LOGS):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return
    moved = [*results, *ours([*LOGS, SETTINGS])]  # the settings last: they show that all was moved
    target = _free_target(folder, [path.name for path in moved])
    target.mkdir(exist_ok=True)
    for path in moved:
        os.rename(path, target / path.name)
    logger.info("The results of the earlier run in '%s' are now in '%s'.", folder, target)


def _is_run(folder: Path) -> bool:
    """Whether a run of ours was here: a settings file alone may be the user's own."""
    if not (folder / SETTINGS).is_file():
        return False
    if any((folder / name).exists() for name in ("metrics.jsonl", "summary.json", "checkpoints", CARD)):
        return True
    names = {line.partition(b":")[0] for line in (folder / SETTINGS).read_bytes().splitlines()}
    return {b"output_dir", b"resume"} <= names  # a run that failed before its first update


def set_aside_damaged_checkpoints(folder: Path) -> None:
    """Renames a folder of checkpoints of which none is whole, so that what can be read of them is not lost."""
    names = (f"{folder.name}_damaged{f'-{number}' if number > 1 else ''}" for number in count(1))
    target = next(target for name in names if not (target := folder.with_name(name)).exists())
    os.rename(folder, target)
    logger.warning("The damaged checkpoints are now in '%s'.", target)


def _free_target(folder: Path, names: Sequence[str]) -> Path:
    """The folder to which files of these names are moved; an earlier run that was moved there completely is removed."""
    complete = folder / EARLIER
    if (complete / SETTINGS).is_file():
        removed = folder / f".{EARLIER}.tmp"
        shutil.rmtree(removed, ignore_errors=True)
        os.rename(complete, removed)
        shutil.rmtree(removed, ignore_errors=True)
    candidates = (folder / (EARLIER if number == 1 else f"{EARLIER}-{number}") for number in count(1))
    return next(
        target
        for target in candidates
        if not target.exists() or (target.is_dir() and not any((target / name).exists() for name in names))
    )
