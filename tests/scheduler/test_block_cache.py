"""The prefix cache of blocks against a model that is too simple to be wrong: lists of pages and what is in them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.scheduler.config import SchedulerConfig
from workbench.scheduler.kv.block_cache import BlockCache
from workbench.scheduler.kv.memory import KVMemory
from workbench.scheduler.request import Req, SamplingParams

PAGES, ROWS, CONTEXT = 12, 4, 40
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=14)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("start"), st.sampled_from(["", "adapter"]), TOKENS),
        st.tuples(st.just("grow"), st.integers(0, 100), TOKENS),
        st.tuples(st.just("give"), st.integers(0, 100), st.booleans()),
        st.tuples(st.just("take back"), st.integers(0, 100)),
        st.tuples(st.just("evict"), st.integers(1, 6)),
    ),
    max_size=40,
)
Content = tuple[str, tuple[int, ...]]


class Pair:
    """The cache and the model, moved together and compared after every move."""

    def __init__(self, page_size: int, blanks: str) -> None:
        config = SchedulerConfig(
            kv_tokens=PAGES * page_size,
            max_context=CONTEXT,
            page_size=page_size,
            max_running=ROWS,
            cache="blocks",
            blank_pages=blanks,
        )
        self.kv = KVMemory(config)
        assert isinstance(self.kv.cache, BlockCache)
        self.cache = self.kv.cache
        self.size, self.blanks_queue = page_size, blanks == "queue"
        self.content: dict[int, Content] = {}
        self.named: dict[Content, list[int]] = {}
        self.queue: list[int] = []
        self.reqs: list[tuple[Req, list[int]]] = []
        self.pages: dict[int, list[int]] = {}

    # -- the model ---------------------------------------------------------------------------------------------------

    def prefix(self, req: Req, tokens: list[int], page: int) -> Content:
        return req.namespace, tuple(tokens[: (page + 1) * self.size])

    def found(self, req: Req, tokens: list[int]) -> list[int]:
        pages = []
        for page in range((len(tokens) - 1) // self.size):
            same = self.named.get(self.prefix(req, tokens, page))
            if not same:
                break
            pages.append(same[0])
        return pages

    def forget(self, page: int) -> None:
        if page in self.content:
            same = self.named[self.content.pop(page)]
            same.remove(page)

    def holders(self, page: int) -> int:
        return sum(page in pages for pages in self.pages.values())

    def put(self, page: int) -> None:
        if not self.holders(page) and (page in self.content or self.blanks_queue):
            self.queue.append(page)

    # -- moves -------------------------------------------------------------------------------------------------------

    def allocate(self, count: int) -> list[int]:
        free = set(self.kv.pool.free_pages().tolist())
        pages = self.kv.allocate(count).tolist()
        taken = [page for page in pages if page not in free]
        short = max(count - len(free), 0)
        assert sorted(taken) == sorted(self.queue[:short]), "not those that waited longest were taken"
        for page in taken:
            self.queue.remove(page)
            self.forget(page)
        return pages

    def name(self, req: Req, tokens: list[int], count: int) -> None:
        for page in range(count // self.size):
            where = self.pages[req.row][page]
            if where not in self.content:
                content = self.prefix(req, tokens, page)
                self.content[where] = content
                self.named.setdefault(content, []).append(where)

    def start(self, namespace: str, tokens: list[int]) -> None:
        kv, cache = self.kv, self.cache
        if not kv.table.free_rows:
            return
        req = Req("r", np.array(tokens, np.int32), SamplingParams(), 30, 0, namespace=namespace)
        req.tokens = req.prompt
        match = cache.match(req)
        expected = self.found(req, tokens)
        assert match.device == len(expected) * self.size
        assert cache.path_pages(match.node).tolist() == expected
        assert cache.loose_pages(match.node) == sum(page in self.queue for page in expected)
        need = kv.pages_for(len(tokens)) - len(expected)
        if need + cache.loose_pages(match.node) > kv.available_pages:
            return
        cache.lock(match.node)
        self.queue = [page for page in self.queue if page not in expected]
        req.row, req.shared_pages = kv.table.take_row(), len(expected)
        kv.table.write_tokens(req.row, req.tokens)
        own = self.allocate(need)
        self.pages[req.row] = [*expected, *own]
        kv.table.write_pages(req.row, 0, np.array(self.pages[req.row], np.int32))
        cache.started(req)
        cache.fill(req, len(tokens))
        self.name(req, tokens, len(tokens))
        self.reqs.append((req, list(tokens)))

    def grow(self, which: int, more: list[int]) -> None:
        if not self.reqs:
            return
        kv, (req, tokens) = self.kv, self.reqs[which % len(self.reqs)]
        if len(tokens) + len(more) > CONTEXT:
            return
        have = len(self.pages[req.row])
        need = kv.pages_for(len(tokens) + len(more)) - have
        if need > kv.available_pages:
            return
        pages = self.allocate(need)
        kv.table.write_pages(req.row, have, np.array(pages, np.int32))
        self.pages[req.row] += pages
        tokens += more
        kv.table.write_tokens(req.row, np.array(tokens, np.int32))
        self.cache.fill_decodes([req], np.array([req.row]), np.array([len(tokens)]))
        self.name(req, tokens, len(tokens))

    def give(self, which: int, insert: bool) -> None:
        if not self.reqs:
            return
        req, tokens = self.reqs.pop(which % len(self.reqs))
        self.cache.release(req, len(tokens), len(tokens), insert=insert)
        for page in reversed(self.pages.pop(req.row)):
            self.put(page)
        self.kv.table.give_row(req.row)

    def take_back(self, which: int) -> None:
        """A step that is not run after all: what it was to fill has no name, and its pages are unused."""
        if not self.reqs:
            return
        req, tokens = self.reqs[which % len(self.reqs)]
        kept = max(len(tokens) - self.size, len(req.tokens))
        count = self.kv.pages_for(kept)
        own = self.pages[req.row]
        if any(self.holders(page) > 1 for page in own[kept // self.size :]):
            return  # somebody has found it: no step of theirs is without it
        self.cache.unfill(req, kept)
        for page in own[kept // self.size :]:
            self.forget(page)
        unused = own[count:]
        del own[count:]
        self.cache.give_unused(np.array(unused, np.int32))
        for page in reversed(unused):
            self.put(page)
        del tokens[kept:]
        del req.page_names[kept // self.size :]

    def evict(self, count: int) -> None:
        before = self.kv.pool.free
        self.cache.evict(count)
        assert self.kv.pool.free == before + min(count, len(self.queue))
        for page in self.queue[:count]:
            self.forget(page)
        del self.queue[:count]

    def check(self) -> None:
        assert [int(node.pages[0]) for node in self.cache.nodes()] == [p for p in self.queue if p in self.content]
        assert self.cache.evictable_pages == len(self.queue)
        held = {page for pages in self.pages.values() for page in pages}
        assert self.cache.protected_pages == len(held & self.content.keys())
        self.kv.check([(req, len(tokens)) for req, tokens in self.reqs])


@pytest.mark.parametrize("page_size", [1, 2, 4])
@pytest.mark.parametrize("blanks", ["free", "queue"])
def test_the_cache_finds_keeps_and_evicts_what_the_model_does(page_size, blanks):
    @settings(max_examples=150, derandomize=True, deadline=None, database=None)
    @given(OPERATIONS)
    def check(operations) -> None:
        pair = Pair(page_size, blanks)
        for operation, *values in operations:
            getattr(pair, operation.replace(" ", "_"))(*values)
            pair.check()

    check()


def test_pages_that_several_steps_fill_at_once_are_named_in_the_order_of_the_steps():
    pair = Pair(2, "free")
    pair.start("", [0, 1])
    pair.start("", [0, 1, 1])
    for (req, tokens), more in zip(pair.reqs, ([1, 0], [0, 1]), strict=True):
        tokens += more
        have = len(pair.pages[req.row])
        pages = pair.allocate(pair.kv.pages_for(len(tokens)) - have)
        pair.kv.table.write_pages(req.row, have, np.array(pages, np.int32))
        pair.kv.table.write_tokens(req.row, np.array(tokens, np.int32))
        pair.pages[req.row] += pages
    (first, _), (second, _) = pair.reqs
    pair.cache.fill_decodes([first, second], np.array([first.row, second.row]), np.array([4, 5]))
    # Two steps at once: the second request filled its second page in one, the first its own, which is like it, in the other.
    req = Req("r", np.array([0, 1, 1, 0, 5], np.int32), SamplingParams(), 1, 0)
    req.tokens = req.prompt
    found = pair.cache.path_pages(pair.cache.match(req).node).tolist()
    assert found == [pair.pages[first.row][0], pair.pages[second.row][1]]
