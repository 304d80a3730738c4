"use strict";
// What all parts of the page share: the data, unpacked; numbers as text; colours of the moment; the tooltip.
const WB = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const MODES = ["prefill", "decode", "mixed"];
  const CAUSES = ["cpu", "kv", "bubble", "none", "other", "peer", "off"];
  const PHASES = ["receive", "schedule", "launch", "process"];
  const LABELS = { cpu: "waiting for the CPU", kv: "out of KV", bubble: "pipeline bubble", none: "no work", other: "other", peer: "for the other side", off: "not in service" };

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const runColour = (place) => css(`--run-${place % 8}`);

  // Numbers ------------------------------------------------------------------------------------------------------------
  const trimmed = (value, digits) => String(Number(value.toPrecision(digits)));
  const seconds = (value) => {
    if (value == null || Number.isNaN(value)) return "–";
    const size = Math.abs(value);
    if (size < 5e-10) return "0 s";
    if (size < 1e-3) return trimmed(value * 1e6, 4) + " µs";
    if (size < 1) return trimmed(value * 1e3, 4) + " ms";
    return trimmed(value, 5) + " s";
  };
  const exact = (value) => `${value.toLocaleString("en", { minimumFractionDigits: 6, maximumFractionDigits: 9 })} s`;
  const share = (value) => (value == null || Number.isNaN(value) ? "–" : trimmed(value * 100, 3) + "%");
  const whole = (value) => value.toLocaleString("en");
  const amount = (value) => {
    if (value == null || Number.isNaN(value)) return "–";
    const size = Math.abs(value);
    if (size >= 1e6) return trimmed(value / 1e6, 4) + " M";
    if (size >= 1e4) return trimmed(value / 1e3, 4) + " k";
    return trimmed(value, 4);
  };

  // Unpacking: see reports/timeline/packed.py -------------------------------------------------------------------------------------
  async function inflate(text) {
    const raw = atob(text);
    const bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }
  async function integers(packed) {
    const bytes = await inflate(packed.data);
    const columns = {};
    let at = 0;
    for (const [name, planes] of packed.columns) {
      const values = new Float64Array(packed.rows);
      let weight = 1;
      for (let plane = 0; plane < planes; plane++, weight *= 256) {
        for (let i = 0; i < packed.rows; i++) values[i] += bytes[at + i] * weight;
        at += packed.rows;
      }
      for (let i = 0; i < packed.rows; i++) values[i] = values[i] % 2 === 0 ? values[i] / 2 : -(values[i] + 1) / 2;
      columns[name] = values;
    }
    return columns;
  }
  async function floats(packed) {
    const bytes = await inflate(packed.data);
    const columns = {};
    const { rows, names } = packed;
    names.forEach((name, place) => {
      const buffer = new Uint8Array(rows * 4);
      for (let plane = 0; plane < 4; plane++) {
        const from = (place * 4 + plane) * rows;
        for (let i = 0; i < rows; i++) buffer[i * 4 + plane] = bytes[from + i];
      }
      const values = new Float32Array(buffer.buffer);
      columns[name] = Array.from(values, (value) => (Number.isNaN(value) ? null : value));
    });
    return columns;
  }
  const text = async (packed) => new TextDecoder().decode(await inflate(packed.data)).split("\n").slice(0, packed.rows);
  const summed = (values) => {
    for (let i = 1; i < values.length; i++) values[i] += values[i - 1];
    return values;
  };

  // The tooltip ------------------------------------------------------------------------------------------------------------
  const tip = document.getElementById("tip");
  const tooltip = {
    show(x, y, lines) {
      tip.replaceChildren(...lines.filter(Boolean).map((line, place) => {
        const element = document.createElement(place ? "div" : "b");
        element.textContent = line;
        return element;
      }));
      tip.hidden = false;
      const box = tip.getBoundingClientRect();
      tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - box.width - 6))}px`;
      tip.style.top = `${y + 18 + box.height > innerHeight ? Math.max(4, y - box.height - 10) : y + 18}px`;
    },
    hide() { tip.hidden = true; },
  };
  addEventListener("scroll", tooltip.hide, { passive: true });

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (name === "style") made.style.cssText = value;
      else made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  }

  // Parts to be drawn again when colours or the width change.
  const redraws = [];
  const redraw = (recoloured) => redraws.forEach((each) => each(recoloured));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw(true));
  matchMedia("print").addEventListener("change", () => redraw(true));
  addEventListener("resize", () => redraw(false));
  addEventListener("beforeprint", () => {
    document.querySelectorAll("details").forEach((details) => { details.open = true; });
    redraw(false);
  });

  const span = { listeners: [], onChange(listener) { this.listeners.push(listener); }, tell(from, to, source) {
    for (const listener of this.listeners) listener(from, to, source);
  } };

  return { data, MODES, CAUSES, PHASES, LABELS, css, runColour, seconds, exact, share, whole, amount, trimmed, inflate, integers, floats,
    text, summed, tooltip, element, redraws, span, parts: [] };
})();
