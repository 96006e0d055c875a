// The live page: takes in what /events says, and draws what changed, once a frame at most.

import { drawArms } from "./bandit.js";
import { drawDevices } from "./devices.js";
import { drawRounds, lookAtNewest } from "./rounds.js";
import { age, ask, byRound, chosen, dirty, drawn, known, take } from "./store.js";
import { $, element, say, Table } from "./tables.js";
import { bytes, count, figure, lasting, percent, plural, spaced } from "./words.js";

const OUTCOMES = ["folded", "late", "duplicate", "too_late", "rejected"];
const AGAIN_MS = 10000;
const SILENT_S = 180; // three reports missed

// ---- the stream

let source = null;

function listen() {
  source?.close();
  const job = new URLSearchParams(location.search).get("job");
  source = new EventSource(job ? `events?job=${encodeURIComponent(job)}` : "events");
  source.addEventListener("everything", (event) => take(JSON.parse(event.data), true));
  source.addEventListener("changed", (event) => take(JSON.parse(event.data), false));
  source.addEventListener("open", () => { connected = "live"; dirty.add("fleet"); ask(); });
  source.addEventListener("error", () => {
    connected = "lost";
    dirty.add("fleet");
    ask();
    if (source.readyState === EventSource.CLOSED) setTimeout(listen, AGAIN_MS);
  });
}

let connected = "waiting";

function drawLink() {
  const node = $("link"), why = known.fleet?.not_ready ?? "";
  const state = connected === "live" && why ? "waiting" : connected;
  const text = { live: "live", lost: "connection lost, trying again", waiting: why || "connecting" }[state];
  node.dataset.state = state;
  node.title = why;
  say(node, text);
}

// ---- in short

function drawFigures() {
  const job = chosen(), fleet = known.fleet, rounds = byRound(known.rounds);
  const planned = job.rounds_planned ? ` of ${count(job.rounds_planned)}` : "";
  // Rounds that closed without a step are not among those planned, nor is the evaluation at the end.
  const without = (job.closed?.more ?? 0) + (job.closed?.abandoned ?? 0) + (job.rounds_before ?? 0);
  const round = Math.min(job.round - without, job.rounds_planned || Infinity);
  write("figure-round", job.job === undefined ? "–" : count(round), planned);
  $("progress").value = job.rounds_planned ? round / job.rounds_planned : 0;
  const measured = byRound(known.evaluations), first = measured[0], last = measured.at(-1);
  $("tile-accuracy").hidden = job.has_answers === false;
  write("figure-accuracy", last ? percent(last.accuracy ?? 0) : "–");
  write("figure-heldout", last ? figure(last.loss ?? 0) : "–");
  const best = job.best && byRound(known.published).length > 1 ? job.best : undefined;
  const told = (name, written) => {
    if (!last) return "not measured yet";
    const better = best ? ` · ${written(best[name] ?? 0)} in version ${best.round}, the best` : "";
    return `${written(first[name] ?? 0)} at round ${first.round}${better}`;
  };
  say($("sub-accuracy"), told("accuracy", percent));
  say($("sub-heldout"), told("loss", figure));
  const method = [job.method, job.how].filter(Boolean).join(", ");
  const status = job.status === "ended" ? `ended (${job.reason})` : job.status;
  say($("about"), !known.jobs.size ? "no job yet: `seedwire job submit` starts one" : [status, method, epoch(job), distilled(job.distilled)].filter(Boolean).join(" · "));
  write("figure-late", count(rounds.reduce((sum, row) => sum + (row.late ?? 0), 0)));
  if (!fleet) return;
  const refused = (fleet.settled.rejected ?? 0) + (fleet.settled.too_late ?? 0);
  say($("sub-late"), refused ? `${count(refused)} refused` : "none refused");
  write("figure-devices", count(fleet.standings.working), ` of ${count(fleet.devices)}`);
  const trouble = ["problem", "away"].filter((each) => fleet.standings[each]).map((each) => `${count(fleet.standings[each])} ${each}`);
  say($("sub-devices"), trouble.join(", ") || (fleet.devices ? "no problem" : "none known"));
  write("figure-bytes", bytes(fleet.links.link_bytes_in + fleet.links.link_bytes_out));
  say($("sub-bytes"), `↑ ${bytes(fleet.links.link_bytes_out)}  ↓ ${bytes(fleet.links.link_bytes_in)}`);
}

// Epochs as people count them; nothing of a job that has only one.
function epoch(job) {
  if ((job.epochs ?? 1) < 2 && !job.epoch) return "";
  const waits = job.status === "waiting" ? ", the next by `seedwire distil`" : "";
  return `epoch ${count(job.epoch + 1)} of ${count(job.epochs)}${waits}`;
}

// Both together tell a distillation that sharpens without evidence: entropy falls, loss rises.
function distilled(made) {
  if (!made) return "";
  const pairs = [["held-out loss", "held_out_loss"], ["teacher's entropy", "teacher_entropy"]];
  const told = pairs.filter(([, name]) => typeof made[`${name}_after`] === "number");
  return `distilled: ${told.map(([title, name]) => `${title} ${figure(made[`${name}_before`])} → ${figure(made[`${name}_after`])}`).join(", ")}`;
}

function write(id, text, more = "") {
  const node = $(id);
  if (node.textContent === text + more) return;
  node.replaceChildren(text, element("small", "", more));
}

