"""Runs of the reward and DPO commands, and what stops each of them: `stopped_runs` runs them."""

import os
import resource
import shutil
from pathlib import Path
from typing import Any

from stopped_runs import Run, at_update, hang_up, interrupt, kill, limit_files

from deep_rlhf.algorithms.supervised import checkpoints
from deep_rlhf.models.reward import RewardModel
from deep_rlhf.runtime import checkpoint

# 12 updates in two epochs; the loss is summed over three of them, so a checkpoint falls between two logs.
COMMAND = [
    "reward",
    *("--model_name_or_path=gpt2", "--dataset_name=pairs", "--report_to=none", "--disable_tqdm=True", "--use_cpu=True"),
    *("--per_device_train_batch_size=4", "--gradient_accumulation_steps=2", "--num_train_epochs=2"),
    *("--logging_steps=3", "--eval_steps=2", "--learning_rate=1e-2", "--ensemble_size=2", "--disable_dropout=False"),
]
STEPS = ["--save_strategy=steps", "--save_steps=2"]
EPOCH = ["--logging_strategy=epoch", "--eval_strategy=epoch", "--load_best_model_at_end=False", *STEPS]
SHORT = ["--max_steps=4", *STEPS]  # ends within an epoch
LORA = ["--use_peft=True", "--lora_r=2", *STEPS]
DPO = [  # with the dropout of the model's configuration
    "dpo",
    *("--model_name_or_path=gpt2", "--dataset_name=pairs", "--report_to=none", "--disable_tqdm=True", "--use_cpu=True"),
    *(
        "--per_device_train_batch_size=4",
        "--gradient_accumulation_steps=2",
        "--num_train_epochs=2",
        "--logging_steps=3",
    ),
    *("--eval_steps=2", "--learning_rate=1e-3", "--load_best_model_at_end=True", *STEPS),
]


def half_written(save: int) -> None:
    """The process dies when half of the tensors of the `save`-th checkpoint are on the disk."""
    original, calls = checkpoint.save_file, iter(range(1, 1000))

    def torn(tensors: Any, path: Path) -> None:
        original(tensors, path)
        if next(calls) == save:
            os.truncate(path, path.stat().st_size // 2)
            kill()

    checkpoint.save_file = torn


def before_rename(save: int) -> None:
    """… when the `save`-th checkpoint is complete, but does not yet have its name."""
    original, calls = os.rename, iter(range(1, 1000))

    def stopped(source: Any, target: Any) -> None:
        if Path(target).name.startswith("step-") and next(calls) == save:
            kill()
        original(source, target)

    os.rename = stopped


def while_rotating(removal: int) -> None:
    """… when one file of the `removal`-th checkpoint to be removed is gone."""
    original, calls = shutil.rmtree, iter(range(1, 1000))

    def half(path: Any, *args: Any, **options: Any) -> None:
        if Path(path, checkpoint.TREE).exists() and next(calls) == removal:
            Path(path, checkpoint.TREE).unlink()
            kill()
        original(path, *args, **options)

    shutil.rmtree = half


def after_every_update() -> None:
    """Checkpoints as if ten minutes had passed each time."""
    checkpoints.SECONDS_BETWEEN = -1.0


def model_is_refused() -> None:
    """The kernel refuses the final model, beyond 100,000 bytes."""
    original = RewardModel.save

    def save(model: RewardModel, folder: str | Path) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        original(model, folder)

    RewardModel.save = save


def tear(folder: Path) -> None:
    """Cuts the tensors of the newest checkpoint."""
    newest = max((folder / "checkpoints").glob("step-*"), key=lambda path: int(path.name.split("-")[1]))
    os.truncate(newest / checkpoint.TENSORS, 1000)


RUNS = {
    "first update": Run([*COMMAND, *STEPS], lambda: at_update(1)),
    "update": Run([*COMMAND, *STEPS], lambda: at_update(6)),
    "file": Run([*COMMAND, *STEPS], lambda: half_written(5)),
    "rename": Run([*COMMAND, *STEPS], lambda: before_rename(3)),
    "rotation": Run([*COMMAND, *STEPS], lambda: while_rotating(2)),
    "torn": Run([*COMMAND, *STEPS], lambda: at_update(10), before_resume=tear),
    "weights full": Run([*COMMAND, *STEPS], lambda: limit_files(8, 100_000), ending=2),
    "optimizer full": Run([*COMMAND, *STEPS], lambda: limit_files(8, 400_000), ending=2),
    "model full": Run([*COMMAND, *SHORT], model_is_refused, ending=2),
    "interrupt": Run([*COMMAND, *STEPS], lambda: at_update(5, interrupt), ending=130),
    "best": Run(COMMAND, lambda: (after_every_update(), at_update(12))),
    "epoch": Run([*COMMAND, *EPOCH], lambda: at_update(7)),
    "ending": Run([*COMMAND, *SHORT], lambda: setattr(RewardModel, "save", lambda *_: kill())),
    "lora": Run([*COMMAND, *LORA], lambda: at_update(6)),
    "dpo": Run(DPO, lambda: at_update(6)),
    "dpo hung up": Run(DPO, lambda: at_update(5, hang_up), ending=129),
}

WHOLE = {
    "whole": [*COMMAND, *STEPS],
    "whole epoch": [*COMMAND, *EPOCH],
    "whole ending": [*COMMAND, *SHORT],
    "whole lora": [*COMMAND, *LORA],
    "whole dpo": DPO,
}
