"""The surroundings of a command: output that is closed, full or ASCII, no home, folders that cannot be written."""

import os
from collections.abc import Callable

from fuzz.case import Case, Workshop
from fuzz.kinds.flags import base_command
from fuzz.world import FUNCTION, OUT, SAMPLING

COMMANDS = (
    "reward",
    "dpo",
    "ppo",
    "rloo",
    "grpo",
    "trpo",
    "reinforce_plus_plus",
    "loop",
    "teach",
    "label",
    "demo",
    "store",
    "plan",
)


def make(shop: Workshop) -> Case:
    """A right command in odd surroundings."""
    rng = shop.random
    shop.take("policy", "encoder", "pairs.jsonl", "prompts.jsonl", "rewards.py", "votes.jsonl", "labels.db")
    name = rng.choice(COMMANDS)
    argv = {
        **{served: [served, "--help"] for served in ("teach", "label", "demo")},
        "store": rng.choice((["store", "show", "labels.db"], ["store", "export", "labels.db", "x.jsonl"], ["store"])),
        "plan": ["plan", "ppo", *SAMPLING, FUNCTION],
    }.get(name) or [*base_command(name), OUT]
    if rng.random() < 0.25:
        argv = rng.choice(([name, "--help"], [], ["--version"], ["nothing"], ["-h"]))
    how = rng.choice([*SURROUNDINGS])
    case = Case(argv, f"{how}: {' '.join(argv[:3])}", ("out", "x.jsonl", "outputs"))
    SURROUNDINGS[how](shop, case)
    return case


def full_output(shop: Workshop, case: Case) -> None:
    case.stdout = "/dev/full"


def closed_output(shop: Workshop, case: Case) -> None:
    case.prepare = lambda: os.close(1)


def broken_pipe(shop: Workshop, case: Case) -> None:
    def prepare() -> None:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)

    case.prepare = prepare


def ascii_output(shop: Workshop, case: Case) -> None:
    case.ascii_output = True


def environment(**names: str) -> Callable[[Workshop, Case], None]:
    """Variables; each "-" is removed instead."""

    def change(shop: Workshop, case: Case) -> None:
        def prepare() -> None:
            for name, value in names.items():
                if value == "-":
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value.replace("@", str(shop.folder))

        case.prepare = prepare

    return change


def gone_folder(shop: Workshop, case: Case) -> None:
    """The working directory is removed under the command."""

    def prepare() -> None:
        (shop.folder / "gone").mkdir()
        os.chdir(shop.folder / "gone")
        (shop.folder / "gone").rmdir()

    case.prepare = prepare


def output_is(make: Callable[[Workshop], None]) -> Callable[[Workshop, Case], None]:
    """Something else in place of the output folder."""

    def change(shop: Workshop, case: Case) -> None:
        make(shop)
        case.writes = ("x.jsonl", "outputs", "elsewhere")

    return change


def few_files(shop: Workshop, case: Case) -> None:
    """No file can be opened any more after a few."""
    import resource

    limit = shop.random.choice((32, 64, 100))
    case.prepare = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


def little_memory(shop: Workshop, case: Case) -> None:
    case.env = {"OMP_NUM_THREADS": "1"}


SURROUNDINGS: dict[str, Callable[[Workshop, Case], None]] = {
    "a full output": full_output,
    "a closed output": closed_output,
    "a broken pipe": broken_pipe,
    "ASCII output": ascii_output,
    "no HOME": environment(HOME="-", XDG_CACHE_HOME="-"),
    "HOME does not exist": environment(HOME="/nonexistent", XDG_CACHE_HOME="-"),
    "HOME is a file": environment(HOME="@/rewards.py", XDG_CACHE_HOME="@/rewards.py"),
    "HOME is read only": environment(HOME="/proc", XDG_CACHE_HOME="/proc"),
    "TMPDIR does not exist": environment(TMPDIR="@/nothing", TEMP="-", TMP="-"),
    "an odd terminal": environment(TERM="nonsense", COLUMNS="3", LINES="0"),
    "COLUMNS is no number": environment(COLUMNS="abc"),
    "COLUMNS is negative": environment(COLUMNS="-5"),
    "forced colour": environment(FORCE_COLOR="1", COLUMNS="40"),
    "C locale": environment(LC_ALL="C", LANG="C", PYTHONIOENCODING="-"),
    "an unknown locale": environment(LC_ALL="xx_YY.UTF-8"),
    "odd process variables": environment(RANK="x"),
    "half of the process variables": environment(RANK="1"),
    "an odd number of threads": environment(OMP_NUM_THREADS="x"),
    "the store's variable is odd": environment(DEEP_RLHF_STORE="mysql://x"),
    "the working directory is gone": gone_folder,
    "the output is a file": output_is(lambda shop: (shop.folder / "out").write_text("mine") and None),
    "the output is a link to nowhere": output_is(lambda shop: (shop.folder / "out").symlink_to("elsewhere/x")),
    "the output is a loop of links": output_is(lambda shop: (shop.folder / "out").symlink_to("out")),
    "few open files": few_files,
}
