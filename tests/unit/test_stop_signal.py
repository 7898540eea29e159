"""The red button and Ctrl-C: the loop ends within a second, in the middle of writing too, never within a step."""

import signal
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
from torch import nn

from deep_rlhf.errors import CheckpointError
from deep_rlhf.feedback.loop.checkpoints import exclusive_run
from deep_rlhf.feedback.loop.stop_signal import StopRequested, StopSignal
from deep_rlhf.feedback.state import HEARTBEAT, STOP, StopRequest
from deep_rlhf.feedback.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store.db") as opened:
        yield opened


def test_the_red_button_ends_a_wait(store: Store) -> None:
    with StopSignal(store, nn.Identity()) as stop_signal:
        stop_signal.check()
        threading.Timer(0.1, STOP.write, (store, StopRequest(by="ann"))).start()
        with pytest.raises(StopRequested) as request:
            stop_signal.wait(60)
        assert request.value.ending == "stopped"
        with pytest.raises(StopRequested):
            stop_signal.check()


def test_a_stop_interrupts_sampling_but_never_a_training_step(store: Store) -> None:
    trunk = nn.Linear(2, 2)
    with StopSignal(store, trunk) as stop_signal:
        stop_signal.stop()
        trunk(torch.zeros(1, 2)).sum().backward()  # learning goes on
        with torch.no_grad(), pytest.raises(StopRequested):
            trunk(torch.zeros(1, 2))
        other = threading.Thread(target=torch.no_grad()(trunk), args=(torch.zeros(1, 2),))
        other.start()
        other.join()
    with torch.no_grad():
        trunk(torch.zeros(1, 2))  # afterwards the policy can write again


def test_the_first_ctrl_c_requests_a_stop_and_the_second_interrupts(store: Store) -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopSignal(store, nn.Identity()) as stop_signal:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(StopRequested) as request:
            stop_signal.check()
        assert request.value.ending == "interrupted"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_scheduler_stops_the_loop_as_ctrl_c_does(store: Store) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal(store, nn.Identity()) as stop_signal:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(StopRequested) as request:
            stop_signal.check()
        assert (request.value.ending, stop_signal.signal_number) == ("interrupted", signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is before
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_heartbeat_is_written_to_the_store(store: Store) -> None:
    with StopSignal(store, nn.Identity()):
        for _ in range(200):
            if HEARTBEAT.read(store):
                break
            threading.Event().wait(0.05)
    assert HEARTBEAT.read(store)


def test_two_loops_do_not_run_in_one_folder_or_on_one_store(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    with Store(tmp_path / "labels.db") as store, Store(tmp_path / "other.db") as other:
        with exclusive_run(here, store):
            with pytest.raises(CheckpointError, match=r"Another loop .*here'"), exclusive_run(here, other):
                pass
            HEARTBEAT.write(store, datetime.now(UTC))
            with pytest.raises(CheckpointError, match=r"store.*labels\.db'.* another loop.*here\b"):
                exclusive_run(there, store).__enter__()
            HEARTBEAT.write(store, datetime.now(UTC) - timedelta(minutes=1))
            with exclusive_run(there, store):  # the other one was killed long ago
                pass
        HEARTBEAT.write(store, datetime.now(UTC))
        with exclusive_run(there, store):  # the other one has ended
            pass
