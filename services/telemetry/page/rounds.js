// Rounds: the charts, why each closed, and the one that is looked at.

import { Chart, Lane } from "./charts.js";
import { ask, byRound, chosen, dirty, known } from "./store.js";
import { $, element, Table } from "./tables.js";
import { count, figure, percent } from "./words.js";

const REASONS = ["enough", "more", "deadline", "abandoned", "evaluated", "stopped"];
const points = (rows, name) => rows.filter((row) => row[name] !== undefined && row[name] !== null).map((row) => [row.round, row[name]]);
const why = (row) => (row.reason === "more" ? "more on the same batch" : row.reason ?? "open");
const counted = (rows, name) => rows.map((row) => [row.round, row[name] ?? 0]);
const charts = [
  new Chart($("chart-loss"), {
    label: "Loss by round",
    format: figure,
    robust: true,
    layers: ({ rounds, evaluations }) => [
      { kind: "noisy", colour: "green", name: "devices' batches", points: points(rounds, "loss") },
      { kind: "dotted", colour: "blue", name: "held-out rows", points: counted(evaluations, "loss") },
    ],
  }),
  new Chart($("chart-accuracy"), {
    label: "Held-out accuracy by round",
    format: percent,
    tick: (value, digits) => percent(value, Math.max(0, digits - 2)),
    ceiling: 1.005,
    layers: ({ evaluations }) => [{ kind: "dotted", colour: "blue", name: "accuracy", points: counted(evaluations, "accuracy") }],
  }),
  new Chart($("chart-devices"), {
    label: "Devices by round",
    format: count,
    floor: 0,
    whole: true,
    layers: ({ rounds }) => {
      const tuned = rounds.filter((row) => row.kind !== "evaluate");
      return [
        { kind: "area", name: "delivered", points: counted(tuned, "devices") },
        { kind: "step", name: "enough", points: counted(tuned.filter((row) => row.wanted), "wanted") },
      ];
    },
  }),
  new Chart($("chart-signal"), {
    label: "Signal to noise of the pooled slopes by round",
    format: figure,
    robust: true,
    layers: ({ rounds }) => [{ kind: "noisy", colour: "green", name: "signal to noise", points: points(rounds, "signal") }],
  }),
];
const lanes = REASONS.map((reason) => new Lane($("lanes"), reason));

let looked = null; // the round that is looked at; null: the newest
let span = [0, 1];

export function drawRounds() {
  const rounds = byRound(known.rounds), evaluations = byRound(known.evaluations);
  const all = [...rounds, ...evaluations].map((row) => row.round);
  span = all.length ? [rounds[0]?.round ?? all[0], Math.max(rounds.at(-1)?.round ?? 0, 1)] : [0, 1];
  const shown = { rounds, evaluations: evaluations.filter((row) => row.round >= span[0]) };
  $("chart-accuracy").hidden = chosen().has_answers === false;
  for (const chart of charts) chart.draw(shown, span);
  for (const lane of lanes) lane.draw(rounds, span, chosen().closed?.[lane.reason] ?? 0);
  const scrub = $("scrub");
  scrub.min = span[0];
  scrub.max = span[1];
  drawLooked();
  if ($("rounds-details").open) roundsTable.draw(rounds.slice(-100));
}

function drawLooked() {
  for (const chart of charts) chart.mark(looked);
  const round = looked ?? span[1], row = known.rounds.get(round), scrub = $("scrub");
  if (Number(scrub.value) !== round) scrub.value = round;
  const measured = known.evaluations.get(round);
  const facts = [];
  if (row) {
    facts.push(["Round", count(round)], [row.kind === "evaluate" ? "evaluation" : "", why(row)]);
    facts.push(["devices", `${count(row.devices)} of ${count(row.wanted)}`], ["probes", `${count(row.probes)} of ${count(row.wanted_probes)}`]);
    facts.push(["loss", figure(row.loss)], ["signal to noise", figure(row.signal)], ["late", count(row.late)]);
    if (row.variance !== undefined && row.variance !== null) facts.push(["variance", figure(row.variance)]);
    if (measured && chosen().has_answers !== false) facts.push(["held-out accuracy", percent(measured.accuracy ?? 0)]);
    if (measured) facts.push(["held-out loss", figure(measured.loss ?? 0)]);
  }
  const text = facts.map((fact) => fact.join(" ")).join(", ") || "No round yet.";
  scrub.setAttribute("aria-valuetext", text);
  const readout = $("readout");
  if (readout.dataset.text === text) return;
  readout.dataset.text = text;
  readout.replaceChildren(...facts.map(([name, value]) => {
    const fact = element("span", "", name ? `${name} ` : "");
    fact.append(element("b", "", value));
    return fact;
  }));
  if (!facts.length) readout.textContent = text;
}

$("scrub").addEventListener("input", (event) => {
  const round = Number(event.target.value);
  looked = round >= span[1] ? null : round;
  drawLooked();
});
for (const chart of charts) {
  chart.svg.addEventListener("pointermove", (event) => { looked = chart.at(event); drawLooked(); });
  chart.svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") { looked = null; drawLooked(); } });
}
const roundsTable = new Table($("rounds"), [
  { name: "round", title: "Round", className: "n", value: (row) => row.round, text: (row) => count(row.round) },
  { name: "reason", title: "Closed", value: (row) => row.reason ?? "", text: why },
  { name: "devices", title: "Devices", className: "n", value: (row) => row.devices ?? 0, text: (row) => `${count(row.devices)} of ${count(row.wanted)}` },
  { name: "probes", title: "Probes", className: "n", value: (row) => row.probes ?? 0, text: (row) => `${count(row.probes)} of ${count(row.wanted_probes)}` },
  { name: "late", title: "Late", className: "n", value: (row) => row.late ?? 0, text: (row) => count(row.late) },
  { name: "loss", title: "Loss", className: "n", value: (row) => row.loss ?? -1, text: (row) => figure(row.loss) },
  { name: "signal", title: "Signal to noise", className: "n", value: (row) => row.signal ?? -1, text: (row) => figure(row.signal) },
  { name: "variance", title: "Variance", className: "n", value: (row) => row.variance ?? -1, text: (row) => figure(row.variance) },
], { key: "round", limit: 100, sort: "round", down: true, nothing: "No round yet." });
$("rounds-details").addEventListener("toggle", () => { dirty.add("rounds"); ask(); });

export function lookAtNewest() {
  looked = null;
}
