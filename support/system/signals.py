"""Being told to stop: Ctrl-C, SIGTERM and SIGHUP raise, but never in the middle of what must stay
whole."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


class Terminated(KeyboardInterrupt):
    """SIGTERM: from `kill`, a scheduler, a rented machine about to go; SIGHUP: from a terminal or
    an ssh connection that was closed."""


@contextlib.contextmanager
def handled_by(handler: Callable) -> Iterator[None]:
    """Inside, the signals call handler(number, frame). One that is ignored (nohup, a job begun
    with &) stays ignored; outside the main thread Python hands out no signals, and nothing is
    changed."""
    on_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if on_main else ()
    before = {number: signal.getsignal(number) for number in numbers}
    caught = {n: old for n, old in before.items() if old not in (signal.SIG_IGN, None)}
    try:
        for number in caught:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in caught.items():
            signal.signal(number, old)


def stop(number: int, frame) -> None:
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """A signal that comes inside waits until the body is done, or has failed."""
    waiting: list[int] = []
    try:
        with handled_by(lambda number, frame: waiting.append(number)):
            yield
    finally:
        if waiting:
            signal.raise_signal(waiting[-1])
