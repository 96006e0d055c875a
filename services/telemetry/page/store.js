// What telemetry has told: rows by name, merged as they come, bounded; and what must be drawn anew.

const LIMITS = { jobs: 400, rounds: 2000, evaluations: 2000, published: 100, devices: 6000, arms: 2000 };

export const known = { chosen: "", fleet: null, counters: {}, behind: 0, refusedUpdates: [], refusedConnections: [] };
for (const name of ["jobs", "rounds", "evaluations", "published", "devices", "arms", "services"]) known[name] = new Map();
const KEYS = { jobs: "job", rounds: "round", evaluations: "round", published: "round", devices: "device", arms: "device", services: "service" };
export const dirty = new Set();

export function take(message, everything) {
  known.behind = performance.now() / 1000 - message.now;
  if (everything) {
    for (const name of Object.keys(KEYS)) { known[name].clear(); dirty.add(name); }
    known.chosen = message.chosen ?? "";
    known.counters = message.counters ?? {};
  }
  for (const [name, key] of Object.entries(KEYS)) {
    for (const row of message[name] ?? []) {
      if (row.gone) known[name].delete(row.name ?? row[key]);
      else renew(known[name], row[key], row);
      dirty.add(name);
    }
  }
  for (const [name, limit] of Object.entries(LIMITS)) prune(known[name], limit);
  if (message.fleet) { known.fleet = message.fleet; dirty.add("fleet"); }
  if (message.refused_updates) { known.refusedUpdates = message.refused_updates; dirty.add("refused"); }
  if (message.refused_connections) { known.refusedConnections = message.refused_connections; dirty.add("refused"); }
  ask();
}

// The row that changed last stands last, so that the first may go.
function renew(rows, key, row) {
  rows.delete(key);
  rows.set(key, row);
}

function prune(rows, limit) {
  for (const key of rows.keys()) {
    if (rows.size <= limit) return;
    rows.delete(key);
  }
}

export const age = (at) => performance.now() / 1000 - known.behind - at;
export const chosen = () => known.jobs.get(known.chosen) ?? {};
export const byRound = (rows) => [...rows.values()].sort((a, b) => a.round - b.round);

// What draws each part, by its name in `known`.
export const drawn = {};
let asked = false;

export function ask() {
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => {
    asked = false;
    const now = new Set([...dirty].map((name) => drawn[name]));
    dirty.clear();
    for (const draw of now) draw();
  });
}
