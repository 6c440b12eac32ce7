"""Being asked to stop: what is begun is finished first, unless one asks twice."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# of the program when it was asked to end, and when a time limit is near (EX_TEMPFAIL: run it again)
STATUSES = {signal.SIGTERM: 143, signal.SIGUSR1: 75}
# a scheduler may deliver one request twice: to the process, and through whoever started it
SAME_REQUEST_SECONDS = 1.0


class Terminated(BaseException):
    """The process was asked to end; finished images are on disk.

    Attributes:
        status: the exit status that says so, 143 for SIGTERM, 75 for SIGUSR1.
    """

    def __init__(self, signum: signal.Signals = signal.SIGTERM) -> None:
        super().__init__(signum.name)
        self.signum = signum
        self.status = STATUSES[signum]


@contextmanager
def ending_when_asked() -> Iterator[None]:
    """Within the block the signals raise Terminated at once, but where a StopRequest listens.

    It is for work that is short, or that keeps drafts: calibration, scoring, the report. A library
    that wraps what its callbacks raise, as pydantic does while it writes, hides no interruption:
    what leaves the block then is the Terminated or KeyboardInterrupt behind.
    """
    with restored_handlers():
        for signum in STATUSES:
            signal.signal(signum, _end)
        try:
            yield
        except Exception as error:
            interruption = _behind(error)
            if interruption is None:
                raise
            raise interruption from None


@contextmanager
def restored_handlers() -> Iterator[None]:
    """After the block the signals mean what they meant before."""
    before = {signum: signal.getsignal(signum) for signum in STATUSES}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class StopRequest:
    """Whether this process was asked to stop, by SIGTERM or SIGUSR1.

    The first request lets the running micro-batch finish, a second one ends it between two steps.

    Attributes:
        signum: the last signal, None if there was none.
        urgent: whether there was more than one.
    """

    def __init__(self) -> None:
        self.signum: signal.Signals | None = None
        self.urgent = False
        self._first = 0.0
        self._listeners: list[Callable[[signal.Signals], None]] = []

    def __bool__(self) -> bool:
        return self.signum is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block signals are requests; afterwards they are what they were."""
        with restored_handlers():
            self.listen()
            yield

    def listen(self) -> None:
        """Take the signals over, from whoever has them."""
        for signum in STATUSES:
            signal.signal(signum, self._asked)

    def pass_on_to(self, listener: Callable[[signal.Signals], None]) -> None:
        """Call ``listener(signum)`` at each request too."""
        self._listeners.append(listener)

    def check(self, *, urgent: bool = False) -> None:
        """Raise Terminated if there was a request (an urgent one)."""
        if self.signum is not None and (self.urgent or not urgent):
            raise Terminated(self.signum)

    def _asked(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self._first = time.monotonic()
        self.urgent = time.monotonic() - self._first > SAME_REQUEST_SECONDS
        self.signum = signal.Signals(signum)
        for listener in self._listeners:
            listener(self.signum)


def _end(signum: int, frame: FrameType | None) -> None:
    raise Terminated(signal.Signals(signum))


def _behind(error: BaseException | None) -> Terminated | KeyboardInterrupt | None:
    """The interruption that ``error`` was raised from, or None."""
    while error is not None and not isinstance(error, Terminated | KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error
