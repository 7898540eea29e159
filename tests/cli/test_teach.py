"""`deep-rlhf teach` as a user starts it: page and trainer side by side, until Ctrl-C."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from transformers import AutoModelForCausalLM

from deep_rlhf.cli import teach
from deep_rlhf.cli.teach import TeachConfig
from deep_rlhf.errors import UserError
from deep_rlhf.feedback.state import STATUS, Status
from deep_rlhf.feedback.store import Store

pytestmark = pytest.mark.processes

SECONDS = 120  # for anything that is waited for
SMALL = [
    *("--labeler=simulated", "--taste=short", "--pace=0.02", "--initial_labels=8", "--refit_after=8", "--seed=1"),
    *("--batch_size=8", "--mini_batch_size=8", "--max_new_tokens=6", "--held_out_members=0", "--members=2"),
    *("--fixed_prompts=2", "--threads=1", "--save_every=1"),
]


@pytest.fixture(scope="module")
def workplace(make_model: Callable[..., Any], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a policy, in which `teach` ran until Ctrl-C; what it said is in teach.out."""
    folder = tmp_path_factory.mktemp("teach")
    make_model("gpt2", n_positions=256).save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    process = started(folder)
    try:
        address = waited(lambda: re.search(r"http://127\.0\.0\.1:\d+", said(folder)), process, folder)[0]
        with urlopen(f"{address}/health", timeout=SECONDS) as answer:
            assert answer.read() == b"ok"
        with Store(folder / "run" / "labels.db") as store:
            waited(lambda: len(store.metrics()) >= 2, process, folder)
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 130
    finally:
        process.kill()
    return folder


def started(folder: Path, *flags: str, **options: Any) -> subprocess.Popen[bytes]:
    """The real command in the background."""
    command = ["teach", "--port=0", "--model=policy", "--output_dir=run", *SMALL, *flags]
    with (folder / "teach.out").open("wb") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "deep_rlhf.cli.main", *command], cwd=folder, stdout=out, stderr=out, **options
        )


def said(folder: Path) -> str:
    return (folder / "teach.out").read_text()


def waited(condition: Callable[[], Any], process: subprocess.Popen[bytes], folder: Path) -> Any:
    """What the condition comes to, once it is true; the process must live as long."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if found := condition():
            return found
        assert process.poll() is None, f"it ended too early: {said(folder)}"
        time.sleep(0.05)
    raise AssertionError(f"it takes too long: {said(folder)}")


def test_teach_says_what_to_do_and_how_to_continue(workplace: Path) -> None:
    words = " ".join(said(workplace).split())
    assert "compare responses" in words
    assert f"deep-rlhf teach --config={workplace / 'run' / 'config.yaml'}" in words
    assert f"The policy: {workplace / 'run' / 'model'}" in words
    assert words.endswith("stopped")
    assert "Traceback" not in words


def test_ctrl_c_saves_the_policy_and_ends_the_trainer(workplace: Path) -> None:
    AutoModelForCausalLM.from_pretrained(workplace / "run" / "model")
    with Store(workplace / "run" / "labels.db") as store:
        assert (STATUS.read(store) or Status()).state == "stopped"
        assert len(store.versions("reward")) >= 1
        assert sorted(store.samples())[0] == 0
    assert "Traceback" not in (workplace / "run" / "loop.log").read_text()


def test_the_trainer_ends_saved_when_teach_is_killed_even_where_ctrl_c_is_ignored(
    workplace: Path, tmp_path: Path
) -> None:
    (tmp_path / "policy").symlink_to(workplace / "policy")

    def ignore_ctrl_c() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for a program in the background

    process = started(tmp_path, "--labeler=web", preexec_fn=ignore_ctrl_c)
    try:
        waited(lambda: "waiting for labels" in said(tmp_path), process, tmp_path)
    finally:
        process.kill()
    process.wait(SECONDS)
    with Store(tmp_path / "run" / "labels.db") as store:
        deadline = time.monotonic() + SECONDS
        while (STATUS.read(store) or Status()).state != "stopped" or not (tmp_path / "run" / "model").is_dir():
            assert time.monotonic() < deadline, "the trainer goes on alone"
            time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_scheduler_stops_teach_as_ctrl_c_does(workplace: Path, tmp_path: Path, number: int, code: int) -> None:
    (tmp_path / "policy").symlink_to(workplace / "policy")
    default = partial(signal.signal, number, signal.SIG_DFL)  # the tests may have been started by nohup
    process = started(tmp_path, "--labeler=web", preexec_fn=default)
    try:
        waited(lambda: "waiting for labels" in said(tmp_path), process, tmp_path)
        process.send_signal(number)
        assert process.wait(SECONDS) == code
    finally:
        process.kill()
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert "Traceback" not in said(tmp_path) + (tmp_path / "run" / "loop.log").read_text()


def test_the_error_message_of_a_failed_trainer_is_shown(tmp_path: Path) -> None:
    words = "import sys; sys.stderr.write('some news\\nerror: There is no folder.\\n\\n'); sys.exit(2)"
    with (tmp_path / teach.LOG).open("wb") as log:
        trainer = subprocess.Popen([sys.executable, "-c", words], stderr=log)
    with pytest.raises(UserError, match=r"trainer.*There is no folder\..*loop\.log"):
        teach._wait(trainer, tmp_path)


@pytest.mark.parametrize(
    ("number", "told"),
    [(signal.SIGKILL, r"signal 9 \(out of memory\?\)\. The"), (signal.SIGTERM, r"signal 15\. The")],
)
def test_a_killed_trainer_is_reported_with_its_signal(number: int, told: str, tmp_path: Path) -> None:
    (tmp_path / teach.LOG).write_text("a warning of long ago\n")
    trainer = subprocess.Popen([sys.executable, "-c", f"import os; os.kill(os.getpid(), {int(number)})"])
    with pytest.raises(UserError, match=rf"The trainer was killed by {told} same command .*loop\.log") as error:
        teach._wait(trainer, tmp_path)
    assert "long ago" not in str(error.value)


def test_the_command_that_goes_on_has_no_more_flags_than_it_needs_and_no_password() -> None:
    assert teach._command(TeachConfig(), Path("outputs/teach")) == "deep-rlhf teach"
    goes_on = "deep-rlhf teach --config=run/config.yaml"
    assert teach._command(TeachConfig(output_dir="run", taste="short"), Path("run")) == goes_on
    assert teach._command(TeachConfig(store="y.db"), Path("run")) == f"{goes_on} --store=y.db"
    address = "postgresql+psycopg://ann:secret@host/labels"
    assert teach._command(TeachConfig(store=address), Path("run")) == f"{goes_on} --store=…"
