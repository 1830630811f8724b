"""Changes that happen as a whole or not at all, whatever exception comes in between."""

from __future__ import annotations

from collections.abc import Callable


class Journal:
    """The change that is under way. It has happened from the moment in which it is written here.

    Each action sets something to a value that was worked out before, so that it can be done again:
    where an exception ended a change (Ctrl-C comes between any two lines), ``finish`` makes it
    whole. Call that before anything is read.
    """

    def __init__(self) -> None:
        self._actions: tuple[Callable[[], object], ...] = ()

    def change(self, *actions: Callable[[], object]) -> None:
        self._actions = actions
        self.finish()

    def finish(self) -> None:
        if self._actions:
            for action in self._actions:
                action()
            self._actions = ()
