"use strict";
// Single requests: queued, prefill chunks, decode, retracted; the slowest of a run, or chosen ones in every run.
WB.parts.push(async () => {
  const { data, seconds, whole, element } = WB;
  const holder = document.getElementById("waterfall");
  if (!holder) return;
  const SHOWN = 14;
  const ids = await WB.text(data.requests.ids);
  const tick = data.requests.tick_s;
  const tables = {};
  for (const run of data.runs) tables[run] = await unpack(data.requests.runs[run]);

  async function unpack(packed) {
    const column = await WB.integers(packed.requests), event = await WB.integers(packed.events);
    WB.summed(column.number);
    WB.summed(column.arrival_s);
    WB.summed(event.number);
    const rowOf = new Map(Array.from(column.number, (number, row) => [number, row]));
    const eventsOf = new Map();
    event.number.forEach((number, at) => {
      if (!eventsOf.has(number)) eventsOf.set(number, []);
      eventsOf.get(number).push({ begin: event.begin[at] * tick, lasts: event.lasts[at] * tick, tokens: event.tokens[at], retracted: event.retracted[at] === 1 });
    });
    const known = (name, row) => (!column[name] || column[name][row] < 0 ? null : column[name][row] * tick);
    const request = (number) => {
      const row = rowOf.get(number);
      if (row === undefined) return null;
      const first = known("first_token_s", row), finish = known("finish_s", row), tokens = column.output_tokens[row];
      return {
        id: ids[number], number, arrival: column.arrival_s[row] * tick, queued: known("queued_s", row), scheduled: known("scheduled_s", row), first, finish,
        input: column.input_tokens[row], output: tokens, cached: column.cached_tokens[row], retractions: column.retractions[row],
        status: packed.statuses[column.status[row]], instance: column.instance[row], events: eventsOf.get(number) ?? [],
        shared: !!column.bootstrap_s, bootstrap: known("bootstrap_s", row), arrived: known("transfer_end_s", row), admitted: known("decode_admission_s", row),
        ttft: first, e2e: finish, queue: known("scheduled_s", row), tpot: first != null && finish != null && tokens > 1 ? (finish - first) / (tokens - 1) : null,
      };
    };
    return { numbers: Array.from(column.number), request };
  }

  // What a request was doing, in seconds since its arrival.
  function segments(request) {
    const parts = [], end = request.finish ?? Math.max(request.first ?? 0, request.scheduled ?? 0, ...request.events.map(({ begin, lasts }) => begin + lasts));
    const add = (kind, from, to, text) => { if (to > from) parts.push({ kind, from, to, text: `${text}: ${seconds(to - from)}` }); };
    let at = 0, state = "queued";
    if (request.bootstrap > 0) {
      add("bootstrap", 0, request.bootstrap, "for pages on the decode side");
      at = request.bootstrap;
    }
    if (request.scheduled == null) {
      if (request.shared && request.bootstrap == null) add("bootstrap", at, end, "for pages on the decode side");
      else add("queued", at, end, "queued");
      return { parts, end };
    }
    if (!request.events.length) {
      add("queued", at, request.scheduled, "queued");
      add("prefill", request.scheduled, request.first ?? end, "prefill (its chunks are not recorded)");
      if (request.first != null) add("decode", request.first, end, `decode, ${whole(request.output)} tokens`);
      return { parts, end };
    }
    const names = { queued: "queued", waiting: "between chunks", decode: "decode", retracted: "retracted, queued again" };
    request.events.forEach((event, place) => {
      add(state, at, event.begin, names[state]);
      at = Math.max(at, event.begin);
      if (event.retracted) { state = "retracted"; return; }
      add("prefill", event.begin, event.begin + event.lasts, `prefill, ${whole(event.tokens)} tokens`);
      at = event.begin + event.lasts;
      const next = request.events.slice(place + 1).find(({ retracted }) => !retracted);
      const lost = request.events.slice(place + 1).find(({ retracted }) => retracted);
      // More chunks before anything is lost: the prompt is not complete yet.
      state = next && (!lost || next.begin < lost.begin) ? "waiting" : "decode";
      if (state !== "decode") return;
      for (const [kind, till, text] of [["transfer", request.arrived, "KV on its way"], ["admission", request.admitted, "for a place to decode"]]) {
        if (till > at) { add(kind, at, till, text); at = till; }
      }
    });
    add(state, at, end, state === "decode" ? `decode, ${whole(request.output)} tokens` : names[state]);
    return { parts, end };
  }

  const run = document.getElementById("of-run"), by = document.getElementById("slowest-by"), search = document.getElementById("request");
  const said = document.getElementById("request-said");
  function slowest() {
    const table = tables[run.value];
    return table.numbers.map(table.request).filter((request) => request[by.value] != null).sort((one, other) => other[by.value] - one[by.value] || one.number - other.number)
      .slice(0, SHOWN).map((request) => ({ run: run.value, request }));
  }
  function chosen() {
    const wanted = search.value.trim();
    if (!wanted) return null;
    const exact = ids.indexOf(wanted);
    const numbers = exact >= 0 ? [exact] : ids.map((id, number) => (id.includes(wanted) ? number : -1)).filter((number) => number >= 0);
    said.textContent = numbers.length ? (exact >= 0 ? "" : `${whole(numbers.length)} ids hold “${wanted}”`)
      : `no request “${wanted}”` + (ids.length < data.requests.total ? ` among the ${whole(ids.length)} of ${whole(data.requests.total)} that the page holds` : "");
    return numbers.slice(0, 6).flatMap((number) => data.runs.map((name) => ({ run: name, request: tables[name].request(number) }))).filter(({ request }) => request);
  }
  function show() {
    said.textContent = ids.length < data.requests.total ? `the page holds ${whole(ids.length)} of ${whole(data.requests.total)} requests, all of the slowest` : "";
    const rows = chosen() ?? slowest();
    const drawn = rows.map(({ request }) => segments(request));
    const longest = Math.max(...drawn.map(({ end }) => end), 1e-9);
    holder.replaceChildren(...rows.map(({ run: name, request }, place) => row(name, request, drawn[place].parts, longest)));
    const scale = document.getElementById("waterfall-scale");
    scale.replaceChildren(...[0, 0.25, 0.5, 0.75, 1].map((part) => element("span", {}, part ? seconds(Number((part * longest).toPrecision(3))) : "arrival")));
  }
  function row(name, request, parts, longest) {
    const bar = element("div", { class: "track" }, ...parts.map(({ kind, from, to, text }) => {
      const part = element("i", { class: `part ${kind}`, style: `left:${(from / longest) * 100}%;width:${Math.max(((to - from) / longest) * 100, 0.08)}%` });
      part.addEventListener("pointermove", (event) => WB.tooltip.show(event.clientX, event.clientY, [`${request.id} in ${name}`, text, `from ${seconds(from)} to ${seconds(to)} after its arrival`]));
      part.addEventListener("pointerleave", WB.tooltip.hide);
      return part;
    }));
    const words = parts.map(({ text }) => text);
    const ended = request.status === "finished" ? "" : `${request.status}, `, lost = request.retractions ? `retracted ${request.retractions}×, ` : "";
    const about = `${ended}${lost}${whole(request.input)} in (${whole(request.cached)} cached), ${whole(request.output)} out`;
    const button = element("button", { type: "button", title: "show it on the timeline", "aria-label": `${request.id} in ${name}: ${words.slice(0, 12).join("; ")}` }, request.id);
    button.addEventListener("click", () => {
      const wanted = {};
      for (const each of data.runs) {
        const there = tables[each].request(request.number);
        if (there) wanted[each] = [there.arrival, there.arrival + segments(there).end];
      }
      WB.timeline?.ranges(wanted);
    });
    return element("li", { "data-request": request.id, "data-run": name, "data-ttft": request.ttft ?? "", "data-e2e": request.e2e ?? "", "data-queue": request.queue ?? "", "data-tpot": request.tpot ?? "" },
      element("div", { class: "who" }, element("i", { class: `swatch run-${data.runs.indexOf(name) % 8}` }), button, element("small", {}, about)),
      element("div", { class: "when" }, element("b", {}, seconds(request.e2e)), element("small", {}, `TTFT ${seconds(request.ttft)}`)), bar);
  }
  run.addEventListener("change", show);
  by.addEventListener("change", () => { search.value = ""; show(); });
  search.addEventListener("input", show);
  const list = document.getElementById("request-ids");
  for (const id of ids.slice(0, 500)) list.append(element("option", { value: id }));
  show();
});
