"use strict";
// Latency distributions and everything over time. The charts over time share their axis, with each other and the timeline.
WB.parts.push(async () => {
  const { data, css, runColour, seconds, share, amount, trimmed, element } = WB;
  const drawn = []; // {body, make, chart}
  const timeCharts = [];
  const HEIGHT = 190;
  // What is counted has an axis of whole numbers.
  const COUNTED = new Set(["requests", "tokens", "requests a batch", "tokens a batch"]);
  const WHOLE = Array.from({ length: 13 }, (_, power) => [1, 2, 5].map((digit) => Number(`${digit}e${power}`))).flat();
  const timeTick = (value) => (Math.abs(value) >= 1 || value === 0 ? trimmed(value, 7) + " s" : seconds(value));

  function axes(xWrite, yWrite) {
    const common = { stroke: css("--soft"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line"), width: 1, size: 4 },
      font: "11px system-ui, sans-serif" };
    return [
      { ...common, size: 28, space: 70, values: (_, ticks) => ticks.map((tick) => (tick == null ? "" : xWrite(tick))) },
      { ...common, size: 50, space: 34, values: (_, ticks) => ticks.map((tick) => (tick == null ? "" : yWrite(tick))) },
    ];
  }

  function place(parent, title, unit) {
    const body = element("div", { tabindex: "0", role: "group", "aria-label": `${title}, ${unit || "chart"}` });
    const caption = element("figcaption", {}, title + " ", element("small", {}, unit));
    document.getElementById(parent).append(element("figure", { class: "chart" }, caption, body));
    return body;
  }

  // `options()` is called for every drawing, so that colours are those of the moment.
  function draw(body, options, columns, list) {
    if (columns[0].length < 2 || columns.slice(1).every((column) => column.every((value) => value == null))) {
      body.className = "empty";
      body.removeAttribute("tabindex");
      body.textContent = "the records hold nothing to draw here";
      return;
    }
    const entry = { body, chart: null };
    entry.make = () => {
      const zoom = entry.chart && { min: entry.chart.scales.x.min, max: entry.chart.scales.x.max };
      if (entry.chart) entry.chart.destroy();
      entry.chart = new uPlot({ width: Math.max(body.clientWidth, 120), height: HEIGHT, ...options() }, columns, body);
      if (zoom) entry.chart.setScale("x", zoom);
    };
    entry.make();
    body.addEventListener("keydown", (event) => keyed(event, entry.chart, columns[0]));
    drawn.push(entry);
    if (list) list.push(entry);
  }

  // Arrows move the cursor, + and - zoom about it, 0 shows everything.
  function keyed(event, chart, x) {
    const { min, max } = chart.scales.x;
    const width = chart.over.clientWidth;
    const left = chart.cursor.left >= 0 ? chart.cursor.left : width / 2;
    const at = chart.posToVal(left, "x");
    const zoom = (factor) => chart.setScale("x", { min: Math.max(x[0], at - (at - min) * factor), max: Math.min(x[x.length - 1], at + (max - at) * factor) });
    const actions = {
      ArrowLeft: () => chart.setCursor({ left: Math.max(0, left - width / 50), top: 20 }),
      ArrowRight: () => chart.setCursor({ left: Math.min(width, left + width / 50), top: 20 }),
      "+": () => zoom(0.5), "=": () => zoom(0.5), "-": () => zoom(2), 0: () => chart.setScale("x", { min: x[0], max: x[x.length - 1] }),
    };
    if (!actions[event.key] || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    actions[event.key]();
  }

  // uPlot's own ticks of a logarithmic axis never end where the axis begins just below a power of ten. These are the 1, 2, 5
  // of every decade, all digits where few decades are shown, and even steps where a zoom shows less than that.
  function logTicks(self, axis, min, max) {
    const digits = Math.log10(max / min) > 1.5 ? [1, 2, 5] : [1, 2, 3, 4, 5, 6, 7, 8, 9];
    const ticks = [];
    for (let exponent = Math.floor(Math.log10(min)); 10 ** exponent <= max; exponent++) {
      for (const digit of digits) ticks.push(Number(`${digit}e${exponent}`));
    }
    const inside = ticks.filter((tick) => tick >= min && tick <= max);
    return inside.length > 1 ? inside : [0.2, 0.4, 0.6, 0.8].map((part) => min + part * (max - min));
  }

  const lines = (write) => data.runs.map((run, i) => ({
    label: run, stroke: runColour(i), width: 1.5, points: { show: false }, spanGaps: true, value: (_, value) => write(value),
    dash: i >= 8 ? [6, 3] : undefined,
  }));

  async function cdf(name, title) {
    const packed = await WB.floats(data.cdfs[name]);
    const x = packed.x;
    const log = x.length > 1 && x[0] > 0 && x[x.length - 1] / x[0] > 30;
    const columns = [x, ...data.runs.map((_, i) => packed[i])];
    const logarithmic = log ? { splits: logTicks, filter: (self, ticks) => ticks } : {};
    draw(place("cdfs", title, log ? "share of requests, logarithmic time" : "share of requests"), () => ({
      scales: { x: { time: false, distr: log ? 3 : 1, range: (_, min, max) => [min, max] }, y: { range: [0, 1] } },
      axes: axes(seconds, share).map((axis, i) => (i ? axis : { ...axis, ...logarithmic })),
      series: [{ label: "≤", value: (_, value) => seconds(value) }, ...lines(share).map((line) => ({ ...line, paths: uPlot.paths.stepped({ align: 1 }) }))],
    }), columns);
  }

  // One cursor and one x range for all charts over time; the stretch that the timeline shows is shaded, per run.
  const sync = uPlot.sync("time");
  let linking = false, shown = [0, 0];
  function link(self, scale) {
    if (scale !== "x" || linking) return;
    linking = true;
    const { min, max } = self.scales.x;
    for (const { chart } of timeCharts) if (chart && chart !== self) chart.setScale("x", { min, max });
    linking = false;
    // uPlot tells of the first drawing too, later: only a change is somebody's zoom.
    const same = Math.abs(min - shown[0]) + Math.abs(max - shown[1]) < (max - min) * 1e-6;
    shown = [min, max];
    if (!same) WB.span.tell(min, max, "charts");
  }
  function shade(self) {
    const views = WB.views?.() || [];
    const { ctx, bbox } = self;
    views.forEach(({ begin, end }, i) => {
      const from = Math.max(self.valToPos(begin, "x", true), bbox.left), to = Math.min(self.valToPos(end, "x", true), bbox.left + bbox.width);
      if (to < from) return;
      ctx.save();
      ctx.fillStyle = runColour(i);
      ctx.globalAlpha = 0.85;
      ctx.fillRect(from, bbox.top + i * 3 * devicePixelRatio, Math.max(to - from, 2 * devicePixelRatio), 2 * devicePixelRatio);
      ctx.restore();
    });
  }
  const timeOptions = (write, series, range, counted) => ({
    scales: { x: { time: false }, y: { range: range || ((_, min, max) => [0, counted ? Math.max(max * 1.06, 1) : max > 0 ? max * 1.06 : 1]) } },
    axes: axes(timeTick, write).map((axis, i) => (i && counted ? { ...axis, incrs: WHOLE } : axis)),
    cursor: { sync: { key: sync.key, setSeries: false } },
    hooks: { setScale: [link], draw: [shade] },
    series: [{ label: "at", value: (_, value) => (value == null ? "–" : timeTick(value)) }, ...series],
  });

  const time = await WB.floats(data.time);
  const t = time.t;
  shown = [t[0], t[t.length - 1]];
  // A run that ended earlier than others has no values after its end.
  const series = (run, name) => (time[`${run}.${name}`] ?? []).map((value, at) => (at > data.time_last[run] ? null : value));

  function overTime(name, title, unit, write, range) {
    const columns = [t, ...data.runs.map((_, i) => series(i, name))];
    draw(place("times", title, unit), () => timeOptions(write, lines(write), range, COUNTED.has(unit)), columns, timeCharts);
  }

  // Stacked from the top down: each area is drawn over the one that reaches higher.
  function stacked(parent, run, title, unit, layers, write, range) {
    const used = layers.map((layer) => ({ ...layer, values: series(run, layer.name) })).filter(({ values }) => values.some((value) => value > 1e-6));
    // Where there is nothing to stack, there is no area either: one from the last value to the next would be made up.
    const sums = used.map((_, i) => t.map((_, at) => (at > data.time_last[run] ? null : used.slice(i).reduce((sum, { values }) => sum + (values[at] ?? 0), 0))));
    draw(place(parent, title, unit), () => timeOptions(write, used.map(({ values, label, colour }) => ({
      label, stroke: css(colour), fill: css(colour), width: 0, points: { show: false }, spanGaps: true,
      value: (_, __, ___, at) => (at == null ? "–" : write(values[at])),
    })), range, COUNTED.has(unit)), [t, ...sums], timeCharts);
  }

  for (const [name, title] of [["ttft", "TTFT: time to first token"], ["tpot", "TPOT: time per output token"],
    ["itl", "ITL: gaps between tokens"], ["e2e", "E2E: arrival to finish"]]) await cdf(name, title);
  overTime("running", "Running", "requests", amount);
  overTime("waiting", "Waiting", "requests", amount);
  overTime("decode_tokens", "Decode throughput", "tokens/s", amount);
  overTime("prefill_tokens", "Prefill throughput", "tokens/s", amount);
  overTime("kv", "KV in use", "tokens", amount);
  overTime("hit_rate", "Cache hit rate", "share of prompt tokens", share, [0, 1]);
  overTime("busy", "GPU busy", "share of time", share, [0, 1]);
  overTime("batch", "Batch size", "requests a batch", amount);
  const kinds = [...WB.CAUSES.slice().reverse().map((name) => ({ name: `idle_${name}`, label: WB.LABELS[name], colour: `--idle-${name}` })),
    ...["mixed", "prefill", "decode"].map((name) => ({ name, label: name, colour: `--${name}` }))];
  const composition = [{ name: "batch_prefill", label: "prefill", colour: "--prefill" }, { name: "batch_decode", label: "decode", colour: "--decode" }];
  data.runs.forEach((run, i) => {
    stacked("kinds", i, run, "GPU time by kind and cause of idling", kinds, share, [0, 1]);
    stacked("composition", i, run, "tokens a batch", composition, amount);
  });

  document.getElementById("reset").addEventListener("click", () => {
    const first = timeCharts[0]?.chart;
    if (first) first.setScale("x", { min: t[0], max: t[t.length - 1] });
  });
  WB.redraws.push((recoloured) => {
    for (const entry of drawn) {
      if (recoloured) entry.make();
      else if (entry.body.clientWidth && entry.body.clientWidth !== entry.chart.width) entry.chart.setSize({ width: entry.body.clientWidth, height: HEIGHT });
    }
  });
  let due = 0;
  WB.span.onChange((from, to, source) => {
    if (source !== "timeline") return;
    clearTimeout(due);
    due = setTimeout(() => { for (const { chart } of timeCharts) chart.redraw(false, false); }, 90);
  });
  window.workbenchCharts = drawn; // for tests and the console
});
