"use strict";
// Draws the charts of the page from the JSON in #data. Everything else on the page stands without this script.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const drawn = []; // {chart, make, place}: to be made again when the colours change
  const timeCharts = [];
  const HEIGHT = 220;

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const runColour = (place) => css(`--run-${place % 8}`);

  const trimmed = (value, digits) => String(Number(value.toPrecision(digits)));
  const seconds = (value) => {
    if (value == null) return "–";
    const size = Math.abs(value);
    if (size === 0) return "0 s";
    if (size < 1e-3) return trimmed(value * 1e6, 4) + " µs";
    if (size < 1) return trimmed(value * 1e3, 4) + " ms";
    return trimmed(value, 5) + " s";
  };
  const share = (value) => (value == null ? "–" : trimmed(value * 100, 4) + "%");
  const amount = (value) => {
    if (value == null) return "–";
    const size = Math.abs(value);
    if (size >= 1e6) return trimmed(value / 1e6, 4) + " M";
    if (size >= 1e4) return trimmed(value / 1e3, 4) + " k";
    return trimmed(value, 4);
  };
  const timeTick = (value) => (Math.abs(value) >= 1 || value === 0 ? trimmed(value, 7) + " s" : seconds(value));

  function axes(xWrite, yWrite) {
    const common = { stroke: css("--soft"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line"), width: 1, size: 4 },
      font: "11px system-ui, sans-serif" };
    return [
      { ...common, size: 30, space: 70, values: (_, ticks) => ticks.map((tick) => (tick == null ? "" : xWrite(tick))) },
      { ...common, size: 52, values: (_, ticks) => ticks.map((tick) => (tick == null ? "" : yWrite(tick))) },
    ];
  }

  function place(parent, title, unit) {
    const figure = document.createElement("figure");
    figure.className = "chart";
    const caption = figure.appendChild(document.createElement("figcaption"));
    caption.textContent = title + " ";
    caption.appendChild(document.createElement("small")).textContent = unit;
    const body = figure.appendChild(document.createElement("div"));
    document.getElementById(parent).appendChild(figure);
    return body;
  }

  // `options()` is called for every drawing, so that colours are those of the moment.
  function draw(body, options, columns, list) {
    if (columns[0].length < 2 || columns.slice(1).every((column) => column.every((value) => value == null))) {
      body.className = "empty";
      body.textContent = "nothing to draw";
      return;
    }
    const entry = { body, chart: null };
    entry.make = () => {
      const zoom = entry.chart && { min: entry.chart.scales.x.min, max: entry.chart.scales.x.max };
      if (entry.chart) entry.chart.destroy();
      entry.chart = new uPlot({ width: body.clientWidth, height: HEIGHT, ...options() }, columns, body);
      if (zoom) entry.chart.setScale("x", zoom);
    };
    entry.make();
    drawn.push(entry);
    if (list) list.push(entry);
  }

  const lines = (write) => data.runs.map((run, i) => ({
    label: run, stroke: runColour(i), width: 1.6, points: { show: false }, spanGaps: true, value: (_, value) => write(value),
  }));

  function cdf(name, title) {
    const { x, runs } = data.cdfs[name];
    const positive = x.length > 1 && x[0] > 0;
    const log = positive && x[x.length - 1] / x[0] > 30;
    const columns = [x, ...data.runs.map((run) => runs[run])];
    draw(place("cdfs", title, log ? "logarithmic time" : ""), () => ({
      scales: { x: { time: false, distr: log ? 3 : 1, range: (_, min, max) => [min, max] }, y: { range: [0, 1] } },
      axes: axes(seconds, share),
      series: [{ label: "≤", value: (_, value) => seconds(value) }, ...lines(share).map((line) => ({ ...line, paths: uPlot.paths.stepped({ align: 1 }) }))],
    }), columns);
  }

  // One cursor and one x range for all charts over time.
  const sync = uPlot.sync("time");
  let linking = false;
  function link(self, scale) {
    if (scale !== "x" || linking) return;
    linking = true;
    const { min, max } = self.scales.x;
    for (const { chart } of timeCharts) if (chart && chart !== self) chart.setScale("x", { min, max });
    linking = false;
  }
  const timeOptions = (write, series, range) => ({
    scales: { x: { time: false }, y: { range: range || ((_, min, max) => [0, max > 0 ? max * 1.06 : 1]) } },
    axes: axes(timeTick, write),
    cursor: { sync: { key: sync.key, setSeries: false } },
    hooks: { setScale: [link] },
    series: [{ label: "at", value: (_, value) => (value == null ? "–" : timeTick(value)) }, ...series],
  });

  function overTime(name, title, unit, write, range) {
    const columns = [data.time.t, ...data.runs.map((run) => data.time.runs[run]?.[name] ?? [])];
    draw(place("times", title, unit), () => timeOptions(write, lines(write), range), columns, timeCharts);
  }

  // Stacked from the top down: each area is drawn over the one that reaches higher.
  function kinds(run) {
    const series = data.time.runs[run];
    const names = ["mixed", "prefill", "decode"].filter((name) => series?.[name].some((value) => value > 0));
    const sums = names.map((_, i) => data.time.t.map((_, at) => names.slice(i).reduce((sum, name) => sum + series[name][at], 0)));
    draw(place("kinds", run, "share of GPU time"), () => timeOptions(share, names.map((name) => ({
      label: name, stroke: css(`--${name}`), fill: css(`--${name}`), width: 0, points: { show: false },
      value: (_, __, ___, at) => (at == null ? "–" : share(series[name][at])),
    })), [0, 1]), [data.time.t, ...sums], timeCharts);
  }

  cdf("ttft", "TTFT: time to first token");
  cdf("tpot", "TPOT: time per output token");
  cdf("itl", "ITL: gaps between tokens");
  cdf("e2e", "E2E: arrival to finish");
  overTime("running", "Running", "requests", amount);
  overTime("waiting", "Waiting", "requests", amount);
  overTime("decode_tokens", "Decode throughput", "tokens/s", amount);
  overTime("prefill_tokens", "Prefill throughput", "tokens/s", amount);
  overTime("kv", "KV in use", "tokens", amount);
  overTime("busy", "GPU busy", "share of time", share, [0, 1]);
  overTime("batch", "Batch size", "requests a batch", amount);
  overTime("batch_tokens", "Batch tokens", "tokens a batch", amount);
  data.runs.forEach(kinds);

  document.getElementById("reset").addEventListener("click", () => {
    const t = data.time.t;
    for (const { chart } of timeCharts) chart.setScale("x", { min: t[0], max: t[t.length - 1] });
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach((entry) => entry.make()));
  const fit = () => {
    for (const { body, chart } of drawn) if (body.clientWidth && body.clientWidth !== chart.width) chart.setSize({ width: body.clientWidth, height: HEIGHT });
  };
  addEventListener("resize", fit);
  addEventListener("beforeprint", () => { document.querySelectorAll("details").forEach((details) => { details.open = true; }); fit(); });
  window.workbenchCharts = drawn; // for tests and the console
})();
