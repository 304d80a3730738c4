"use strict";
// The table of metrics: another baseline, rows by how much a run differs, runs by one metric.
WB.parts.push(async () => {
  const table = document.querySelector("table.metrics");
  if (!table) return;
  const groups = [...table.tBodies];
  const rows = [...table.querySelectorAll("tr[data-metric]")];
  const home = new Map(rows.map((row) => [row, row.parentElement]));
  const heads = [...table.tHead.rows[0].cells].slice(1);
  let sortedBy = null;

  const cellOf = (row, run) => row.querySelector(`td[data-run="${run}"]`);
  const valueOf = (row, run) => {
    const text = cellOf(row, run).dataset.value;
    return text === "" ? null : Number(text);
  };
  const difference = (value, base) => (value == null || base == null || base === 0 ? null : value / base - 1);
  function percent(share) {
    if (share == null) return "";
    if (share >= 9) return `x${Math.round(share + 1).toLocaleString("en")}`;
    if (Math.abs(share) < 0.0005) return "±0%";
    return `${share > 0 ? "+" : ""}${(share * 100).toFixed(1)}%`;
  }

  const picker = document.getElementById("baseline");
  function compare() {
    const base = picker ? Number(picker.value) : 0;
    for (const row of rows) {
      for (const cell of row.querySelectorAll("td")) {
        const run = Number(cell.dataset.run);
        const small = cell.querySelector("small");
        const change = run === base ? null : difference(valueOf(row, run), valueOf(row, base));
        small.textContent = run === base ? "" : percent(change);
        const better = row.dataset.better;
        small.className = change == null || Math.abs(change) < 0.0005 || better === "neither" ? "" : change > 0 === (better === "higher") ? "good" : "bad";
      }
    }
    heads.forEach((head) => head.classList.toggle("base", heads.length > 1 && Number(head.dataset.run) === base));
    document.querySelectorAll(".base-name").forEach((name) => { name.textContent = WB.data.runs[base]; });
  }
  if (picker) picker.addEventListener("change", compare);

  // Runs from best to worst by the metric of a row; once more: from worst to best; then as they were given.
  let columnsBy = { row: null, turn: 0 };
  function orderRuns(row) {
    columnsBy = { row, turn: columnsBy.row === row ? (columnsBy.turn + 1) % 3 : 1 };
    const order = heads.map((head) => Number(head.dataset.run));
    if (columnsBy.turn) {
      const sign = (row.dataset.better === "lower" ? 1 : -1) * (columnsBy.turn === 1 ? 1 : -1);
      order.sort((one, other) => sign * ((valueOf(row, one) ?? Infinity * sign) - (valueOf(row, other) ?? Infinity * sign)) || one - other);
    } else order.sort((one, other) => one - other);
    table.tHead.rows[0].append(...order.map((run) => table.tHead.querySelector(`th[data-run="${run}"]`)));
    for (const each of rows) each.append(...order.map((run) => cellOf(each, run)));
    for (const each of rows) {
      const sorted = each === row && columnsBy.turn;
      if (sorted) each.setAttribute("aria-sort", columnsBy.turn === 1 ? "descending" : "ascending");
      else each.removeAttribute("aria-sort");
    }
  }

  // Rows by how far a run is from the baseline, largest first; once more: in groups again.
  function orderRows(run) {
    sortedBy = sortedBy === run ? null : run;
    heads.forEach((head) => head.setAttribute("aria-sort", Number(head.dataset.run) === sortedBy ? "descending" : "none"));
    table.classList.toggle("flat", sortedBy !== null);
    if (sortedBy === null) {
      for (const row of rows) home.get(row).append(row);
      return;
    }
    const base = picker ? Number(picker.value) : 0;
    // Without a difference a row goes last; the baseline itself keeps the order of the rows.
    const size = (row) => {
      const change = run === base ? 0 : difference(valueOf(row, run), valueOf(row, base));
      return change == null ? -1 : Math.abs(change);
    };
    groups[0].append(...[...rows].sort((one, other) => size(other) - size(one)));
  }
  table.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const row = button.closest("tr[data-metric]");
    if (row) orderRuns(row);
    else orderRows(Number(button.closest("th").dataset.run));
  });
  compare();
});
