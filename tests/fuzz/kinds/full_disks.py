"""A disk that is full: no file can grow beyond some size, from the beginning or from an update on."""

import resource
import signal
from pathlib import Path

from fuzz.case import Case, Workshop
from fuzz.kinds.flags import base_command
from fuzz.world import DPO, LOOP, ONLINE, OUT, REWARD, SAVED


def make(shop: Workshop) -> Case:
    """A right command that cannot write all that it must."""
    rng = shop.random
    shop.take(
        "policy", "encoder", "pairs.jsonl", "prompts.jsonl", "rewards.py", "votes.jsonl", "labels.db", "labels.jsonl"
    )
    name = rng.choices(
        ("reward", "dpo", "ppo", "rloo", "trpo", "loop", "export", "import", "again", "continue"),
        (4, 3, 4, 1, 1, 2, 2, 2, 2, 3),
    )[0]
    size = rng.choice(
        (0, 1, 100, 1000, 4096, 5000, 8192, 20_000, 40_000, 65_536, 100_000, 130_000, 200_000, 300_000, 500_000)
    )
    writes = ["out"]
    if name == "export":
        argv = ["store", "export", "labels.db", rng.choice(("x.jsonl", "x.parquet", "x", "x.jsonl.gz", "labels.jsonl"))]
        writes = ["x.jsonl", "x.parquet", "x", "x.jsonl.gz"]
    elif name == "import":
        argv = ["store", "import", rng.choice(("labels.db", "new.db")), "labels.jsonl"]
        writes = ["labels.db", "new.db"]
    elif name in ("again", "continue"):
        run, command = rng.choice(
            (
                ("ppo_part", [*ONLINE["ppo"], "--save_freq=1", "--steps=16"]),
                ("reward_part", [*REWARD, *SAVED, "--max_steps=4"]),
            )
        )
        shop.take(run)
        argv, writes = [*command, f"--output_dir={run}", *(["--resume"] if name == "continue" else [])], [run]
    else:
        saved = {"reward": SAVED, "dpo": SAVED, "ppo": ["--save_freq=1"]}.get(name, [])
        argv = [
            *{"reward": REWARD, "dpo": DPO, "loop": LOOP}.get(name, base_command(name)),
            *rng.choice(([], saved)),
            OUT,
        ]

    update = rng.choice((0, 0, 1, 2, 3))

    def prepare() -> None:
        def limit(*_: object) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if update == 0:
            limit()
        else:
            from torch.optim.optimizer import register_optimizer_step_pre_hook

            updates = iter(range(1, 1000))
            register_optimizer_step_pre_hook(lambda *_: limit() if next(updates) == update else None)

    when = f"from update {update} on" if update else "from the beginning"
    return Case(
        argv,
        f"{name} with files of at most {size} bytes {when}",
        writes,
        replaces=["labels.jsonl"],
        prepare=prepare,
        check=lambda folder: usable(folder, argv),
    )


def usable(folder: Path, argv: list[str]) -> str | None:
    """What an import or export wrote is complete."""
    from fuzz.kinds.data_files import exported_again

    return exported_again(folder) if argv[1:3] == ["import", "new.db"] else None
