"""Stop signals: caught, held and raised, and left alone where they are ignored."""

import signal
from contextlib import AbstractContextManager
from typing import Any

import pytest

from srwm_rl.scripts.signals import (
    STOP_SIGNALS,
    StopSignal,
    catch_signals,
    hold_signals,
    raise_on_signals,
    restore_handlers,
)

pytestmark = pytest.mark.usefixtures("_stop_signals")
BLOCKS = [catch_signals, hold_signals, raise_on_signals, restore_handlers]


def test_caught_signals_are_listed_and_passed_on() -> None:
    handlers, passed = [signal.getsignal(number) for number in STOP_SIGNALS], []
    with catch_signals(passed.append) as caught:
        for number in STOP_SIGNALS:
            signal.raise_signal(number)
            assert caught[-1] == number
    assert caught == passed == STOP_SIGNALS
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers


@pytest.mark.parametrize("block", BLOCKS)
def test_an_ignored_signal_stays_ignored(block: "type[AbstractContextManager[Any]]") -> None:
    # Under nohup, a closed terminal would otherwise end the run.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with block() as given:
        signal.raise_signal(signal.SIGHUP)
    assert not given or signal.SIGHUP not in given
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize("block", BLOCKS)
def test_an_error_restores_the_handlers(block: "type[AbstractContextManager[Any]]") -> None:
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(ZeroDivisionError), block():
        _ = 1 / 0
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers


def test_a_held_signal_stops_after_the_block() -> None:
    handler, done = signal.getsignal(signal.SIGTERM), []

    @raise_on_signals()
    def work() -> None:
        with hold_signals():
            signal.raise_signal(signal.SIGTERM)
            done.append("inside")
        done.append("after")

    with pytest.raises(StopSignal, match="SIGTERM"):
        work()
    assert done == ["inside"]
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_signal_that_comes_twice_is_ignored_until_the_handlers_are_restored() -> None:
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    with restore_handlers():
        with pytest.raises(StopSignal), raise_on_signals([signal.SIGTERM, signal.SIGHUP]):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # would end this process
        signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGINT) is handlers[signal.SIGINT]
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == handlers


@pytest.mark.filterwarnings("error")  # pytest's form of an "Exception ignored in"
def test_two_signals_at_once_raise_once_and_print_nothing() -> None:
    @raise_on_signals([signal.SIGTERM])
    def work() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT, signal.SIGTERM])

    with restore_handlers(), pytest.raises(StopSignal, match="SIGINT"):
        work()


def test_an_interrupt_while_handlers_are_restored_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    replace = signal.signal

    def interrupted(number: int, handler: Any) -> None:
        replace(number, handler)
        if handler is signal.default_int_handler:
            signal.raise_signal(signal.SIGINT)

    with restore_handlers():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        before = [signal.getsignal(number) for number in STOP_SIGNALS]
        with pytest.raises(KeyboardInterrupt), catch_signals():
            monkeypatch.setattr(signal, "signal", interrupted)
        monkeypatch.undo()
        assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
