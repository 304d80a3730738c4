"""Assembly: what was chosen becomes arrays, the running set moves on, and the batch is in flight."""

from __future__ import annotations

import numpy as np

from workbench.scheduler.batch import KVCopy, Mode, ModelWorkerBatch, NewRequest
from workbench.scheduler.config import SchedulerConfig
from workbench.scheduler.parts import Parts
from workbench.scheduler.running import DecodeStep
from workbench.scheduler.schedule_batch import PrefillRow, ScheduleBatch
from workbench.scheduler.slots import Slot
from workbench.scheduler.stops import chosen, stacked, stop_ids_of

_NOBODY = np.empty(0, np.int64)


class Assembly:
    """Maker of the batches of all slots, numbered in order."""

    def __init__(self, config: SchedulerConfig, parts: Parts) -> None:
        self.step = 0
        """Number of the next batch."""
        self._kv, self._slots, self._queue = parts.kv, parts.slots, parts.queue
        self._flights, self._lifecycle = parts.flights, parts.lifecycle
        self._prompts_first = config.mixed_join == "after"
        self._names_at_once = self._kv.cache.names_at_once
        self.joining: dict[int, NewRequest] = {}
        """By row, requests that begin to decode with the next batch, with KV from elsewhere."""
        self.copies: list[KVCopy] = []
        """Copies that the next batch brings."""

    def prefill(
        self,
        slot: Slot,
        prefill: list[PrefillRow],
        decodes: bool,
        needing: np.ndarray | None,
        pages: np.ndarray | None = None,
    ) -> ScheduleBatch:
        """A batch with prompts in it: advance the running set if it ``decodes`` beside them, ``needing`` pages as
        :meth:`RunningSet.needing_page` has it (:meth:`take_pages`, unless that has been done), and add those whose prompt
        is complete to it."""
        running = slot.running
        step = self._step(slot, needing, pages) if decodes else None
        left = 0
        mode: Mode = "mixed" if step is not None else "prefill"
        new_reqs = [row.req for row in prefill]
        width = self._kv.table.width
        numbers = [
            (req.row, row.end, req.end_len, req.row * width + row.end, row.end - row.start)
            for req, row in zip(new_reqs, prefill, strict=True)
        ]
        # One array for all of them: each of its own would cost as much.
        new_rows, new_lens, new_ends, new_at, new_queries = np.array(numbers, np.int64).T.copy()
        rows, seq_lens, query_lens, token_at, reqs = new_rows, new_lens, new_queries, new_at, new_reqs
        stop_ids = prefill_stops = stop_ids_of(new_reqs)
        context_tokens = prefill_tokens = 0
        inputs: list[np.ndarray] = []
        starting: list[NewRequest] = []
        silent: list[int] = []
        stops: list[int] = []
        joining: list[int] = []
        for i, row in enumerate(prefill):
            req = row.req
            context_tokens += row.end
            prefill_tokens += row.end - row.start
            inputs.append(req.tokens[row.start : row.end])
            if row.start == row.cached:
                prompt = req.input_len - req.written_tokens
                starting.append(NewRequest(req.row, req.rid, prompt, req.tokens, req.params))
            if not row.samples:
                silent.append(i)
            if row.last:
                (stops if req.kv_len == req.end_len else joining).append(i)
        if step is not None:
            rows, seq_lens = np.concatenate((rows, step.rows)), np.concatenate((seq_lens, step.seq_lens))
            query_lens, token_at = (
                np.concatenate((query_lens, step.query_lens)),
                np.concatenate((token_at, step.token_at)),
            )
            reqs = [*reqs, *step.reqs]
            stop_ids = stacked(prefill_stops, step.stop_ids, len(prefill), len(step.reqs))
            context_tokens += step.context_tokens
            stops += [i + len(prefill) for i in step.stops]
        input_ids = np.concatenate(inputs) if len(inputs) > 1 else inputs[0]
        for req in self._slots.partial:
            left += len(req.tokens) - req.kv_len
        if joining:
            # Nearly always all of them do, and a slice is the quicker index.
            at = slice(len(prefill)) if len(joining) == len(prefill) else joining
            joined, stop_ids_at = [new_reqs[i] for i in joining], chosen(prefill_stops, at)
            running.add(joined, new_rows[at], new_lens[at], new_ends[at], new_at[at], stop_ids_at)
            if self._prompts_first and step is not None:
                running.rotate(len(joined))
        worker = ModelWorkerBatch(
            self.step,
            mode,
            rows,
            next(self._slots.epochs),
            seq_lens,
            query_lens,
            len(prefill),
            len(rows) - len(silent),
            prefill_tokens,
            0 if step is None else step.tokens,
            context_tokens,
            input_ids,
            np.array(silent, np.int64) if silent else None,
            tuple(starting),
            None if step is None else step.page_rows,
            None if step is None else step.pages,
            self._kv.table.take_writes(),
            self._kv.used_tokens,
            len(self._queue.waiting) + self._queue.elsewhere,
            self._kv.table.rows - self._kv.table.free_rows - self._kv.table.aside,
            left,
            None if step is None else step.page_places,
        )
        self.step += 1
        retracted = self._lifecycle.take_retracted()
        ends = _NOBODY if step is None else step.ends
        batch = ScheduleBatch(worker, reqs, slot.index, prefill, stops, retracted, token_at, stop_ids, ends)
        self._flights.launch_prefill(batch)
        return batch

    def take_pages(self, slot: Slot, needing: np.ndarray | None) -> np.ndarray:
        """int32: take the pages for everybody's next decode, and share those that it fills."""
        running = slot.running
        pages = self._kv.allocate(running.count if needing is None else len(needing))
        if self._names_at_once:
            if running.fills_new_pages:
                running.write_pages(needing, pages)
            self._kv.cache.fill_decodes(running.reqs, running.rows, running.known_tokens(self._flights.of_slot(slot)))
        return pages

    def decode(self, slot: Slot, needing: np.ndarray | None, pages: np.ndarray | None = None) -> ScheduleBatch:
        """A batch of decodes alone: nearly every step is one, so it does nothing that only a prefill needs. The ``pages``
        are taken (:meth:`take_pages`) unless that has been done."""
        running = slot.running
        if running.ragged:
            return self._ragged_decode(slot, needing, pages)
        kv, table = self._kv, self._kv.table
        rows, count = running.rows, running.count
        page_rows = rows if needing is None else rows[needing]
        if pages is None:
            pages = self.take_pages(slot, needing) if self._names_at_once else kv.allocate(len(page_rows))
        stops = running.advance(needing, pages)
        # Positional: keywords would double the cost.
        worker = ModelWorkerBatch(
            self.step,
            "decode",
            rows,
            running.epoch,
            running.lens,
            running.query_lens,
            0,
            count,
            0,
            count,
            running.context_tokens,
            None,
            None,
            (),
            page_rows,
            pages,
            table.take_writes(),
            kv.used_tokens,
            len(self._queue.waiting) + self._queue.elsewhere,
            table.rows - len(table.free) - table.aside,
        )
        if self.joining or self.copies:
            worker = self._with_arrivals(worker)
        retracted = self._lifecycle.take_retracted() if self._lifecycle.retracted else ()
        batch = ScheduleBatch(
            worker, running.reqs, slot.index, (), stops, retracted, running.token_at, running.stop_ids
        )
        if stops:
            running.remove(stops)
        self.step += 1
        self._flights.append(batch)
        return batch

    def _with_arrivals(self, worker: ModelWorkerBatch) -> ModelWorkerBatch:
        """A batch of decodes, with what has come since the last one."""
        rows = set(worker.rows.tolist())  # whoever has left again has no place in it
        new = tuple(one for row, one in self.joining.items() if row in rows)
        copies = tuple(self.copies)
        self.joining, self.copies = {}, []
        return worker._replace(new_requests=new, kv_copies=copies)

    def _ragged_decode(self, slot: Slot, needing: np.ndarray | None, pages: np.ndarray | None) -> ScheduleBatch:
        """The same where a step may bring each several tokens, and some may sit out."""
        kv, table = self._kv, self._kv.table
        step = self._step(slot, needing, pages)
        worker = ModelWorkerBatch(
            self.step,
            "decode",
            step.rows,
            step.epoch,
            step.seq_lens,
            step.query_lens,
            0,
            len(step.rows),
            0,
            step.tokens,
            step.context_tokens,
            None,
            None,
            (),
            step.page_rows,
            step.pages,
            table.take_writes(),
            kv.used_tokens,
            len(self._queue.waiting) + self._queue.elsewhere,
            table.rows - table.free_rows - table.aside,
            decode_page_places=step.page_places,
        )
        retracted = self._lifecycle.take_retracted()
        batch = ScheduleBatch(
            worker, step.reqs, slot.index, (), step.stops, retracted, step.token_at, step.stop_ids, step.ends
        )
        self.step += 1
        self._flights.append(batch)
        return batch

    def _step(self, slot: Slot, needing: np.ndarray | None, pages: np.ndarray | None) -> DecodeStep:
        """Move the running set on; who stops by length with this step leaves it."""
        running = slot.running
        if pages is None:
            pages = self.take_pages(slot, needing)
        step = running.step(needing, pages)
        if step.stops:
            running.remove(step.stops)
        return step
