"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { axes, metrics, rows } = data, [telling, second] = data.telling;
  if (!document.getElementById("pareto")) return;
  const SVG = "http://www.w3.org/2000/svg";
  const metricOf = Object.fromEntries(metrics.map((m, i) => [m.name, { ...m, at: i }]));
  const axisOf = Object.fromEntries(axes.map((a, i) => [a.name, { ...a, at: i }]));
  const state = { picked: null, brushes: {}, sort: null, down: true, all: false };

  // ---- numbers as text ------------------------------------------------------------------------------------------
  const value = (row, name) => (name in metricOf ? row.m[metricOf[name].at] : row.s[axisOf[name].at]);
  const said = (v) => (v === null ? "none" : String(v));
  function written(v, unit) {
    if (v === null || v === undefined) return "-";
    const size = Math.abs(v);
    const digits = (n) => n.toLocaleString("en", { maximumFractionDigits: n === Math.trunc(n) || Math.abs(n) >= 1000 ? 0 : Math.abs(n) < 10 ? 2 : 1 });
    if (unit === "s") return size >= 1 ? `${digits(v)} s` : size >= 1e-3 ? `${digits(v * 1e3)} ms` : size ? `${digits(v * 1e6)} µs` : "0 s";
    if (unit === "%") return `${(v * 100).toFixed(1)}%`;
    return `${digits(v)} ${unit}`.trim();
  }
  const text = (name, v) => (name in metricOf ? written(v, metricOf[name].unit) : typeof v === "number" ? written(v, "") : said(v));
  const label = (name) => (name in metricOf ? metricOf[name].label : name);
  const visible = (row) => Object.entries(state.brushes).every(([name, [low, high]]) => {
    const p = place(name)(row);
    return p !== null && p >= low && p <= high;
  });

  // ---- scales ---------------------------------------------------------------------------------------------------
  const RAMP = [[68, 1, 84], [65, 68, 135], [42, 120, 142], [34, 168, 132], [122, 209, 81], [253, 231, 37]];
  function ramp(t) {
    const at = Math.min(Math.max(t, 0), 1) * (RAMP.length - 1), i = Math.min(Math.floor(at), RAMP.length - 2);
    return RAMP[i].map((c, k) => Math.round(c + (RAMP[i + 1][k] - c) * (at - i)));
  }
  const rgb = (c) => `rgb(${c})`;
  const inkOn = ([r, g, b]) => (0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#111" : "#fff");
  function extent(name, among = rows) {
    const known = among.map((r) => value(r, name)).filter((v) => v !== null);
    return [Math.min(...known), Math.max(...known)];
  }
  // Where on its axis (0 to 1) a row lies: settings of a list stand in its order, numbers to scale.
  const places = {};
  function place(name) {
    if (places[name]) return places[name];
    const axis = axisOf[name];
    if (axis && axis.values) {
      const order = new Map(axis.values.map((v, i) => [said(v), axis.values.length > 1 ? i / (axis.values.length - 1) : 0.5]));
      return (places[name] = (row) => order.get(said(value(row, name))) ?? null);
    }
    const [low, high] = extent(name), log = axis && axis.log;
    const f = log ? Math.log : (v) => v;
    return (places[name] = (row) => {
      const v = value(row, name);
      return v === null ? null : high > low ? (f(v) - f(low)) / (f(high) - f(low)) : 0.5;
    });
  }
  function ticks(low, high, log, count) {
    if (!(high > low)) return [low];
    if (log) {
      const found = [];
      for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++)
        for (const k of [1, 2, 5]) found.push(k * 10 ** p);
      const inside = found.filter((v) => v >= low && v <= high);
      return inside.length > count ? inside.filter((v) => String(v).replace(/[^1-9]/g, "").startsWith("1")) : inside.length ? inside : [low, high];
    }
    const raw = (high - low) / count, base = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((k) => k * base).find((s) => s >= raw);
    const found = [];
    for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-9; v += step) found.push(Math.abs(v) < step * 1e-9 ? 0 : v);
    return found;
  }
  // A colour for every row, and the legend that explains it.
  function colouring(name, legend) {
    legend.replaceChildren();
    const distinct = [...new Set(rows.map((r) => said(value(r, name))))];
    const axis = axisOf[name];
    if (axis && distinct.length <= 8) {
      const order = axis.values ? axis.values.map(said).filter((v) => distinct.includes(v)) : distinct.sort((a, b) => a - b);
      for (const [i, v] of order.entries()) {
        const item = legend.appendChild(document.createElement("span"));
        const dot = item.appendChild(document.createElement("i"));
        dot.className = "swatch";
        dot.style.background = `var(--c${i})`;
        item.append(`${name} ${v}`);
      }
      return (row) => `var(--c${order.indexOf(said(value(row, name)))})`;
    }
    const p = place(name);
    if (axis && axis.values) rampLegend(legend, said(axis.values[0]), said(axis.values.at(-1)), name);
    else rampLegend(legend, ...extent(name).map((v) => text(name, v)), label(name));
    return (row) => { const at = p(row); return at === null ? "var(--faint)" : rgb(ramp(at)); };
  }
  function rampLegend(legend, low, high, what, better) {
    const bar = document.createElement("i");
    bar.className = "ramp";
    bar.style.background = `linear-gradient(90deg, ${[0, 0.2, 0.4, 0.6, 0.8, 1].map((t) => rgb(ramp(t)))})`;
    const said_ = (t) => Object.assign(document.createElement("span"), { textContent: t });
    legend.append(said_(what), said_(low), bar, said_(high), said_(better || ""));
  }

  // ---- drawing --------------------------------------------------------------------------------------------------
  function draw(parent, tag, attributes, content) {
    const node = parent.appendChild(document.createElementNS(SVG, tag));
    for (const [k, v] of Object.entries(attributes)) node.setAttribute(k, v);
    if (content !== undefined) node.textContent = content;
    return node;
  }
  function canvas(id, height, least = 0) {
    const figure = document.querySelector(`#${id} .chart`);
    figure.replaceChildren();
    figure.style.minWidth = least ? `${least}px` : "";
    const width = Math.max(figure.clientWidth, least, 280);
    const svg = draw(figure, "svg", { viewBox: `0 0 ${width} ${height}`, height });
    return { svg, width, height, small: width < 560 };
  }
  const tip = document.getElementById("tip");
  function hover(node, lines) {
    node.addEventListener("pointermove", (event) => {
      tip.textContent = typeof lines === "function" ? lines() : lines;
      tip.hidden = false;
      const box = tip.getBoundingClientRect();
      tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 6))}px`;
      tip.style.top = `${event.clientY + 16 + box.height > innerHeight ? event.clientY - box.height - 10 : event.clientY + 16}px`;
    });
    node.addEventListener("pointerleave", () => { tip.hidden = true; });
  }
  const describe = (row, extra = []) => [
    `point ${row.point}`, ...axes.map((a) => `${a.name} ${said(value(row, a.name))}`),
    ...[...new Set([...extra, ...data.objectives])].filter((n) => n in metricOf).map((n) => `${label(n)} ${text(n, value(row, n))}`),
  ].join("\n");

  // ---- choices --------------------------------------------------------------------------------------------------
  const redraws = {};
  function choice(id, title, options, chosen) {
    const holder = document.querySelector(`[data-for="${id}"]`);
    const wrap = holder.appendChild(document.createElement("label"));
    wrap.append(title);
    const select = wrap.appendChild(document.createElement("select"));
    for (const [v, shown] of options) {
      const option = select.appendChild(document.createElement("option"));
      option.value = v;
      option.textContent = shown;
    }
    select.value = chosen;
    select.addEventListener("change", () => redraws[id]());
    return select;
  }
  function tick(id, title, checked) {
    const wrap = document.querySelector(`[data-for="${id}"]`).appendChild(document.createElement("label"));
    wrap.className = "tick";
    const box = wrap.appendChild(document.createElement("input"));
    box.type = "checkbox";
    box.checked = checked;
    wrap.append(title);
    box.addEventListener("change", () => redraws[id]());
    return box;
  }
  const metricOptions = metrics.map((m) => [m.name, m.label]);
  const axisOptions = axes.map((a) => [a.name, a.name]);
  const first = (...names) => names.find((n) => n in metricOf) || metrics[0].name;
  const minimised = data.objectives.find((n) => n in metricOf && metricOf[n].better === "lower");
  const maximised = data.objectives.find((n) => n in metricOf && metricOf[n].better === "higher");

  // ---- Pareto ---------------------------------------------------------------------------------------------------
  const px = choice("pareto", "across", metricOptions, first(minimised, "ttft_p99_s"));
  const py = choice("pareto", "up", metricOptions, first(maximised, "output_throughput_per_gpu"));
  const pc = choice("pareto", "colour", [...axisOptions, ...metricOptions], telling);
  const [tightest, widest] = extent(px.value);
  const logX = tick("pareto", "logarithmic across", tightest > 0 && widest / tightest > 30);
  function front(nx, ny) {
    const sign = (n) => (metricOf[n].better === "higher" ? -1 : 1);
    const known = rows.filter((r) => value(r, nx) !== null && value(r, ny) !== null);
    known.sort((a, b) => sign(nx) * (value(a, nx) - value(b, nx)) || sign(ny) * (value(a, ny) - value(b, ny)));
    const kept = [];
    let best = Infinity;
    for (const row of known) {
      const loss = sign(ny) * value(row, ny);
      if (loss < best) { kept.push(row); best = loss; }
    }
    return kept;
  }
  redraws.pareto = () => {
    const { svg, width, height, small } = canvas("pareto", 400);
    const nx = px.value, ny = py.value, paint = colouring(pc.value, document.querySelector("#pareto .legend"));
    const known = rows.filter((r) => value(r, nx) !== null && value(r, ny) !== null);
    const box = { left: small ? 58 : 78, right: width - 14, top: 24, bottom: height - 42 };
    let [lx, hx] = extent(nx, known), [ly, hy] = extent(ny, known);
    const log = logX.checked && lx > 0;
    const pad = (l, h) => (h > l ? (h - l) * 0.05 : Math.abs(h) * 0.1 || 1);
    if (log) { const f = Math.max((hx / lx) ** 0.05, 1.02); lx /= f; hx *= f; } else { const p = pad(lx, hx); lx = lx >= 0 ? Math.max(lx - p, 0) : lx - p; hx += p; }
    const py_ = pad(ly, hy); ly = ly >= 0 ? Math.max(ly - py_, 0) : ly - py_; hy += py_;
    const g = log ? Math.log : (v) => v;
    const X = (v) => box.left + ((g(v) - g(lx)) / (g(hx) - g(lx))) * (box.right - box.left);
    const Y = (v) => box.bottom - ((v - ly) / (hy - ly)) * (box.bottom - box.top);
    for (const v of ticks(lx, hx, log, small ? 4 : 7)) {
      draw(svg, "line", { class: "axis", x1: X(v), x2: X(v), y1: box.top, y2: box.bottom });
      draw(svg, "text", { x: X(v), y: box.bottom + 16, "text-anchor": "middle" }, text(nx, v));
    }
    for (const v of ticks(ly, hy, false, 6)) {
      draw(svg, "line", { class: "axis", x1: box.left, x2: box.right, y1: Y(v), y2: Y(v) });
      draw(svg, "text", { x: box.left - 6, y: Y(v) + 4, "text-anchor": "end" }, text(ny, v).replace(/ (tok|req)\/s$/, ""));
    }
    draw(svg, "text", { class: "label", x: box.right, y: height - 6, "text-anchor": "end" }, `${label(nx)}${arrow(nx, "←", "→")}`);
    draw(svg, "text", { class: "label", x: 2, y: 12 }, `${label(ny)}${unitOf(ny)}${arrow(ny, "↓", "↑")}`);
    const line = front(nx, ny);
    if (line.length > 1) draw(svg, "polyline", { class: "front", points: line.map((r) => `${X(value(r, nx))},${Y(value(r, ny))}`).join(" ") });
    const best = new Set(line);
    for (const row of [...known].sort((a, b) => best.has(a) - best.has(b))) {
      const off = visible(row) ? "" : " off", picked = row.point === state.picked ? " picked" : "";
      const dot = draw(svg, "circle", { class: `dot${off}${picked}`, cx: X(value(row, nx)), cy: Y(value(row, ny)), r: best.has(row) ? 6.5 : 4.5 });
      dot.style.fill = paint(row);
      hover(dot, () => describe(row, [nx, ny]));
      dot.addEventListener("click", () => pick(row.point));
    }
  };
  const unitOf = (n) => (metricOf[n].unit === "tok/s" || metricOf[n].unit === "req/s" ? ` (${metricOf[n].unit})` : "");
  const arrow = (n, low, high) => ({ higher: `  better ${high}`, lower: `  better ${low}` }[metricOf[n].better] || "");

  // ---- heat map -------------------------------------------------------------------------------------------------
  const hm = choice("heat", "metric", metricOptions, first(maximised, "output_throughput_per_gpu"));
  const hx = choice("heat", "across", axisOptions, telling);
  const hy = choice("heat", "down", axes.length > 1 ? axisOptions : [["", "(one setting)"], ...axisOptions], second || "");
  const hw = choice("heat", "several runs in a cell", [["best", "the best"], ["mean", "their mean"], ["worst", "the worst"]], "best");
  const BINS = 8;
  // The columns of a setting: its values, or bins of a range.
  function bins(name) {
    if (!name) return { labels: [""], of: () => 0 };
    const axis = axisOf[name], present = [...new Set(rows.map((r) => said(value(r, name))))];
    if (axis.values) {
      const order = axis.values.map(said).filter((v) => present.includes(v));
      return { labels: order, of: (r) => order.indexOf(said(value(r, name))) };
    }
    if (present.length <= 12) {
      const order = present.map(Number).sort((a, b) => a - b).map(said);
      return { labels: order, of: (r) => order.indexOf(said(value(r, name))) };
    }
    const p = place(name), [low, high] = extent(name), log = axis.log;
    const edge = (t) => (log ? low * (high / low) ** t : low + (high - low) * t);
    const labels = Array.from({ length: BINS }, (_, i) => `${written(edge(i / BINS), "")}–${written(edge((i + 1) / BINS), "")}`);
    return { labels, of: (r) => Math.min(Math.floor(p(r) * BINS), BINS - 1) };
  }
  redraws.heat = () => {
    const across = bins(hx.value), down = bins(hy.value === hx.value ? "" : hy.value), name = hm.value;
    const better = metricOf[name].better;
    const cells = new Map();
    for (const row of rows) {
      if (value(row, name) === null || !visible(row)) continue;
      const key = `${across.of(row)},${down.of(row)}`;
      if (!cells.has(key)) cells.set(key, []);
      cells.get(key).push(row);
    }
    const sign = better === "lower" ? 1 : -1;
    const summed = new Map();
    for (const [key, members] of cells) {
      members.sort((a, b) => sign * (value(a, name) - value(b, name)));
      const v = hw.value === "mean" ? members.reduce((s, r) => s + value(r, name), 0) / members.length : value(hw.value === "best" ? members[0] : members.at(-1), name);
      summed.set(key, v);
    }
    const low = Math.min(...summed.values()), high = Math.max(...summed.values());
    const rowHeight = 38, longest = Math.max(...down.labels.map((l) => l.length), hy.value.length);
    const { svg, width, small } = canvas("heat", 44 + down.labels.length * rowHeight + 26);
    const left = Math.min(longest * (small ? 6.2 : 7.2) + 14, width * 0.34), cell = (width - left - 4) / across.labels.length;
    draw(svg, "text", { class: "label", x: left, y: 12 }, `${hx.value} →`);
    if (hy.value && hy.value !== hx.value) draw(svg, "text", { class: "label", x: left - 8, y: 34, "text-anchor": "end" }, `${hy.value} ↓`);
    const fit = (s) => (s.length * (small ? 6 : 6.8) > cell - 4 ? `${s.slice(0, Math.max(Math.floor((cell - 4) / 6.8) - 1, 1))}…` : s);
    across.labels.forEach((l, i) => { const t = draw(svg, "text", { x: left + cell * (i + 0.5), y: 34, "text-anchor": "middle" }, fit(l)); draw(t, "title", {}, l); });
    down.labels.forEach((l, j) => {
      if (l) draw(svg, "text", { x: left - 8, y: 44 + rowHeight * (j + 0.5) + 4, "text-anchor": "end" }, l.length * 7 > left ? `${l.slice(0, Math.floor(left / 7) - 2)}…` : l);
      across.labels.forEach((_, i) => {
        const key = `${i},${j}`, at = { x: left + cell * i, y: 44 + rowHeight * j, width: cell, height: rowHeight, rx: 4 };
        if (!summed.has(key)) { hover(draw(svg, "rect", { class: "hole", ...at }), "no finished run here"); return; }
        const v = summed.get(key), t = high > low ? (v - low) / (high - low) : 0.5, colour = ramp(better === "lower" ? 1 - t : t);
        const rect = draw(svg, "rect", { class: "cell", ...at, fill: rgb(colour) });
        const members = cells.get(key), best = members[0];
        hover(rect, () => `${label(name)} ${text(name, v)}${members.length > 1 ? `\n${hw.value} of ${members.length} runs; the best of them:` : ""}\n${describe(best, [name])}`);
        rect.addEventListener("click", () => pick(best.point));
        const shown = text(name, v).replace(/ (tok|req)\/s$/, "");
        if (shown.length * 6.8 < cell) {
          const t = draw(svg, "text", { x: at.x + cell / 2, y: at.y + rowHeight / 2 + 4, "text-anchor": "middle", fill: inkOn(colour) }, shown);
          t.style.pointerEvents = "none";
        }
      });
    });
    const legend = document.querySelector("#heat .legend");
    legend.replaceChildren();
    if (summed.size) {
      const ends = better === "lower" ? [high, low] : [low, high];
      rampLegend(legend, ...ends.map((v) => text(name, v)), label(name), better === "neither" ? "" : "(bright is better)");
    }
  };

  // ---- parallel coordinates -------------------------------------------------------------------------------------
  const cc = choice("parallel", "colour", [...metricOptions, ...axisOptions], first(maximised, "output_throughput_per_gpu"));
  const wanted = [...new Set([...data.objectives, "output_throughput_per_gpu", "ttft_p99_s", "tpot_p99_s", "cost_per_million_output_tokens"])];
  const lanes = [...axes.map((a) => a.name), ...wanted.filter((n) => n in metricOf && extent(n)[0] < extent(n)[1]).slice(0, 4)];
  const clear = document.querySelector('[data-for="parallel"]').appendChild(document.createElement("button"));
  clear.type = "button";
  clear.textContent = "free all axes";
  clear.addEventListener("click", () => { state.brushes = {}; redrawAll(); });
  redraws.parallel = () => {
    const { svg, width, height } = canvas("parallel", 340, lanes.length * 92 + 20);
    const top = 46, bottom = height - 22, X = (i) => 46 + (i * (width - 92)) / Math.max(lanes.length - 1, 1);
    const Y = (t) => bottom - t * (bottom - top), paint = colouring(cc.value, document.querySelector("#parallel .legend"));
    const edge = (i) => (i === lanes.length - 1 ? [-5, "end"] : [5, "start"]);
    const order = [...rows].sort((a, b) => visible(a) - visible(b) || (a.point === state.picked) - (b.point === state.picked));
    for (const row of order) {
      const spots = lanes.map((n, i) => [X(i), place(n)(row)]).filter(([, t]) => t !== null).map(([x, t]) => `${x},${Y(t)}`);
      const wire = draw(svg, "polyline", { class: `wire${visible(row) ? "" : " off"}${row.point === state.picked ? " picked" : ""}`, points: spots.join(" ") });
      wire.style.stroke = paint(row);
      hover(wire, () => describe(row));
      wire.addEventListener("click", () => pick(row.point));
    }
    lanes.forEach((name, i) => {
      const x = X(i), axis = axisOf[name];
      draw(svg, "line", { class: "axis", x1: x, x2: x, y1: top, y2: bottom, style: "stroke: var(--faint)" });
      const words = label(name).split(" "), half = label(name).length > 14 ? Math.ceil(words.length / 2) : words.length;
      [words.slice(0, half), words.slice(half)].forEach((line, k) => draw(svg, "text", { class: "label", x, y: 12 + k * 14, "text-anchor": "middle" }, line.join(" ")));
      const marks = axis && axis.values ? axis.values.map((v, k) => [said(v), axis.values.length > 1 ? k / (axis.values.length - 1) : 0.5])
        : extent(name).map((v, k) => [text(name, v), k]);
      for (const [shown, t] of marks) {
        const label_ = draw(svg, "text", { x: x + edge(i)[0], y: Y(t) + (t === 0 ? 14 : -4), "text-anchor": edge(i)[1] }, shown.length > 13 ? `${shown.slice(0, 12)}…` : shown);
        label_.style.cssText = "paint-order: stroke; stroke: var(--paper); stroke-width: 3px; pointer-events: none";
      }
      const brush = state.brushes[name];
      if (brush) draw(svg, "rect", { class: "brush", x: x - 8, width: 16, y: Y(brush[1]), height: Math.max(Y(brush[0]) - Y(brush[1]), 3) });
      const grip = draw(svg, "rect", { class: "grip", x: x - 12, width: 24, y: top - 8, height: bottom - top + 16 });
      grip.addEventListener("pointerdown", (down) => {
        const at = (event) => { const box = svg.getBoundingClientRect(); return (bottom - (event.clientY - box.top)) / (bottom - top); };
        const from = at(down);
        let to = from;
        grip.setPointerCapture(down.pointerId);
        grip.addEventListener("pointermove", (event) => {
          to = at(event);
          state.brushes[name] = [Math.min(from, to) - 1e-9, Math.max(from, to) + 1e-9];
          svg.querySelector(".making")?.remove();
          draw(svg, "rect", { class: "brush making", x: x - 8, width: 16, y: Y(Math.max(from, to)), height: Math.abs(from - to) * (bottom - top) });
        });
        grip.addEventListener("pointerup", () => { if (Math.abs(from - to) < 0.012) delete state.brushes[name]; redrawAll(); }, { once: true });
      });
    });
  };

  // ---- table ----------------------------------------------------------------------------------------------------
  const shownMetrics = data.table.filter((n) => n in metricOf);
  const every = tick("runs", "all metrics", false);
  const counted = document.querySelector('[data-for="runs"]').appendChild(document.createElement("span"));
  const start = maximised || minimised || metrics[0].name;
  state.sort = start;
  state.down = metricOf[start].better === "higher";
  redraws.runs = () => {
    const columns = ["point", ...axes.map((a) => a.name), ...(every.checked ? metrics.map((m) => m.name) : shownMetrics)];
    const isText = (n) => n in axisOf && axisOf[n].values && axisOf[n].values.some((v) => typeof v !== "number");
    const key = (row) => (state.sort === "point" ? row.point : isText(state.sort) ? said(value(row, state.sort)) : value(row, state.sort));
    const listed = rows.filter(visible).sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === null || y === null) return (x === null) - (y === null);
      return (state.down ? -1 : 1) * (x < y ? -1 : x > y ? 1 : 0) || a.point - b.point;
    });
    const head = document.createElement("tr");
    for (const name of columns) {
      const th = head.appendChild(document.createElement("th"));
      th.scope = "col";
      th.dataset.column = name;
      if (isText(name)) th.className = "text";
      if (state.sort === name) th.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      const button = th.appendChild(document.createElement("button"));
      button.type = "button";
      button.textContent = name === "point" ? "point" : label(name);
      button.addEventListener("click", () => {
        state.down = state.sort === name ? !state.down : name in metricOf && metricOf[name].better === "higher";
        state.sort = name;
        redraws.runs();
        document.querySelector(`#runs th[data-column="${name}"] button`).focus();
      });
    }
    document.querySelector("#runs thead").replaceChildren(head);
    const bests = {};
    for (const m of metrics) if (m.better !== "neither") { const [l, h] = extent(m.name); if (l < h) bests[m.name] = m.better === "higher" ? h : l; }
    const body = document.createDocumentFragment();
    for (const row of listed) {
      const tr = body.appendChild(document.createElement("tr"));
      tr.dataset.point = row.point;
      if (row.point === state.picked) tr.className = "picked";
      for (const name of columns) {
        const td = tr.appendChild(document.createElement("td"));
        const v = name === "point" ? row.point : value(row, name);
        td.textContent = name === "point" ? v : name in metricOf ? text(name, v) : said(v);
        if (isText(name)) td.className = "text";
        if (name in bests && v === bests[name]) td.className = "best";
      }
      tr.addEventListener("click", () => pick(row.point));
    }
    document.querySelector("#runs tbody").replaceChildren(body);
    counted.textContent = listed.length === rows.length ? `${rows.length} runs` : `${listed.length} of ${rows.length} runs (axes are brushed)`;
  };
  function pick(point) {
    state.picked = state.picked === point ? null : point;
    const holder = document.getElementById("picked");
    holder.replaceChildren();
    const row = rows.find((r) => r.point === state.picked);
    if (row) {
      const card = holder.appendChild(document.createElement("div"));
      card.className = "card";
      card.appendChild(document.createElement("h3")).textContent = `Point ${row.point}: ${axes.map((a) => `${a.name} ${said(value(row, a.name))}`).join(", ")}`;
      card.appendChild(document.createElement("p")).textContent = shownMetrics.map((n) => `${label(n)} ${text(n, value(row, n))}`).join(" · ");
      card.append("This command makes the run, with a report of its own:");
      card.appendChild(document.createElement("pre")).textContent = row.command;
    }
    redrawAll();
  }

  function redrawAll() { tip.hidden = true; for (const redraw of Object.values(redraws)) redraw(); }
  let seen = 0;
  new ResizeObserver(() => { if (document.body.clientWidth !== seen) { seen = document.body.clientWidth; redrawAll(); } }).observe(document.body);
  redrawAll();
})();
