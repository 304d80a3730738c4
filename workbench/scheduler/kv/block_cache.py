"""The prefix cache of full blocks by name, each block on its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from hashlib import blake2b

import numpy as np

from workbench.scheduler.kv.page_table import TableManager
from workbench.scheduler.kv.pool import PagePool
from workbench.scheduler.kv.prefix_cache import Match
from workbench.scheduler.prefix_node import Node
from workbench.scheduler.request import Req

_NO_KEY = np.empty(0, np.int32)
_NOTHING = Match(None, 0)


def _named(before: bytes, tokens: bytes) -> bytes:
    """The name of a page of these tokens, int32, behind one of that name."""
    return blake2b(before + tokens, digest_size=16).digest()


class BlockCache:
    """:class:`PrefixCache` in which every full page has a name: a hash of its tokens and of the name of the page before it.

    A page is named with the step that fills it, so that others find it from that moment on, in the same step too. Nothing
    is inserted and nothing moves: whoever finds a page holds it as well. Pages of the same name may exist several times;
    the first of them is found. Whoever gives its pages back does so last page first, and a page that nobody holds any more
    waits, with its name, in a queue from whose front pages are taken for new content. Without a name it is free at once, or
    with ``blanks_queue`` waits in the queue like the others.
    """

    enabled = True
    names_at_once = True

    def __init__(self, pool: PagePool, table: TableManager, page_size: int, *, blanks_queue: bool = False) -> None:
        self.evictable_pages = 0
        self._pool = pool
        self._table = table
        self._page_size = page_size
        self._blanks_queue = blanks_queue
        self._queue: dict[int, None] = {}
        """Pages that nobody holds, in the order in which they are taken. A dictionary, which keeps the order of insertion
        and gives up any of its keys at once."""
        self._sharers = [0] * pool.total
        """Holders of each page beside the first."""
        self._name: list[bytes | None] = [None] * pool.total
        self._pages: dict[bytes, int | list[int]] = {}
        """The page of each name, or all of them, oldest name first."""
        self._named = np.zeros(table.rows, np.int64)
        """Pages of each row, from its first, that have been named or found."""

    @property
    def counts(self) -> BlockCache:
        return self

    @property
    def protected_pages(self) -> int:
        """Named pages that somebody holds. Counted when asked for."""
        return sum(name is not None and page not in self._queue for page, name in enumerate(self._name))

    # -- look-ups ----------------------------------------------------------------------------------------------------

    def measure(self, req: Req) -> Match:
        return self.match(req)

    def match(self, req: Req) -> Match:
        pages, known = [], self._pages
        for name in self._names(req, (len(req.tokens) - 1) // self._page_size):
            page = known.get(name)
            if page is None:
                break
            pages.append(page if isinstance(page, int) else page[0])
        if not pages:
            return _NOTHING
        return Match(Node(_NO_KEY, np.array(pages, np.int32), None, 0), len(pages) * self._page_size)

    def touch(self, req: Req) -> int:
        """Measure a request alone: a page's turn to be taken is settled when it is given back."""
        return self.match(req).device

    def path_pages(self, node: Node | None) -> np.ndarray:
        return _NO_KEY if node is None else node.pages

    def loose_pages(self, node: Node | None) -> int:
        return 0 if node is None else sum(page in self._queue for page in node.pages.tolist())

    # -- holding -----------------------------------------------------------------------------------------------------

    def lock(self, node: Node | None) -> None:
        if node is None:
            return
        queue, sharers = self._queue, self._sharers
        for page in node.pages.tolist():
            if page in queue:
                del queue[page]
                self.evictable_pages -= 1
            else:
                sharers[page] += 1

    def unlock(self, node: Node | None) -> None:
        if node is not None:
            self._give(node.pages.tolist())

    def insert(self, req: Req, tokens: np.ndarray | None = None) -> None: ...

    def release(self, req: Req, valid_tokens: int, held_tokens: int, *, insert: bool) -> None:
        if insert:
            self.fill(req, valid_tokens)
        self._give(self._table.pages(req.row, 0, -(-held_tokens // self._page_size)).tolist())
        req.node = None
        req.shared_pages = 0

    def give_unused(self, pages: np.ndarray) -> None:
        """Take back pages, just allocated, into which nothing will be written after all."""
        self._give(pages.tolist())

    def _give(self, pages: list[int]) -> None:
        """End one hold on each of these pages of a row."""
        queue, sharers, names = self._queue, self._sharers, self._name
        blank: list[int] = []
        before = len(queue)
        for page in reversed(pages):
            if sharers[page]:
                sharers[page] -= 1
            elif names[page] is None and not self._blanks_queue:
                blank.append(page)
            else:
                queue[page] = None
        self.evictable_pages += len(queue) - before
        if blank:
            self._pool.give(np.array(blank, np.int32))

    def evict(self, count: int) -> None:
        queue = self._queue
        gone = [page for page, _ in zip(queue, range(count), strict=False)]
        for page in gone:
            del queue[page]
            self._forget(page)
        self.evictable_pages -= len(gone)
        self._pool.give(np.array(gone, np.int32))

    # -- naming ------------------------------------------------------------------------------------------------------

    def started(self, req: Req) -> None:
        self._named[req.row] = req.shared_pages

    def fill(self, req: Req, tokens: int) -> None:
        row, count = req.row, tokens // self._page_size
        done = int(self._named[row])
        if count <= done:
            return
        names = self._names(req, count)
        for page, name in zip(self._table.pages(row, done, count).tolist(), names[done:], strict=True):
            self._add(page, name)
        self._named[row] = count

    def fill_decodes(self, reqs: list[Req], rows: np.ndarray, tokens: np.ndarray) -> None:
        full, named = tokens // self._page_size, self._named[rows]
        behind = (full > named).nonzero()[0]
        if not len(behind):
            return
        size, full, named = self._page_size, full[behind], named[behind]
        filling, known = [reqs[i] for i in behind.tolist()], tokens[behind]
        if (known == full * size).all() and (full - named == 1).all():
            self._fill_one_each(filling, rows[behind], full)
            return
        # Those of several steps at once: in the order in which the steps would have named them.
        turns = [
            ((page + 1) * size - tokens, i, (page + 1) * size)
            for i, (first, end, tokens) in enumerate(zip(named.tolist(), full.tolist(), known.tolist(), strict=True))
            for page in range(first, end)
        ]
        for _, i, end in sorted(turns):
            self.fill(filling[i], end)

    def _fill_one_each(self, reqs: list[Req], rows: np.ndarray, full: np.ndarray) -> None:
        """Name the last of each one's full pages."""
        size = self._page_size
        pages = self._table.gather_pages(rows, full - 1).tolist()
        tokens = self._table.gather_tokens(rows, (full - 1) * size, size).tobytes()
        width = len(tokens) // len(reqs)
        for i, (req, page, count) in enumerate(zip(reqs, pages, full.tolist(), strict=True)):
            names = req.page_names
            if len(names) == count - 1:
                before = names[-1] if names else req.namespace.encode()
                names.append(_named(before, tokens[i * width : (i + 1) * width]))
            self._add(page, names[count - 1])
        self._named[rows] = full

    def unfill(self, req: Req, tokens: int) -> None:
        """Take the names back of pages of a request beyond so many tokens: the step that was to fill them is not run."""
        count, done = tokens // self._page_size, int(self._named[req.row])
        if done > count:
            for page in self._table.pages(req.row, count, done).tolist():
                self._forget(page)
            self._named[req.row] = count

    def _add(self, page: int, name: bytes) -> None:
        self._name[page] = name
        others = self._pages.setdefault(name, page)
        if isinstance(others, list):
            others.append(page)
        elif others != page:
            self._pages[name] = [others, page]

    def _forget(self, page: int) -> None:
        name = self._name[page]
        if name is None:
            return
        self._name[page] = None
        pages = self._pages[name]
        if isinstance(pages, list):
            pages.remove(page)
            if len(pages) == 1:
                self._pages[name] = pages[0]
        else:
            del self._pages[name]

    def _names(self, req: Req, count: int) -> list[bytes]:
        """The names of the first ``count`` pages of a request, whose tokens are known; worked out once."""
        names, size = req.page_names, self._page_size
        if len(names) < count:
            end = count * size
            # Beyond what it was admitted with, its output is in the table.
            tokens = req.tokens if end <= len(req.tokens) else self._table.tokens(req.row, end)
            name = names[-1] if names else req.namespace.encode()
            for at in range(len(names) * size, end, size):
                name = _named(name, tokens[at : at + size].tobytes())
                names.append(name)
        return names[:count] if len(names) > count else names

    # -- checks ------------------------------------------------------------------------------------------------------

    def nodes(self) -> Iterator[Node]:
        """A node a page that has a name and that nobody holds."""
        for page in self._queue:
            name = self._name[page]
            if name is not None:
                yield Node(np.frombuffer(name, np.int32), np.array([page], np.int32), None, 0)

    def check(self, holders: Iterable[tuple[Req, int]]) -> list[np.ndarray]:
        held = Counter[int]()
        for req, tokens in holders:
            held.update(self._table.pages(req.row, 0, -(-tokens // self._page_size)).tolist())
        for page, count in held.items():
            assert page not in self._queue, "a page that waits to be taken is held"
            assert self._sharers[page] == count - 1, "holders of a page are miscounted"
        assert sum(self._sharers) == sum(held.values()) - len(held), "a page that nobody holds has sharers"
        assert len(self._queue) == self.evictable_pages, "evictable pages are miscounted"
        named = {page for page, name in enumerate(self._name) if name is not None}
        listed = [page for pages in self._pages.values() for page in (pages if isinstance(pages, list) else [pages])]
        assert sorted(listed) == sorted(named), "names and pages disagree"
        assert named <= held.keys() | self._queue.keys(), "a free page has a name"
        return [np.array(sorted(held), np.int32), np.array(list(self._queue), np.int32)]
