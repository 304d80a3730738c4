"use strict";
// The timeline: what the CPU and every GPU stage did, to scale, from the whole run to microseconds.
WB.parts.push(async () => {
  const { data, css, runColour, seconds, share, whole, MODES, CAUSES, PHASES, LABELS, element } = WB;
  const holder = document.getElementById("lanes");
  if (!holder) return;
  const ALL = -1, LANES_TOGETHER = 12, KV_ROW = 5;
  const RULER = 18, CPU_HEIGHT = 18, GPU_HEIGHT = 26, GAP = 3, STRIP = 12, BLOCK = 256;
  const IDLE = 3, LEFT_OUT_CAUSE = 7, LEFT_OUT = IDLE + CAUSES.length, KINDS = LEFT_OUT + 1;
  const GPU_ORDER = [1, 0, 2, ...CAUSES.map((_, cause) => IDLE + cause)];
  const SHORTEST_S = 2e-6;

  // Data: see reports/timeline/detail.py ------------------------------------------------------------------------------------------
  async function unpack(packed, stages) {
    const column = await WB.integers(packed);
    const rows = packed.rows, tick = packed.tick_s, lag = packed.lag;
    const { summed } = WB;
    const made = { rows, whole: packed.whole, instance: packed.instance, of: packed.of ?? rows, tick };
    made.iteration = summed(column.iteration);
    for (const name of ["receive", "schedule", "launch", "process", "requests", "waiting", "running"]) made[name] = summed(column[name]);
    made.mode = column.mode;
    made.prefill_tokens = column.prefill_tokens;
    made.decode_tokens = column.decode_tokens.map((left, i) => made.requests[i] - left);
    for (const name of ["context_tokens", "kv_used_tokens"]) made[name] = summed(column[name].map((left, i) => left + made.decode_tokens[i]));
    made.start = [];
    made.end = [];
    made.cause = [];
    made.split = [];
    let before = null;
    for (let stage = 0; stage < stages; stage++) {
      const start = column[`start${stage}`], lasts = summed(column[`lasts${stage}`]), end = new Float64Array(rows);
      for (let i = 0; i < rows; i++) {
        const free = i ? end[i - 1] : 0;
        start[i] += before ? Math.max(free, made.end[stage - 1][i]) : free;
        if (before) lasts[i] += before[i];
        end[i] = start[i] + lasts[i];
      }
      made.start.push(start);
      made.end.push(end);
      made.cause.push(column[`cause${stage}`]);
      made.split.push(column[`split${stage}`]);
      before = lasts;
    }
    made.host = column.host;
    made.processed = column.processed;
    for (let i = 0; i < rows; i++) {
      let ready = made.end[0][i];
      for (const end of made.end) if (end[i] > ready) ready = end[i];
      made.processed[i] += ready;
      if (i >= lag) made.host[i] += made.processed[i - lag] + made.process[i - lag];
    }
    for (const values of [made.host, made.processed, made.receive, made.schedule, made.launch, made.process, ...made.start, ...made.end, ...made.split])
      for (let i = 0; i < rows; i++) values[i] *= tick;
    if (packed.shares) made.shares = await WB.inflate(packed.shares);
    made.bins = packed.bins;
    return made;
  }

  // A lane is disjoint bars in order: begin, end, kind, row. Sums over blocks of them make any stretch quick to sum up.
  function lane(size, kinds) {
    const bars = { begin: new Float64Array(size), end: new Float64Array(size), kind: new Uint8Array(size), row: new Uint32Array(size), length: 0, kinds };
    bars.add = (begin, end, kind, row) => {
      if (end <= begin) return;
      const at = bars.length++;
      bars.begin[at] = begin; bars.end[at] = end; bars.kind[at] = kind; bars.row[at] = row;
    };
    return bars;
  }
  function close(bars) {
    bars.sums = new Float64Array(Math.ceil(bars.length / BLOCK) * bars.kinds);
    for (let i = 0; i < bars.length; i++) bars.sums[Math.floor(i / BLOCK) * bars.kinds + bars.kind[i]] += bars.end[i] - bars.begin[i];
    return bars;
  }
  function gpuLane(made, stage) {
    const bars = lane(made.rows * 3, KINDS);
    const { start, end, cause, split } = { start: made.start[stage], end: made.end[stage], cause: made.cause[stage], split: made.split[stage] };
    for (let i = 0; i < made.rows; i++) {
      const from = i ? end[i - 1] : start[i], first = cause[i] % 8, then = Math.floor(cause[i] / 8);
      if (first === LEFT_OUT_CAUSE) bars.add(from, start[i], LEFT_OUT, i);
      else if (first === then || !split[i]) bars.add(from, start[i], IDLE + then, i);
      else {
        const middle = Math.min(from + split[i], start[i]);
        bars.add(from, middle, IDLE + first, i);
        bars.add(middle, start[i], IDLE + then, i);
      }
      bars.add(Math.max(start[i], from), end[i], made.mode[i], i);
    }
    return close(bars);
  }
  function cpuLane(made) {
    const bars = lane(made.rows * 4, PHASES.length);
    let free = -Infinity, done = 0;
    const process = () => {
      const end = made.processed[done] + made.process[done];
      bars.add(Math.max(made.processed[done], free), end, 3, done);
      free = Math.max(free, end);
      done++;
    };
    for (let i = 0; i < made.rows; i++) {
      const received = made.host[i] + made.receive[i], scheduled = received + made.schedule[i], launched = scheduled + made.launch[i];
      while (done < i && made.processed[done] < received - made.tick) process();
      bars.add(Math.max(made.host[i], free), received, 0, i);
      bars.add(Math.max(received, free), scheduled, 1, i);
      bars.add(scheduled, launched, 2, i);
      free = Math.max(free, launched);
    }
    while (done < made.rows) process();
    return close(bars);
  }

  // The first bar that ends after a moment.
  function after(bars, at) {
    let low = 0, high = bars.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (bars.end[middle] > at) high = middle;
      else low = middle + 1;
    }
    return low;
  }
  // Seconds of each kind from one moment to another, added to `found`.
  function sums(bars, from, to, found) {
    let i = after(bars, from);
    while (i < bars.length && bars.begin[i] < to) {
      if (i % BLOCK === 0 && i + BLOCK <= bars.length && bars.begin[i] >= from && bars.end[i + BLOCK - 1] <= to) {
        const at = (i / BLOCK) * bars.kinds;
        for (let kind = 0; kind < bars.kinds; kind++) found[kind] += bars.sums[at + kind];
        i += BLOCK;
        continue;
      }
      found[bars.kind[i]] += Math.min(bars.end[i], to) - Math.max(bars.begin[i], from);
      i++;
    }
  }
  function binSums(run, each, from, to, found) {
    const { bin: place, kinds } = each, { shares, bins } = each.made;
    const width = (run.end - run.begin) / bins;
    const first = Math.max(0, Math.floor((from - run.begin) / width)), last = Math.min(bins - 1, Math.floor((to - run.begin) / width));
    for (let bin = first; bin <= last; bin++) {
      const inside = Math.min(to, run.begin + (bin + 1) * width) - Math.max(from, run.begin + bin * width);
      for (let kind = 0; kind < kinds; kind++) found[kind] += (shares[(place + kind) * bins + bin] / 255) * Math.max(inside, 0);
    }
  }

  async function unpackTransfers(packed) {
    const { begin, lasts, row, source, target, tokens } = await WB.integers(packed);
    WB.summed(begin);
    for (let i = 0; i < packed.rows; i++) { begin[i] *= packed.tick_s; lasts[i] *= packed.tick_s; }
    const rows = Math.max(...row) + 1, longest = Math.max(...lasts);
    return { label: "KV", transfers: true, height: rows * KV_ROW + 2, begin, lasts, row, source, target, tokens, longest, length: packed.rows, of: packed.of, ids: await WB.text(packed.ids) };
  }
  // The first transfer that may reach beyond a moment: they are in order of their beginning.
  function transferAfter({ begin, longest, length }, at) {
    let low = 0, high = length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (begin[middle] > at - longest) high = middle;
      else low = middle + 1;
    }
    return Math.max(low - 1, 0);
  }

  // Runs ------------------------------------------------------------------------------------------------------------------
  const runs = [];
  for (const [place, name] of data.runs.entries()) {
    const detail = data.timeline[name];
    if (!detail) continue;
    const run = { place, name, begin: detail.begin_s, end: detail.end_s, busiest: data.busiest[name], instances: detail.instances };
    const lanesOf = async (place) => {
      const instance = run.instances[place], made = (instance.made ??= await unpack(instance, instance.stages));
      return (made.lanes ??= [
        { label: "CPU", cpu: true, height: CPU_HEIGHT, bars: cpuLane(made), bin: 0, kinds: 4, made },
        ...made.start.map((_, stage) => ({ label: made.start.length > 1 ? `GPU ${stage}` : "GPU", height: GPU_HEIGHT, bars: gpuLane(made, stage), bin: 4 + stage * LEFT_OUT, kinds: LEFT_OUT, stage, made })),
      ].map((each, place, all) => ({ ...each, holes: holesOf(made, all[1].bars) })));
    };
    const holesOf = (made, gpu) => {
      const holes = [];
      if (made.whole) return holes;
      if (gpu.length) holes.push([run.begin, gpu.begin[0]]);
      for (let i = 0; i < gpu.length; i++) if (gpu.kind[i] === LEFT_OUT) holes.push([gpu.begin[i], gpu.end[i]]);
      if (gpu.length) holes.push([gpu.end[gpu.length - 1], run.end]);
      return holes;
    };
    // Instances of every pool, as many as there is room for; between those that prefill and those that decode, KV on its way.
    run.pools = [...new Set(run.instances.map(({ pool }) => pool))];
    run.together = run.pools.length > 1 ? run.pools.flatMap((pool) => run.instances.map((instance, place) => ({ ...instance, place })).filter((instance) => instance.pool === pool)
      .slice(0, Math.max(Math.floor(LANES_TOGETHER / run.pools.length), 1))) : [];
    run.transfers = detail.transfers ? await unpackTransfers(detail.transfers) : null;
    run.choose = async (number) => {
      if (number === ALL) {
        run.lanes = [];
        for (const { name, place, role } of run.together) {
          const [, ...stages] = await lanesOf(place);
          if (run.transfers && role === "decode" && !run.lanes.includes(run.transfers)) run.lanes.push(run.transfers);
          run.lanes.push(...stages.map((each) => ({ ...each, label: stages.length > 1 ? `${name}.${each.stage}` : name, of: name })));
        }
        const last = run.together[run.together.length - 1].pool;
        run.gpu = run.lanes.find(({ of }) => of === run.together.find(({ pool }) => pool === last).name);
      } else {
        run.lanes = await lanesOf(number);
        run.gpu = run.lanes[1];
      }
      run.made = run.gpu.made;
    };
    run.shown = run.transfers && run.together.length ? ALL : 0;
    await run.choose(run.shown);
    runs.push(run);
  }
  if (!runs.length) return;

  const wide = Math.max(0, ...runs.flatMap(({ together }) => together.map(({ name, stages }) => name.length + (stages > 1 ? 2 : 0))));
  const GUTTER = Math.max(54, Math.min(6 + wide * 6, innerWidth < 600 ? 76 : 130));
  const whole_s = Math.max(...runs.map((run) => run.end - run.begin));
  const view = { span: whole_s, begins: runs.map((run) => run.begin), hover: null };
  WB.views = () => data.runs.map((name) => {
    const at = runs.findIndex((run) => run.name === name);
    return at < 0 ? { begin: 1, end: 0 } : { begin: view.begins[at], end: view.begins[at] + view.span };
  });

  // Drawing --------------------------------------------------------------------------------------------------------------
  let colours;
  function recolour() {
    colours = {
      gpu: [...MODES.map((name) => css(`--${name}`)), ...CAUSES.map((name) => css(`--idle-${name}`))], cpu: PHASES.map((name) => css(`--${name}`)),
      transfer: css("--transfer"), paper: css("--paper"), ink: css("--ink"), soft: css("--soft"), line: css("--line"), panel: css("--panel"),
    };
  }
  function nice(span, most) {
    const rough = span / most, power = 10 ** Math.floor(Math.log10(rough));
    return power * ([1, 2, 5].find((factor) => factor * power >= rough) ?? 10);
  }
  const plot = (run) => run.width - GUTTER;

  function paint(run, place) {
    const canvas = run.canvas, ratio = devicePixelRatio || 1;
    run.width = canvas.parentElement.clientWidth;
    const height = RULER + run.lanes.reduce((sum, { height }) => sum + height + GAP, 0) + STRIP + 4;
    if (canvas.width !== Math.round(run.width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(run.width * ratio);
      canvas.height = Math.round(height * ratio);
      canvas.style.height = `${height}px`;
    }
    const ctx = canvas.getContext("2d");
    ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
    ctx.clearRect(0, 0, run.width, height);
    ctx.font = "11px system-ui, sans-serif";
    ctx.textBaseline = "middle";
    const from = view.begins[place], to = from + view.span, width = plot(run);
    const x = (at) => GUTTER + ((at - from) / view.span) * width;
    const step = nice(view.span, width / 95);
    for (let at = 0; at <= view.span * 1.0001; at += step) {
      const left = GUTTER + (at / view.span) * width;
      ctx.fillStyle = colours.line;
      ctx.fillRect(Math.round(left), RULER - 4, 1, height - RULER - STRIP);
      ctx.fillStyle = colours.soft;
      if (left < run.width - 34) ctx.fillText(at === 0 ? "0" : seconds(at), left + 3, RULER / 2);
    }
    let top = RULER;
    for (const each of run.lanes) {
      ctx.fillStyle = colours.soft;
      ctx.fillText(each.label, 0, top + each.height / 2, GUTTER - 5);
      each.top = top;
      ctx.fillStyle = colours.panel;
      ctx.fillRect(GUTTER, top, width, each.height);
      ctx.save();
      ctx.beginPath();
      ctx.rect(GUTTER, top, width, each.height);
      ctx.clip();
      paintLane(ctx, run, each, from, to, x, width);
      ctx.restore();
      top += each.height + GAP;
    }
    paintStrip(ctx, run, top + 1, from, to, width);
    run.stripTop = top + 1;
    if (view.hover) {
      const left = GUTTER + view.hover.share * width;
      ctx.fillStyle = colours.ink;
      ctx.globalAlpha = 0.5;
      ctx.fillRect(Math.round(left), RULER, 1, top - RULER - GAP);
      ctx.globalAlpha = 1;
      if (view.hover.run === place && view.hover.row != null) outline(ctx, run, view.hover.made, view.hover.row, x);
    }
  }
  const inHole = (each, at) => each.holes.some(([begin, end]) => at >= begin && at < end);

  function paintTransfers(ctx, each, from, to, x) {
    ctx.fillStyle = colours.transfer;
    for (let i = transferAfter(each, from); i < each.length && each.begin[i] < to; i++) {
      const left = Math.max(x(each.begin[i]), GUTTER - 2), right = Math.min(x(each.begin[i] + each.lasts[i]), x(to) + 2);
      if (right > GUTTER - 2) ctx.fillRect(left, each.top + 1 + each.row[i] * KV_ROW, Math.max(right - left, 0.5), KV_ROW - 1);
    }
  }
  function paintLane(ctx, run, each, from, to, x, width) {
    if (each.transfers) return paintTransfers(ctx, each, from, to, x);
    const { bars } = each, palette = each.cpu ? colours.cpu : colours.gpu;
    const first = after(bars, from), last = after(bars, to);
    const single = last - first < width * 0.6;
    if (single) {
      const gap = view.span / width < 2e-5 || last - first < width / 6 ? 0.6 : 0;
      for (let i = first; i < Math.min(last + 1, bars.length); i++) {
        const kind = bars.kind[i];
        if (kind === LEFT_OUT) continue;
        const left = Math.max(x(bars.begin[i]), GUTTER - 2), right = Math.min(x(bars.end[i]), GUTTER + width + 2);
        const idle = !each.cpu && kind >= IDLE;
        ctx.fillStyle = palette[kind];
        const thin = idle ? Math.round(each.height * 0.3) : each.height;
        ctx.fillRect(left, each.top + each.height - thin, Math.max(right - left - (right - left > 2.5 ? gap : 0), 0.35), thin);
        if (!idle && right - left > 22) label(ctx, run, each, i, left, right);
      }
    }
    if (single && !each.holes.length) return;
    // Too many to tell apart, or left out: every pixel shows how long it was what.
    const found = new Float64Array(KINDS);
    const seconds = view.span / width;
    for (let pixel = 0; pixel < width; pixel++) {
      const at = from + pixel * seconds;
      if (at >= run.end || at + seconds <= run.begin) continue;
      const hole = each.holes.length && inHole(each, at + seconds / 2);
      if (single && !hole) continue;
      found.fill(0);
      if (hole || (each.made.shares && seconds > (run.end - run.begin) / each.made.bins)) binSums(run, each, at, at + seconds, found);
      else sums(bars, at, at + seconds, found);
      let bottom = each.top + each.height;
      const order = each.cpu ? [0, 1, 2, 3] : GPU_ORDER;
      for (const kind of order) {
        const high = Math.min(found[kind] / seconds, 1) * each.height;
        if (high < 0.05) continue;
        ctx.fillStyle = palette[kind];
        ctx.fillRect(GUTTER + pixel, bottom - high, 1.02, high);
        bottom -= high;
      }
    }
  }
  function label(ctx, run, each, i, left, right) {
    const row = each.bars.row[i], kind = each.bars.kind[i];
    const text = each.cpu ? PHASES[kind] : `${MODES[kind]} ${each.made.requests[row]}`;
    const room = right - Math.max(left, GUTTER) - 8;
    const short = each.cpu ? "" : String(each.made.requests[row]);
    const fits = [text, short].find((words) => words && ctx.measureText(words).width <= room);
    if (!fits) return;
    ctx.fillStyle = each.cpu && kind === 0 ? colours.ink : colours.paper;
    ctx.fillText(fits, Math.max(left, GUTTER) + 4, each.top + each.height / 2 + 0.5);
  }
  function outline(ctx, run, made, row, x) {
    ctx.strokeStyle = colours.ink;
    ctx.lineWidth = 1.5;
    const box = (begin, end, each) => {
      const left = Math.max(x(begin), GUTTER), right = Math.min(x(end), run.width);
      if (right > left) ctx.strokeRect(left, each.top + 0.75, right - left, each.height - 1.5);
    };
    for (const each of run.lanes.filter((lane) => lane.made === made)) {
      if (!each.cpu) { box(made.start[each.stage][row], made.end[each.stage][row], each); continue; }
      box(made.host[row] + made.receive[row], made.host[row] + made.receive[row] + made.schedule[row] + made.launch[row], each);
      box(made.processed[row], made.processed[row] + made.process[row], each);
    }
  }
  function paintStrip(ctx, run, top, from, to, width) {
    ctx.fillStyle = colours.soft;
    ctx.fillText("run", 0, top + STRIP / 2);
    if (!run.strip || run.strip.width !== width) {
      run.strip = { width, columns: [] };
      const { gpu } = run, step = (run.end - run.begin) / width;
      for (let pixel = 0; pixel < width; pixel++) {
        const found = new Float64Array(KINDS), at = run.begin + pixel * step;
        if (gpu.made.shares) binSums(run, gpu, at, at + step, found);
        else sums(gpu.bars, at, at + step, found);
        run.strip.columns.push(found.map((value) => value / step));
      }
    }
    ctx.fillStyle = colours.panel;
    ctx.fillRect(GUTTER, top, width, STRIP);
    run.strip.columns.forEach((found, pixel) => {
      let bottom = top + STRIP;
      for (const kind of GPU_ORDER) {
        const high = found[kind] * STRIP;
        if (high < 0.05) continue;
        ctx.fillStyle = colours.gpu[kind];
        ctx.fillRect(GUTTER + pixel, bottom - high, 1.02, high);
        bottom -= high;
      }
    });
    const left = GUTTER + ((from - run.begin) / (run.end - run.begin)) * width, right = GUTTER + ((to - run.begin) / (run.end - run.begin)) * width;
    ctx.fillStyle = colours.paper;
    ctx.globalAlpha = 0.6;
    ctx.fillRect(GUTTER, top, Math.max(Math.min(left, run.width) - GUTTER, 0), STRIP);
    ctx.fillRect(Math.max(right, GUTTER), top, Math.max(run.width - right, 0), STRIP);
    ctx.globalAlpha = 1;
    ctx.strokeStyle = colours.ink;
    ctx.lineWidth = 1;
    const shown = Math.max(right - left, 3);
    if (left + shown > GUTTER && left < run.width) ctx.strokeRect(Math.max(left, GUTTER) + 0.5, top + 0.5, Math.min(shown, run.width - Math.max(left, GUTTER)) - 1, STRIP - 1);
  }

  // A moment as exactly as a stretch of that length needs it: to a thousandth of it.
  function moment(at, span) {
    const digits = Math.min(Math.max(3 - Math.ceil(Math.log10(span)), 0), 9);
    return `${at.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits })} s`;
  }
  let asked = 0;
  function show() {
    if (asked) return;
    asked = requestAnimationFrame(() => {
      asked = 0;
      runs.forEach(paint);
      runs.forEach((run, place) => {
        run.caption.textContent = `${moment(view.begins[place], view.span)}  +  ${seconds(view.span)}`;
      });
      WB.span.tell(view.begins[0], view.begins[0] + view.span, "timeline");
    });
  }

  // Moving ---------------------------------------------------------------------------------------------------------------
  function clamp() {
    view.span = Math.min(Math.max(view.span, SHORTEST_S), whole_s);
    runs.forEach((run, place) => {
      const most = Math.max(run.begin, run.begin + whole_s - view.span);
      view.begins[place] = Math.min(Math.max(view.begins[place], run.begin - view.span * 0.02), most);
    });
    if (view.span === whole_s) view.begins = runs.map((run) => run.begin);
  }
  function zoom(factor, at = 0.5) {
    const before = view.span;
    view.span = Math.min(Math.max(view.span * factor, SHORTEST_S), whole_s);
    view.begins = view.begins.map((begin) => begin + (before - view.span) * at);
    clamp();
    show();
  }
  function pan(part) {
    view.begins = view.begins.map((begin) => begin + part * view.span);
    clamp();
    show();
  }
  const moves = {
    whole() { view.span = whole_s; view.begins = runs.map((run) => run.begin); clamp(); show(); },
    busiest() {
      const known = runs.filter((run) => run.busiest);
      if (!known.length) return moves.whole();
      view.span = known[0].busiest[1] - known[0].busiest[0];
      view.begins = runs.map((run) => (run.busiest ? run.busiest[0] : run.begin));
      clamp();
      show();
    },
    same() { view.begins = runs.map(() => view.begins[0]); clamp(); show(); },
    in() { zoom(0.5); }, out() { zoom(2); }, left() { pan(-0.25); }, right() { pan(0.25); },
  };
  WB.timeline = {
    runs, view, moves, zoom, pan,
    // The same stretch of time in every run.
    range(from, to) { view.span = to - from; view.begins = runs.map(() => from); clamp(); show(); },
    // A stretch of its own for each run: {name: [from, to]}.
    ranges(wanted) {
      view.span = Math.max(...Object.values(wanted).map(([from, to]) => to - from));
      view.begins = runs.map((run, place) => wanted[run.name]?.[0] ?? view.begins[place]);
      clamp();
      show();
      document.getElementById("timeline").scrollIntoView({ behavior: "auto", block: "start" });
    },
  };

  // Pointing -------------------------------------------------------------------------------------------------------------
  const live = document.getElementById("batch");
  function describe(run, each, at, pixel_s) {
    const { bars, made } = each;
    const i = after(bars, at);
    const hit = i < bars.length && bars.begin[i] <= at && bars.kind[i] !== LEFT_OUT;
    if (at < run.begin || at > run.end) return null;
    if (inHole(each, at)) {
      const found = new Float64Array(KINDS), width = Math.max(pixel_s, (run.end - run.begin) / made.bins);
      binSums(run, each, at, at + width, found);
      return { row: null, lines: [`${each.label} at ${WB.exact(at)}`, mix(each, found, width), "single batches are kept for other moments only"] };
    }
    if (pixel_s > 0 && !hit) return { row: null, lines: [`${each.label} idle at ${WB.exact(at)}`] };
    if (!hit) return null;
    const kind = bars.kind[i], row = bars.row[i];
    const lasts = seconds(bars.end[i] - bars.begin[i]);
    if (!each.cpu && kind >= IDLE) return { row: null, lines: [`${each.label} idle: ${LABELS[CAUSES[kind - IDLE]]}`, lasts, `before batch ${made.iteration[row]}`] };
    return { row, lines: batch(made, row, each.cpu ? `CPU ${PHASES[kind]}: ${lasts}` : `${each.label} ${MODES[kind]}: ${lasts}`) };
  }
  function batch(made, row, title) {
    const waits = made.start[0][row] - (made.host[row] + made.receive[row] + made.schedule[row] + made.launch[row]);
    return [
      title,
      `batch ${made.iteration[row]}, ${MODES[made.mode[row]]}: ${made.requests[row]} requests`,
      made.prefill_tokens[row] && `${whole(made.prefill_tokens[row])} prompt tokens`,
      made.decode_tokens[row] && `${whole(made.decode_tokens[row])} decode tokens`,
      `context ${whole(made.context_tokens[row])} tokens, KV ${whole(made.kv_used_tokens[row])} tokens`,
      `running ${made.running[row]}, waiting ${made.waiting[row]}`,
      `CPU: receive ${seconds(made.receive[row])}, schedule ${seconds(made.schedule[row])}, launch ${seconds(made.launch[row])}, process ${seconds(made.process[row])}`,
      waits > 1e-9 && `launched ${seconds(waits)} before the GPU took it`,
      `GPU from ${WB.exact(made.start[0][row])}`,
    ];
  }
  const mix = (each, found, width) => {
    const names = each.cpu ? PHASES : [...MODES, ...CAUSES.map((name) => LABELS[name])];
    return names.map((name, kind) => [name, found[kind] / width]).filter(([, part]) => part > 0.001).map(([name, part]) => `${name} ${share(part)}`).join(", ") || "idle";
  };
  function pointed(event, run, place) {
    const box = run.canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    const part = (x - GUTTER) / plot(run);
    const each = run.lanes.find(({ top, height }) => y >= top && y < top + height);
    if (!each || part < 0) {
      view.hover = null;
      WB.tooltip.hide();
      return show();
    }
    const at = view.begins[place] + part * view.span, pixel_s = view.span / plot(run);
    if (each.transfers) return pointedTransfer(event, run, place, each, at, pixel_s, Math.floor((y - each.top - 1) / KV_ROW), part);
    const { bars } = each;
    const many = after(bars, at + pixel_s) - after(bars, at) > 2;
    let told;
    if (many) {
      const found = new Float64Array(KINDS);
      sums(bars, at, at + pixel_s, found);
      told = { row: null, lines: [`${each.label}, ${seconds(pixel_s)} from ${WB.exact(at)}`, mix(each, found, pixel_s), "zoom in for single batches"] };
    } else told = describe(run, each, at, pixel_s);
    view.hover = { share: part, run: place, row: told?.row ?? null, made: each.made };
    if (told) WB.tooltip.show(event.clientX, event.clientY, [`${run.name} · ${told.lines[0]}`, ...told.lines.slice(1)]);
    else WB.tooltip.hide();
    show();
  }
  function pointedTransfer(event, run, place, each, at, pixel_s, row, part) {
    view.hover = { share: part, run: place, row: null };
    let hit = -1;
    for (let i = transferAfter(each, at - pixel_s); i < each.length && each.begin[i] < at + pixel_s; i++)
      if (each.row[i] === row && each.begin[i] + each.lasts[i] > at - pixel_s) hit = i;
    const name = (number) => run.instances.find(({ instance }) => instance === number)?.name ?? `instance ${number}`;
    if (hit < 0) WB.tooltip.hide();
    else WB.tooltip.show(event.clientX, event.clientY, [`${run.name} · KV of ${each.ids[hit]}`, `${name(each.source[hit])} → ${name(each.target[hit])}`,
      `${seconds(each.lasts[hit])} from ${WB.exact(each.begin[hit])}`, `prompt of ${whole(each.tokens[hit])} tokens`]);
    show();
  }
  // The next or previous batch of a run, from the middle of the view on: how the keyboard points.
  function stepTo(run, place, direction) {
    const { made } = run, start = made.start[0];
    let row = view.hover?.run === place && view.hover.row != null ? view.hover.row + direction : -1;
    if (row < 0) {
      const gpu = run.gpu.bars;
      row = gpu.length ? gpu.row[Math.min(after(gpu, view.begins[place] + view.span / 2), gpu.length - 1)] : 0;
    }
    row = Math.min(Math.max(row, 0), made.rows - 1);
    const lasts = made.end[0][row] - start[row];
    if (view.span > lasts * 60) { view.begins = view.begins.map((begin, i) => begin + (i === place ? 0 : 0)); view.span = lasts * 20; view.begins[place] = start[row] - view.span / 2; clamp(); }
    const middle = start[row] + lasts / 2;
    if (middle < view.begins[place] + view.span * 0.05 || middle > view.begins[place] + view.span * 0.95) {
      const shift = middle - view.span / 2 - view.begins[place];
      view.begins = view.begins.map((begin) => begin + shift);
      clamp();
    }
    view.hover = { share: (middle - view.begins[place]) / view.span, run: place, row, made };
    const lines = batch(made, row, `${run.name}: ${seconds(lasts)}`).filter(Boolean);
    live.textContent = lines.join(" · ");
    const box = run.canvas.getBoundingClientRect();
    WB.tooltip.show(box.left + GUTTER + view.hover.share * plot(run), box.top + run.gpu.top, lines);
    show();
  }

  for (const [place, run] of runs.entries()) {
    run.canvas = element("canvas", { tabindex: "0", role: "application", "aria-label": `Timeline of ${run.name}: arrows move, plus and minus zoom, 0 the whole run, b the busiest moment, n and p the next and previous batch` });
    run.caption = element("span", { class: "stretch" });
    const head = element("figcaption", {}, element("i", { class: `swatch run-${run.place % 8}` }), element("b", {}, run.name), " ", run.caption);
    if (run.instances.length > 1) {
      const select = element("select", { "aria-label": `Instance of ${run.name}` }, 
        ...(run.together.length ? [element("option", { value: ALL }, run.transfers ? "both sides" : "all pools")] : []),
        ...run.instances.map((instance, at) => element("option", { value: at }, instance.name)));
      select.value = String(run.shown);
      select.addEventListener("change", async () => { await run.choose(Number(select.value)); run.strip = null; show(); });
      head.append(" ", select);
    }
    if (!run.made.whole) head.append(element("small", {}, ` ${whole(run.made.rows)} of ${whole(run.made.of)} batches kept singly, the rest in ${whole(run.made.bins)} bins`));
    holder.append(element("figure", { class: "window" }, head, element("div", {}, run.canvas)));
    const { canvas } = run;
    let drag = null;
    const pointers = new Map();
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      pointers.set(event.pointerId, event.clientX);
      const box = canvas.getBoundingClientRect(), y = event.clientY - box.top;
      const part = Math.min(Math.max((event.clientX - box.left - GUTTER) / plot(run), 0), 1);
      drag = { x: event.clientX, begins: [...view.begins], span: view.span, strip: y >= run.stripTop, from: part, select: event.shiftKey };
      if (drag.strip) jump(event);
    });
    function jump(event) {
      const box = canvas.getBoundingClientRect();
      const at = run.begin + ((event.clientX - box.left - GUTTER) / plot(run)) * (run.end - run.begin) - view.span / 2;
      view.begins = view.begins.map((begin) => begin + at - view.begins[place]);
      clamp();
      show();
    }
    canvas.addEventListener("pointermove", (event) => {
      if (!drag) return pointed(event, run, place);
      if (pointers.size === 2 && pointers.has(event.pointerId)) {
        const [one, other] = [...pointers.values()], before = Math.abs(one - other);
        pointers.set(event.pointerId, event.clientX);
        const [a, b] = [...pointers.values()], now = Math.abs(a - b);
        const box = canvas.getBoundingClientRect();
        if (before > 10 && now > 10) zoom(before / now, ((a + b) / 2 - box.left - GUTTER) / plot(run));
        return;
      }
      pointers.set(event.pointerId, event.clientX);
      if (drag.strip) return jump(event);
      if (drag.select) return;
      const moved = ((drag.x - event.clientX) / plot(run)) * view.span;
      view.begins = drag.begins.map((begin) => begin + moved);
      WB.tooltip.hide();
      clamp();
      show();
    });
    const drop = (event) => {
      pointers.delete(event.pointerId);
      if (drag?.select && event.type === "pointerup") {
        const box = canvas.getBoundingClientRect(), part = Math.min(Math.max((event.clientX - box.left - GUTTER) / plot(run), 0), 1);
        const low = Math.min(part, drag.from), high = Math.max(part, drag.from);
        if (high - low > 0.003) {
          view.begins = view.begins.map((begin) => begin + low * view.span);
          view.span *= high - low;
          clamp();
          show();
        }
      }
      drag = null;
    };
    canvas.addEventListener("pointerup", drop);
    canvas.addEventListener("pointercancel", drop);
    canvas.addEventListener("pointerleave", () => { if (!drag) { view.hover = null; WB.tooltip.hide(); show(); } });
    canvas.addEventListener("dblclick", (event) => {
      const box = canvas.getBoundingClientRect();
      zoom(0.2, (event.clientX - box.left - GUTTER) / plot(run));
    });
    canvas.addEventListener("wheel", (event) => {
      // A plain wheel scrolls the page, unless the timeline has been clicked into.
      if (!event.ctrlKey && !event.metaKey && document.activeElement !== canvas && Math.abs(event.deltaX) <= Math.abs(event.deltaY)) return;
      event.preventDefault();
      const box = canvas.getBoundingClientRect();
      if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) pan(event.deltaX / plot(run));
      else zoom(Math.exp(Math.min(Math.max(event.deltaY, -120), 120) / 300), Math.min(Math.max((event.clientX - box.left - GUTTER) / plot(run), 0), 1));
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const keys = { ArrowLeft: moves.left, ArrowRight: moves.right, "+": moves.in, "=": moves.in, ArrowUp: moves.in, "-": moves.out, ArrowDown: moves.out,
        0: moves.whole, Home: moves.whole, b: moves.busiest, s: moves.same, n: () => stepTo(run, place, 1), p: () => stepTo(run, place, -1),
        Escape: () => { view.hover = null; WB.tooltip.hide(); show(); } };
      if (!keys[event.key]) return;
      event.preventDefault();
      keys[event.key]();
    });
    canvas.addEventListener("blur", () => WB.tooltip.hide());
  }
  document.getElementById("moves").addEventListener("click", (event) => {
    const move = event.target.closest("button")?.dataset.move;
    if (move) moves[move]();
  });
  const linked = document.getElementById("linked");
  WB.span.onChange((from, to, source) => { if (source === "charts" && linked.checked) WB.timeline.range(from, to); });
  WB.redraws.push((recoloured) => {
    if (recoloured) recolour();
    runs.forEach((run, place) => { run.strip = null; paint(run, place); });
  });
  recolour();
  moves.busiest();
});
