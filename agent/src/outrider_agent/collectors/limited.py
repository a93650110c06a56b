"""A call that may hang, with a time limit: statfs of a dead file server, a sensor that is stuck.

The call has a daemon thread; when it takes longer than its limit, the thread is left alone with it
and the caller goes on. It is never tried a second time meanwhile, so that one thing that hangs
costs one thread and no more.
"""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Limited(Generic[T]):
    """Calls one function, each time in a thread of its own. Not for several callers at once."""

    def __init__(self, name: str, function: Callable[[], T]) -> None:
        self._name = name
        self._function = function
        self._thread: threading.Thread | None = None

    @property
    def stuck(self) -> bool:
        """Whether a call that took too long is still under way."""
        return self._thread is not None and self._thread.is_alive()

    def call(self, seconds: float) -> T:
        """What the function returns.

        Raises:
            TimeoutError: It takes longer than `seconds`, or an earlier call has not ended yet.
            Exception: What the function raised.
        """
        if self.stuck:
            raise TimeoutError(f"{self._name} has not ended since it was last asked")
        results: list[T] = []
        errors: list[Exception] = []

        def work() -> None:
            try:
                results.append(self._function())
            except Exception as error:  # noqa: BLE001 - handed to the one who waits
                errors.append(error)

        self._thread = threading.Thread(target=work, name=self._name, daemon=True)
        self._thread.start()
        self._thread.join(seconds)
        if self._thread.is_alive():
            raise TimeoutError(f"{self._name} took longer than {seconds} s")
        if errors:
            raise errors[0]
        return results[0]
