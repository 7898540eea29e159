"""Runs of the reward command that are killed for real and resumed, each in a process forked from this one.

`python killed_runs.py FOLDER`: FOLDER/<name>/ is the output of the run `name`, FOLDER/<name>.log what it said, and
FOLDER/<name>.endings how each of its processes ended (an exit code, or minus the signal). Forking saves the imports.
"""

import gc
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from deep_rlhf.algorithms.supervised import resumable
from deep_rlhf.cli.main import run
from deep_rlhf.models.reward import RewardModel

# 12 updates in two epochs; the loss is summed over three of them, so a checkpoint falls between two logs.
COMMAND = [
    *("--model_name_or_path=gpt2", "--dataset_name=pairs", "--report_to=none", "--disable_tqdm=True", "--use_cpu=True"),
    *("--per_device_train_batch_size=4", "--gradient_accumulation_steps=2", "--num_train_epochs=2"),
    *("--logging_steps=3", "--eval_steps=2", "--learning_rate=1e-2", "--ensemble_size=2", "--disable_dropout=False"),
]
STEPS = ["--save_strategy=steps", "--save_steps=2"]
BEST: list[str] = []
EPOCH = ["--logging_strategy=epoch", "--eval_strategy=epoch", "--load_best_model_at_end=False", *STEPS]
SHORT = ["--max_steps=4", *STEPS]  # ends within an epoch
LORA = ["--use_peft=True", "--lora_r=2", *STEPS]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_update(number: int, act: Callable[[], Any]) -> None:
    """`act` just before the weights change for the `number`-th time."""
    updates = iter(range(1, 1000))
    register_optimizer_step_pre_hook(lambda *_: act() if next(updates) == number else None)


def half_written(save: int) -> None:
    """The process dies when half of the `save`-th checkpoint's optimizer.pt is on the disk."""
    original, calls = torch.save, iter(range(1, 1000))

    def torn(content: Any, path: Any, *args: Any, **options: Any) -> None:
        original(content, path, *args, **options)
        if Path(path).name == "optimizer.pt" and next(calls) == save:
            os.truncate(path, Path(path).stat().st_size // 2)
            kill()

    torch.save = torn


def before_rename(save: int) -> None:
    """… when all but the last renaming of the `save`-th checkpoint is done."""
    original, calls = os.replace, iter(range(1, 1000))

    def stopped(source: Any, target: Any) -> None:
        if Path(target).name == resumable.MANIFEST and next(calls) == save:
            kill()
        original(source, target)

    os.replace = stopped


def while_rotating(removal: int) -> None:
    """… when one file of the `removal`-th folder to go is gone."""
    original, calls = shutil.rmtree, iter(range(1, 1000))

    def half(path: Any, *args: Any, **options: Any) -> None:
        if Path(path, "trainer_state.json").exists() and next(calls) == removal:
            Path(path, "trainer_state.json").unlink()
            kill()
        original(path, *args, **options)

    shutil.rmtree = half


def after_every_update() -> None:
    """Checkpoints as if ten minutes had passed each time."""
    resumable.SECONDS_BETWEEN = -1.0


def limited(update: int, size: int) -> None:
    """From the `update`-th update on the kernel refuses to write beyond `size` bytes of a file."""
    at_update(update, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))


def model_is_refused() -> None:
    """The kernel refuses the final model, beyond 100,000 bytes."""
    original = RewardModel.save

    def save(model: RewardModel, folder: str | Path) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        original(model, folder)

    RewardModel.save = save


def process(log: Path, flags: list[str], prepare: Callable[[], Any] | None = None) -> int:
    """The reward command in a process of its own; how it ended."""
    child = os.fork()
    if child == 0:
        code = 0
        try:
            descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            if prepare:
                prepare()
            run("reward", flags)
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            code = 99
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def tear(folder: Path) -> None:
    """Cuts the weights of the newest checkpoint."""
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    os.truncate(newest / "model.safetensors", 1000)


# name: flags, what kills the run, and what happens before it is resumed
Run = tuple[list[str], Callable[[], Any] | None, Callable[[Path], Any] | None]
RUNS: dict[str, Run] = {
    "first update": (STEPS, lambda: at_update(1, kill), None),
    "update": (STEPS, lambda: at_update(6, kill), None),
    "file": (STEPS, lambda: half_written(5), None),
    "rename": (STEPS, lambda: before_rename(3), None),
    "rotation": (STEPS, lambda: while_rotating(2), None),
    "torn": (STEPS, lambda: at_update(10, kill), tear),
    "weights full": (STEPS, lambda: limited(8, 100_000), None),
    "optimizer full": (STEPS, lambda: limited(8, 400_000), None),
    "model full": (SHORT, model_is_refused, None),
    "interrupt": (STEPS, lambda: at_update(5, lambda: os.kill(os.getpid(), signal.SIGINT)), None),
    "best": (BEST, lambda: (after_every_update(), at_update(12, kill)), None),
    "epoch": (EPOCH, lambda: at_update(7, kill), None),
    "ending": (SHORT, lambda: setattr(RewardModel, "save", lambda *_: kill()), None),
    "lora": (LORA, lambda: at_update(6, kill), None),
}


WHOLE: dict[str, Run] = {
    name: (flags, None, None) for name, flags in (("whole epoch", EPOCH), ("whole ending", SHORT), ("whole lora", LORA))
}


def take(name: str, run: Run) -> None:
    """The run `name`: killed and resumed, or whole if nothing kills it."""
    flags, prepare, before_resume = run
    command, log = [*COMMAND, *flags, f"--output_dir={name}"], Path(f"{name}.log")
    endings = [process(log, command, prepare)]
    if prepare:
        shutil.copytree(name, f"{name}, stopped")
        if before_resume:
            before_resume(Path(name))
        endings.append(process(log, [*command, "--resume"]))
    Path(f"{name}.endings").write_text(json.dumps(endings))


def main(folder: Path) -> None:
    """Every run, two at a time."""
    torch.set_num_threads(1)
    os.chdir(folder)
    run("reward", [*COMMAND, *STEPS, "--output_dir=whole"])  # here, so that what it loads and compiles is inherited
    gc.freeze()
    for number, (name, run_) in enumerate((WHOLE | RUNS).items()):
        if number >= 2:
            os.wait()
        if os.fork() == 0:
            take(name, run_)
            os._exit(0)
    os.wait(), os.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
