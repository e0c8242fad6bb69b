"""When it is looked whether weights still move, and what is said of those that do not; `numerics.movement` says what a
stall is. One look is no proof, since a warm-up begins with small updates: a group is reported when two looks running found it.
"""

import warnings
from collections.abc import Iterable

from halfstep.errors import StallWarning
from halfstep.records import Stall

FIRST, EVERY = (10, 20), 500
"""Updates after which it is looked: when the optimizer's moments have filled, and now and then."""


class StallReports:
    """Collects what the looks found.

    Examples:
        >>> [number for number in range(1, 600) if StallReports().is_due(number)]
        [10, 20, 500]
    """

    def __init__(self) -> None:
        self._news: tuple[str, ...] = ()
        self._before: set[str] = set()
        self._warned: set[str] = set()

    def is_due(self, number: int) -> bool:
        """Whether to look at update `number`."""
        return number in FIRST or number % EVERY == 0

    def take(self) -> tuple[str, ...]:
        """What the last look reported; once."""
        news, self._news = self._news, ()
        return news

    def note(self, stalls: Iterable[Stall], *, stacklevel: int) -> None:
        """Take in a look. Warns once of each group that stalls for the second time running."""
        names = {f"{stall.group} {stall.storage} {stall.master}": str(stall) for stall in stalls}
        again = {name: text for name, text in names.items() if name in self._before}
        self._news, self._before = tuple(again.values()), set(names)
        for name in again.keys() - self._warned:
            self._warned.add(name)
            warnings.warn(again[name], StallWarning, stacklevel=stacklevel)
