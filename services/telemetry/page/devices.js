// The table of devices: searched, filtered by where they stand, sorted, limited.

import { age, known } from "./store.js";
import { $, element, say, Table } from "./tables.js";
import { bytes, count, lasting, plural } from "./words.js";

const STANDINGS = ["working", "waiting", "away", "problem"];
const SORT_EVERY_MS = 5000;

let wanted = "";

function speed(row) {
  const each = row.probes && row.work_s ? row.probes / row.work_s : 0;
  return each ? (each >= 100 ? count(Math.round(each)) : each.toPrecision(2)) : "–";
}

function fillDevice(cell, row) {
  if (!cell.firstChild) cell.append(element("span"), element("span", "tag"), element("span", "small"));
  const [name, tag, more] = cell.children;
  say(name, row.device);
  say(tag, row.trusted ? "trusted" : "");
  const facts = [plural(row.rounds ?? 0, "round"), plural(row.rows ?? 0, "row"), row.late && `${count(row.late)} late`, row.refused && `${count(row.refused)} refused`];
  facts.push(`↑ ${bytes(row.bytes_out)} ↓ ${bytes(row.bytes_in)}`);
  say(more, facts.filter(Boolean).join(" · "));
  cell.title = row.version ? `version ${row.version}, ${row.cores} cores, ${count(row.memory_mb)} MB` : "";
}

function fillDoing(cell, row) {
  if (!cell.firstChild) cell.append(element("span"), element("span", "said"));
  const [state, said] = cell.children, standing = row.standing ?? "waiting";
  state.className = `dot s-${standing}`;
  say(state, row.working ? `${row.working}` : standing);
  const unable = Object.entries(row.unable ?? {}).map(([job, why]) => `job ${job}: ${why}`);
  said.classList.toggle("bad", standing === "problem");
  say(said, [row.why, ...unable].filter(Boolean).join("; "));
}

const heard = (row) => (row.heard === undefined || row.heard === null ? null : age(row.heard));
const devicesTable = new Table($("devices"), [
  { name: "device", title: "Device", value: (row) => row.device, fill: fillDevice },
  { name: "doing", title: "Doing", value: (row) => `${STANDINGS.indexOf(row.standing ?? "waiting")} ${row.device}`, fill: fillDoing },
  { name: "heard", title: "Heard", className: "n", value: (row) => heard(row) ?? 1e9, text: (row) => (heard(row) === null ? "never" : lasting(heard(row))) },
  { name: "rounds", title: "Rounds", className: "n wide", value: (row) => row.rounds ?? 0, text: (row) => count(row.rounds) },
  { name: "speed", title: "Probes/s", className: "n wide", value: (row) => (row.work_s ? (row.probes ?? 0) / row.work_s : 0), text: speed },
  { name: "late", title: "Late", className: "n wide wide-2", value: (row) => row.late ?? 0, text: (row) => count(row.late) },
  { name: "refused", title: "Refused", className: "n wide wide-2", value: (row) => row.refused ?? 0, text: (row) => count(row.refused) },
  { name: "rows", title: "Rows", className: "n wide wide-2", value: (row) => row.rows ?? 0, text: (row) => count(row.rows) },
  { name: "reconnects", title: "Reconn.", className: "n wide wide-2", value: (row) => row.reconnects ?? 0, text: (row) => count(row.reconnects) },
  { name: "up", title: "Up", className: "n wide", value: (row) => row.bytes_out ?? 0, text: (row) => bytes(row.bytes_out) },
  { name: "down", title: "Down", className: "n wide", value: (row) => row.bytes_in ?? 0, text: (row) => bytes(row.bytes_in) },
], { key: "device", more: $("devices-more"), limit: innerWidth < 640 ? 10 : 25, nothing: "No device." });

const stateButtons = new Map(["", ...STANDINGS].map((standing) => {
  const button = element("button"), name = element("span", standing ? `dot s-${standing}` : "", standing || "all");
  button.type = "button";
  button.append(name, element("b", "", "0"));
  button.setAttribute("aria-pressed", String(standing === wanted));
  button.addEventListener("click", () => {
    wanted = standing;
    for (const [each, other] of stateButtons) other.setAttribute("aria-pressed", String(each === wanted));
    drawDevices(true);
  });
  $("states").append(button);
  return [standing, button];
}));

let sortedAt = 0;

export function drawDevices(sorting) {
  const search = $("search").value.trim().toLowerCase();
  const rows = [...known.devices.values()].filter((row) => {
    if (wanted && (row.standing ?? "waiting") !== wanted) return false;
    return !search || [row.device, row.why ?? "", ...Object.values(row.unable ?? {})].some((text) => text.toLowerCase().includes(search));
  });
  const now = performance.now(), due = sorting || now - sortedAt > SORT_EVERY_MS;
  if (due) sortedAt = now;
  devicesTable.draw(rows, due);
  const fleet = known.fleet, total = fleet?.devices ?? known.devices.size;
  const held = known.devices.size < total ? `, of the ${count(known.devices.size)} heard of last` : "";
  const reconnects = plural(fleet?.links.reconnects ?? 0, "reconnect");
  say($("devices-count"), total ? `${reconnects} · showing ${count(devicesTable.shown)} of ${count(rows.length)}${held}` : "");
  for (const [standing, button] of stateButtons) {
    say(button.lastChild, count(standing ? fleet?.standings[standing] : total));
  }
}

$("search").addEventListener("input", () => drawDevices(true));
