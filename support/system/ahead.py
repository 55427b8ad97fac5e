"""Work done ahead on a thread, while the caller is busy with something else."""

import collections
import contextlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor


@contextlib.contextmanager
def made_ahead(thread: Executor, items: Iterable, n: int) -> Iterator[Iterator]:
    """The same items in the same order, made by the executor's only thread, up to n before they are
    asked for (n = 0: without the thread, when asked for).

    An error while an item is made is raised, with its own traceback, when that item is asked for.
    If the body is left early, for example by Ctrl-C, the thread still finishes its current item."""
    making, end = iter(items), object()
    if n == 0:
        yield making
        return
    waiting = collections.deque(thread.submit(next, making, end) for _ in range(n))

    def asked_for() -> Iterator:
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, making, end))
            yield item

    try:
        yield asked_for()
    finally:
        for future in waiting:
            future.cancel()
