// The bandit's arms: whom a round calls, and why.

import { known } from "./store.js";
import { $, element, say, Table } from "./tables.js";
import { count } from "./words.js";

const SORT_EVERY_MS = 5000;

let highest = 1;
const armsTable = new Table($("arms"), [
  { name: "device", title: "Device", value: (row) => row.device, fill: (cell, row) => {
    if (!cell.firstChild) cell.append(element("span"), element("span", "said"));
    say(cell.children[0], row.device);
    say(cell.children[1], `round ${count(row.round)}: ${row.reason ?? ""}`);
  } },
  { name: "plays", title: "Plays", className: "n", value: (row) => row.plays ?? 0, text: (row) => count(row.plays) },
  { name: "mean", title: "Reward", className: "n", value: (row) => row.mean ?? 0, text: (row) => (row.mean ?? 0).toFixed(2) },
  { name: "index", title: "Bound", className: "n", value: (row) => row.index ?? Infinity, text: (row) => (row.index === undefined ? "∞" : row.index.toFixed(2)) },
  { name: "bar", title: "", className: "wide", fill: (cell, row) => {
    if (!cell.firstChild) {
      const bar = element("span", "arm");
      bar.setAttribute("aria-hidden", "true");
      bar.append(element("i", "may"), element("i"));
      cell.append(bar);
    }
    const [may, mean] = cell.firstChild.children;
    may.style.width = `${100 * Math.min(1, (row.index ?? highest) / highest)}%`;
    mean.style.width = `${100 * (row.mean ?? 0) / highest}%`;
  } },
], { key: "device", more: $("arms-more"), limit: 8, sort: "index", down: true, nothing: "No device has been given work since telemetry started." });
let armsSortedAt = -SORT_EVERY_MS;

export function drawArms() {
  const rows = [...known.arms.values()], now = performance.now(), due = now - armsSortedAt > SORT_EVERY_MS;
  if (due) armsSortedAt = now;
  highest = Math.max(1, ...rows.map((row) => row.index ?? 0));
  armsTable.draw(rows, due);
  say($("arms-count"), rows.length ? `showing ${count(armsTable.shown)} of ${count(rows.length)}` : "");
}