function drawJobs() {
  const select = $("job"), asked = new URLSearchParams(location.search).get("job") ?? "";
  const options = [...known.jobs.values()].sort((a, b) => (a.job < b.job ? -1 : 1)).map((job) => [job.job, `${job.job} (${job.status})`]);
  const newest = asked ? "the newest that runs" : `${known.chosen} · the newest that runs`;
  options.unshift(["", known.jobs.size ? newest : "none yet"]);
  const now = JSON.stringify(options);
  if (select.dataset.options !== now) {
    select.dataset.options = now;
    select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
  }
  if (document.activeElement !== select) select.value = known.jobs.has(asked) ? asked : "";
  document.title = known.chosen ? `${known.chosen} · Seedwire` : "Seedwire";
}

// ---- updates, refusals, services, versions

function drawUpdates() {
  const settled = known.fleet?.settled ?? {};
  const names = [...OUTCOMES, ...Object.keys(settled).filter((name) => !OUTCOMES.includes(name))];
  fillCounts($("settled"), names.map((name) => [spaced(name), count(settled[name])]));
  const fleet = known.fleet;
  const text = fleet?.registrar ? `${count(fleet.connections_refused)} · ${plural(fleet.devices_revoked, "device")} revoked` : "no registrar has reported";
  say($("refused-count"), text);
  drawRefusals($("refused-updates"), known.refusedUpdates);
  drawRefusals($("refused-connections"), known.refusedConnections);
}

function fillCounts(list, pairs) {
  while (list.children.length > pairs.length) list.lastChild.remove();
  pairs.forEach(([name, value], index) => {
    const pair = list.children[index] ?? list.appendChild(element("div"));
    if (!pair.firstChild) pair.append(element("dt"), element("dd"));
    say(pair.children[0], name);
    say(pair.children[1], value);
  });
}

function drawRefusals(list, rows) {
  const items = rows.map((row) => {
    const item = element("li");
    item.append(element("time", "", lasting(age(row.at))), element("b", "", row.count > 1 ? `${row.who} ×${count(row.count)}` : row.who));
    item.append(` ${spaced(row.what)}`, element("span", "why", row.reason));
    return item;
  });
  list.replaceChildren(...(items.length ? items.reverse() : [element("li", "quiet", "None.")]));
}

function drawServices() {
  const rows = [...known.services.values()].sort((a, b) => a.service.localeCompare(b.service));
  const holder = $("services");
  if (!rows.length) { say(holder, "None has reported yet."); return; }
  if (!holder.firstElementChild) holder.replaceChildren();
  while (holder.children.length > rows.length) holder.lastChild.remove();
  rows.forEach((row, index) => {
    let each = holder.children[index];
    if (!each) {
      each = holder.appendChild(element("details"));
      const line = element("summary");
      line.append(element("b"), element("span"));
      each.append(line, element("p", "said bad"), element("dl"));
      each.addEventListener("toggle", () => { dirty.add("services"); ask(); });
    }
    const [line, problem, list] = each.children;
    say(line.children[0], row.service);
    const silent = age(row.heard), up = (row.uptime_s ?? 0) + silent;
    const says = silent > SILENT_S ? `silent for ${lasting(silent)}` : `up ${lasting(Math.max(60, up))}`;
    say(line.children[1], `${says} · version ${row.version ?? "?"}`);
    say(problem, row.problem ?? "");
    if (each.open) fillService(list, Object.entries(row.counters ?? {}).filter(([, value]) => value));
  });
}

function fillService(list, pairs) {
  list.replaceChildren(...pairs.flatMap(([name, value]) => {
    const term = element("dt", "", spaced(name));
    term.append(element("small", "", known.counters[name] ?? ""));
    return [term, element("dd", "", name.startsWith("link_bytes") ? bytes(value) : count(value))];
  }));
}

const publishedTable = new Table($("published"), [
  { name: "round", title: "Round", className: "", value: (row) => row.round, text: (row) => count(row.round) },
  { name: "digest", title: "Adapter", className: "mono", text: (row) => row.digest.slice(0, 12) },
  { name: "snapshot", title: "Snapshot", className: "mono wide", text: (row) => row.snapshot.slice(0, 12) },
  { name: "size", title: "Size", className: "n", value: (row) => row.size_bytes, text: (row) => bytes(row.size_bytes) },
], { key: "round", more: $("published-more"), limit: 8, sort: "round", down: true, nothing: "None published yet." });

function drawPublished() {
  const every = chosen().snapshot_every;
  const when = every ? ` A version is published every ${plural(every, "round").replace(/^1 /, "")} and at the end.` : "";
  publishedTable.hint(`None published yet.${when}`);
  publishedTable.draw([...known.published.values()]);
  say($("published-count"), known.published.size ? count(known.published.size) : "");
}

// ---- drawing

Object.assign(drawn, {
  jobs: () => { drawJobs(); drawFigures(); drawPublished(); },
  fleet: () => { drawLink(); drawFigures(); drawUpdates(); drawDevices(false); },
  rounds: () => { drawFigures(); drawRounds(); },
  evaluations: () => { drawFigures(); drawRounds(); },
  published: drawPublished,
  devices: () => drawDevices(false),
  arms: drawArms,
  services: drawServices,
  refused: drawUpdates,
});
$("job").addEventListener("change", (event) => {
  const url = new URL(location.href);
  if (event.target.value) url.searchParams.set("job", event.target.value);
  else url.searchParams.delete("job");
  history.replaceState(null, "", url);
  lookAtNewest();
  listen();
});
new ResizeObserver(() => { dirty.add("rounds"); ask(); }).observe($("chart-loss"));
setInterval(() => { if (!document.hidden) { dirty.add("devices").add("refused").add("services"); ask(); } }, 5000);
for (const name of Object.keys(drawn)) dirty.add(name);
ask();
listen();
