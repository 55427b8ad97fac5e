"""Being told to stop: Ctrl-C and SIGTERM raise, but never in the middle of what must stay whole."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Terminated(KeyboardInterrupt):
    """SIGTERM: from `kill`, a scheduler, a rented machine about to go."""


RAISES = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
_waiting: list[int] = []  # signals received inside `unbroken`
_depth = 0  # of `unbroken` bodies


def _on_signal(number: int, frame) -> None:
    if _depth:
        _waiting.append(number)
    else:
        raise RAISES[number]


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Inside, both signals raise. One that is ignored (nohup, a job begun with &) stays ignored;
    outside the main thread Python hands out no signals, and nothing is changed."""
    on_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in RAISES} if on_main else {}
    caught = {n: handler for n, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for number in caught:
            signal.signal(number, _on_signal)
        yield
    finally:
        for number, handler in caught.items():
            signal.signal(number, handler)
        _waiting.clear()


@contextlib.contextmanager
def unbroken() -> Iterator[None]:
    """A signal that comes inside waits until the body is done."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
    if _waiting and not _depth:
        raise RAISES[_waiting.pop()]
