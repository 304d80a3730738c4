"""vLLM v1's way to the letter: one token budget, one request after another in the order of their admission."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from workbench.scheduler.admission import Admission
from workbench.scheduler.batches.assembly import Assembly
from workbench.scheduler.config import SchedulerConfig
from workbench.scheduler.parts import Parts
from workbench.scheduler.request import Finish, Req
from workbench.scheduler.running import RunningSet, place_of
from workbench.scheduler.schedule_batch import PrefillRow, ScheduleBatch
from workbench.scheduler.slots import Slot


@dataclass(slots=True)
class _Step:
    """A step while it is put together."""

    slot: Slot
    left: int
    """Tokens of its budget."""
    most: int
    """Prompt tokens that one request may compute."""
    decodes: bool = False
    needing: np.ndarray | None = None
    pages: np.ndarray | None = None
    """Of the decodes."""
    rows: list[PrefillRow] = field(default_factory=list)
    aside: RunningSet | None = None
    """Running requests that sit it out."""


class InTurnMixed:
    """Every batch goes through those who hold KV in the order of their admission, and admits others with what is left.

    Each takes its tokens and its pages before the next is looked at. Nearly always there is enough for all and at most the
    newest is still at its prompt: then arrays do it at once.
    """

    def __init__(self, config: SchedulerConfig, parts: Parts, assembly: Assembly) -> None:
        self._config = config
        self._kv, self._slots, self._queue, self._lifecycle = parts.kv, parts.slots, parts.queue, parts.lifecycle
        self._flights = parts.flights
        self._admission = Admission(config, parts)
        self._assembly = assembly
        self._by_priority = config.policy == "priority" and config.preempt_first == "priority"
        self._stops = config.after_own_preemption == "stop"
        self._gaps = config.preemption_gap
        self._loses = config.in_flight_token == "lose"
        self._whole = config.admit_for == "prompt"
        self._bound = config.long_prefill_tokens
        self._left_out: dict[int, list[Req]] = {}
        """By slot, the running requests that sat out its last step."""
        self._bound_alone = config.long_prefill_alone == "bounded"

    def form(self, slot: Slot) -> ScheduleBatch | None:
        before = len(self._lifecycle.retracted)
        step = _Step(slot, self._config.max_batch_tokens, self._most_of_one(slot))
        at_once = slot.index not in self._left_out and self._all_at_once(step)
        if not at_once:
            self._one_by_one(step)
        if len(self._lifecycle.retracted) == before and self._queue.waiting and not slot.full:
            self._admit(step)
        batch = None
        if step.rows:
            batch = self._assembly.prefill(slot, step.rows, step.decodes, step.needing, step.pages)
        elif step.decodes:
            batch = self._assembly.decode(slot, step.needing, step.pages)
        if step.aside is not None:
            self._left_out[slot.index] = step.aside.reqs
            slot.running.put_back(step.aside)
        elif not at_once:
            slot.running.sort()  # a prompt may have been completed before one that was admitted earlier
        return batch

    def decoded(self, slot: Slot, steps: int) -> None:
        pass  # it keeps no account of decode steps

    # -- who holds KV ------------------------------------------------------------------------------------------------

    def _all_at_once(self, step: _Step) -> bool:
        """Serve everybody who holds KV, if it is plain that there is enough for all."""
        slot, running, partial, kv = step.slot, step.slot.running, self._slots.partial, self._kv
        decodes = running.count > 0 and not running.stalled
        if len(partial) > 1 or (partial and running.count and partial[0].turn < running.reqs[-1].turn):
            return False
        needing = running.needing_page() if decodes else None
        pages = 0 if not decodes else running.count if needing is None else len(needing)
        tokens = running.next_tokens if decodes else 0
        end = 0
        if partial:
            end = self._chunk_end(step, partial[0], step.left - tokens)
            more = kv.pages_for(end) - kv.pages_for(partial[0].kv_len)
        else:
            more = 0
        if tokens > step.left or pages + more > kv.available_pages:
            return False
        step.left -= tokens
        if decodes:
            step.decodes, step.needing, step.pages = True, needing, self._assembly.take_pages(slot, needing)
        if partial and end > partial[0].kv_len:
            self._compute(step, partial[0], end)
        return True

    def _one_by_one(self, step: _Step) -> None:
        """Serve those who hold KV one after another, as far as tokens and pages go. Where pages run out, some are preempted:
        served ones, whose tokens the others may have, and ones behind."""
        running, kv = step.slot.running, self._kv
        ending = [req for req in self._ending(step.slot) if req.max_new]
        line = sorted([*running.reqs, *self._slots.partial, *ending], key=lambda req: req.turn)
        places = {id(req): place for place, req in enumerate(running.reqs)}
        tokens, needs = running.step_tokens.tolist(), running.needs().tolist()
        known = running.known_tokens(self._flights.of_slot(step.slot)).tolist()
        for req in self._left_out.pop(step.slot.index, ()):
            if id(req) in places and not running.ragged and self._flights and not self._flights.hold(req):
                known[places[id(req)]] += 1  # no step in flight brings it a token
        # Who would lose the token in flight with its KV, and write it again and again, has to be found too long with it.
        lengths = (running.lens + 1).tolist() if self._loses else known
        served: dict[int, np.ndarray] = {}
        """Pages of those who decode, by the identity of the request."""
        at = 0
        while at < len(line) and step.left > 0:
            req = line[at]
            place, end = places.get(id(req)), 0
            if place is not None:
                count, need = tokens[place], needs[place]
            elif req in self._slots.partial:
                end = self._chunk_end(step, req, step.left)
                count, need = end - req.kv_len, kv.pages_for(end) - kv.pages_for(req.kv_len)
            else:
                count = need = 0  # its last token is on its way
            if count == 0 or count > step.left:
                at += 1
                continue
            if kv.pages_for(end or lengths[place or 0]) > kv.pool.total:
                if self._flights.hold(req):
                    at += 1  # what it is still given counts
                else:
                    self._lifecycle.cut(line.pop(at), Finish("aborted", "kv_exhausted"))
                continue
            while need > kv.available_pages:
                victim = self._victim(line)
                gone = line.index(victim)
                del line[gone]
                if gone < at and not (
                    self._gaps and id(victim) not in served and all(row.req is not victim for row in step.rows)
                ):
                    at -= 1
                step.left += self._preempt(step, victim, served.pop(id(victim), None))
                if victim is req:
                    break
            else:
                step.left -= count
                if place is None:
                    self._compute(step, req, end, paid=True)
                else:
                    served[id(req)] = pages = kv.allocate(need)
                    if kv.cache.names_at_once:
                        if running.fills_new_pages:
                            running.write_pages(np.repeat(running.reqs.index(req), need), pages)
                        kv.cache.fill(req, known[place])
                at += 1
                continue
            if self._stops:
                break
        out = [place for place, req in enumerate(running.reqs) if id(req) not in served]
        if out:
            step.aside = running.aside(out)
        if served:
            step.decodes, step.needing = True, running.needing_page()
            step.pages = np.concatenate([served[id(req)] for req in running.reqs])

    def _ending(self, slot: Slot) -> list[Req]:
        """Requests that reach their output bound with a batch in flight, and hold KV until then."""
        return [
            req
            for batch in self._flights
            if batch.slot == slot.index
            for req in (batch.reqs[i] for i in batch.length_stops)
            if req.finish is None and req.row >= 0 and not req.given_back
        ]

    def _victim(self, line: list[Req]) -> Req:
        if self._by_priority:
            return min(line, key=lambda req: (req.priority, -req.seq))
        return line[-1]

    def _preempt(self, step: _Step, victim: Req, pages: np.ndarray | None) -> int:
        """Take the KV of a request away, and what it got in this step: ``pages`` of one that decodes. Returns the tokens
        that others may have instead."""
        kv, running = self._kv, step.slot.running
        tokens = 0
        place = place_of(victim, running.reqs)
        if place is not None:
            if pages is not None:
                tokens = int(running.step_tokens[place])
                kv.cache.unfill(victim, int(running.lens[place]))
                kv.cache.give_unused(pages)
            running.remove([place])
        if victim in self._slots.partial:
            self._slots.partial.remove(victim)
        row = next((row for row in step.rows if row.req is victim), None)
        if row is not None:
            tokens = row.end - row.start
            step.rows.remove(row)
            kv.cache.unfill(victim, row.start)
            first, end = kv.pages_for(row.start), kv.pages_for(row.end)
            kv.cache.give_unused(kv.table.pages(victim.row, first, end).copy())
            victim.kv_len = row.start
        self._lifecycle.retract(victim)
        return tokens

    # -- who waits ---------------------------------------------------------------------------------------------------

    def _admit(self, step: _Step) -> None:
        """Admit waiting requests in order until the first that does not fit."""
        slot, kv, slots = step.slot, self._kv, self._slots
        held = slot.running.count + len(slots.partial) + len(self._ending(slot)) + sum(row.last for row in step.rows)
        held += 0 if step.aside is None else step.aside.count
        admitted: list[Req] = []
        for req in self._queue.ordered():
            if step.left <= 0:
                break
            if held >= self._config.max_running_per_slot or self._flights.free_rows <= 0:
                slot.full = True
                break
            match = kv.cache.match(req)
            cached = match.device
            if self._admission.computed_in(step.rows, req, cached):
                continue
            if kv.pages_for(len(req.tokens)) > kv.pool.total:
                self._lifecycle.cut(req, Finish("aborted", "kv_exhausted"))
                continue
            end = self._end(step, len(req.tokens), cached, step.left)
            need = kv.pages_for(len(req.tokens) if self._whole else end) - cached // kv.page_size
            if need + kv.cache.loose_pages(match.node) > kv.available_pages:
                break
            kv.cache.lock(match.node)
            row = self._admission.start(slot, req, match, end)
            step.rows.append(row)
            step.left -= end - cached
            if not row.last:
                slots.partial.append(req)
            held += 1
            admitted.append(req)
        self._queue.admitted(admitted)

    # -- prompts -----------------------------------------------------------------------------------------------------

    def _most_of_one(self, slot: Slot) -> int:
        bound = self._bound
        if bound is None:
            return self._config.max_batch_tokens
        if not self._bound_alone:
            held = slot.running.count + len(self._slots.partial) + len(self._ending(slot))
            if held + len(self._queue.waiting) <= 1:
                return self._config.max_batch_tokens
        return bound

    def _end(self, step: _Step, length: int, done: int, left: int) -> int:
        """Where a chunk of a prompt ends of which so much is done, with so many tokens left."""
        return min(length, done + self._config.chunk_at(done, min(left, step.most)))

    def _chunk_end(self, step: _Step, req: Req, left: int) -> int:
        """The same for one that has a row; ``kv_len`` where it has to wait."""
        if left <= 0:
            return req.kv_len
        end = self._end(step, len(req.tokens), req.kv_len, left)
        if end == len(req.tokens) and step.slot.running.count >= self._config.max_running_per_slot:
            return req.kv_len  # its last chunk must land in a slot with room: another one has it
        return end

    def _compute(self, step: _Step, req: Req, end: int, *, paid: bool = False) -> None:
        """Put the next chunk of a partly computed prompt into the step."""
        if not paid:
            step.left -= end - req.kv_len
        row = self._admission.go_on(step.slot, req, end)
        step.rows.append(row)
        if row.last:
            self._slots.partial.remove(req)
