"""Pages of the cache: who holds them, and which of them hold a prefix that may come again.

A page has room for `page_size` tokens. It is in use (by one sequence or, as a common prefix, by several),
idle (nobody's, but its prefix is known and may be found again) or free. A known prefix is a chain: a page is
found by the page before it and its own tokens, compared as they are, so that no collision of hashes can give
a sequence another's cache. Idle pages are given up the longest unused first; of one sequence its last page
first, because without a page those after it cannot be found.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

ROOT = 0  # of all chains: the serial number before a first page


@dataclass
class Holding:
    """A sequence's pages in order, and how far they are known as a prefix: `known` pages, the last of serial
    number `serial`."""

    pages: list[int] = field(default_factory=list)
    known: int = 0
    serial: int = ROOT


class PagePool:
    """`num_pages` pages of `page_size` tokens. A Holding is filled and emptied here alone."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        assert num_pages > 0
        assert page_size > 0
        self.num_pages, self.page_size = num_pages, page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._users: Counter[int] = Counter()
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._found: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}  # to (page, serial)
        self._key: dict[int, tuple[int, tuple[int, ...]]] = {}  # of a known page
        self._next_serial = ROOT + 1

    @property
    def available(self) -> int:
        """Pages that can be taken now."""
        return len(self._free) + len(self._idle)

    @property
    def in_use(self) -> int:
        return self.num_pages - self.available

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def find(self, tokens: Sequence[int], holding: Holding) -> int:
        """Gives an empty holding the known pages with which `tokens` begin, but never all of the tokens: the
        last must be computed for what comes next. Returns how many tokens that are."""
        assert not holding.pages
        size = self.page_size
        for start in range(0, (len(tokens) - 1) // size * size, size):
            found = self._found.get((holding.serial, tuple(tokens[start : start + size])))
            if found is None:
                break
            page, holding.serial = found
            self._idle.pop(page, None)
            self._users[page] += 1
            holding.pages.append(page)
        holding.known = len(holding.pages)
        return holding.known * size

    def extend(self, holding: Holding, num_tokens: int) -> bool:
        """Makes room for `num_tokens` in all; False, and nothing taken, where there are too few pages."""
        missing = self.pages_for(num_tokens) - len(holding.pages)
        if missing > self.available:
            return False
        for _ in range(missing):
            page = self._free.pop() if self._free else self._give_up_oldest()
            self._users[page] = 1
            holding.pages.append(page)
        return True

    def publish(self, holding: Holding, tokens: Sequence[int]) -> None:
        """Makes known the pages that `tokens`, all of which are in the cache, fill."""
        size = self.page_size
        for index in range(holding.known, len(tokens) // size):
            key = (holding.serial, tuple(tokens[index * size : (index + 1) * size]))
            page = holding.pages[index]
            # Another sequence may have made the same prefix known meanwhile: this page stays this one's own.
            if key not in self._found:
                self._found[key] = (page, self._next_serial)
                self._key[page] = key
                self._next_serial += 1
            holding.serial = self._found[key][1]
            holding.known = index + 1

    def release(self, holding: Holding) -> None:
        """Empties a holding. Its known pages can be found again until they are needed."""
        for page in reversed(holding.pages):
            self._users[page] -= 1
            if self._users[page] == 0:
                del self._users[page]
                if page in self._key:
                    self._idle[page] = None
                else:
                    self._free.append(page)
        holding.pages, holding.known, holding.serial = [], 0, ROOT

    def _give_up_oldest(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._found[self._key.pop(page)]
        return page

    def check_integrity(self, holdings: Iterable[Holding]) -> None:
        """Every page is in one place, and used as often as the holdings say. Raises AssertionError."""
        used = Counter(page for holding in holdings for page in holding.pages)
        assert used == self._users, "pages in use are not those held"
        places = [*self._free, *self._idle, *self._users]
        assert sorted(places) == list(range(self.num_pages)), "a page is lost, or in two places"
        assert {page for page, _ in self._found.values()} == set(self._key)
        assert all(self._found[key][0] == page for page, key in self._key.items())
        assert not set(self._free) & set(self._key), "a free page is known"
        assert set(self._idle) <= set(self._key), "an idle page is unknown"
