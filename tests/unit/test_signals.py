"""Signals that end a run: the first is deferred, the second is not, and what was ignored stays ignored."""

import signal
from collections.abc import Iterator

import pytest
from facts import assert_names

from deep_rlhf.cli import main as cli
from deep_rlhf.runtime.signals import SIGNALS, Stopped, first_signal_deferred, signals_raise_stopped


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Defaults before each test, and what was there before it afterwards."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted_and_the_second_does_what_it_did_before(
    number: int, caplog: pytest.LogCaptureFixture
) -> None:
    noted: list[int] = []
    before = {each: signal.getsignal(each) for each in SIGNALS}
    with first_signal_deferred(noted.append):
        assert all(signal.getsignal(each) is not before[each] for each in SIGNALS)
        signal.raise_signal(number)
        assert {each: signal.getsignal(each) for each in SIGNALS} == before
    assert noted == [number]
    assert_names(caplog.messages[0], "after this update", "at once")
    assert {each: signal.getsignal(each) for each in SIGNALS} == before


def test_ignored_signals_and_the_callers_handlers_stay() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    caught: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))
    noted: list[int] = []
    with first_signal_deferred(noted.append):
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)
    assert (noted, caught) == ([], [signal.SIGTERM])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_what_waits(number: int) -> None:
    with pytest.raises(Stopped) as stop, signals_raise_stopped():
        signal.raise_signal(number)
    assert stop.value.number == number
    assert signal.getsignal(number) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("stop", "code"), [(KeyboardInterrupt(), 130), (Stopped(signal.SIGTERM), 143), (Stopped(signal.SIGHUP), 129)]
)
def test_the_exit_code_is_that_of_the_signal(
    stop: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def act(name: str) -> None:
        raise stop

    monkeypatch.setattr(cli, "import_module", act)
    with pytest.raises(SystemExit) as ended:
        cli.run("store", [])
    assert ended.value.code == code
    assert capsys.readouterr().err == "stopped\n"
