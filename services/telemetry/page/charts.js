// Small charts over rounds, as inline SVG: each is drawn anew from its rows, at its width in pixels.

const SVG = "http://www.w3.org/2000/svg";
const LEFT = 44, RIGHT = 8, TOP = 10, BOTTOM = 22;
const round2 = (value) => Math.round(value * 100) / 100;

export function shape(name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

// About `count` round numbers from low to high.
function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough * 0.999);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-9; at += step) found.push(at);
  return found;
}

// The mean of the last `width` values, so that a noisy line has a course.
function course(points) {
  const width = Math.max(1, Math.round(points.length / 30));
  let sum = 0;
  return points.map(([x, y], index) => {
    sum += y - (index >= width ? points[index - width][1] : 0);
    return [x, sum / Math.min(index + 1, width)];
  });
}

export class Chart {
  // `layers(rows)`: [{kind, colour, name, points: [[round, value], ...]}]. `format` writes a value,
  // `tick` one of the axis with so many digits.
  constructor(figure, { label, layers, format, tick, floor = null, ceiling = null, whole = false, robust = false }) {
    Object.assign(this, { figure, label, layers, format, floor, ceiling, whole, robust });
    this.tick = tick ?? ((value, digits) => (Math.abs(value) < 1e-9 ? 0 : value).toFixed(digits));
    this.svg = shape("svg", { role: "img", "aria-label": label });
    this.cross = shape("line", { class: "cross", visibility: "hidden" });
    figure.append(this.svg);
    this.span = [0, 1];
  }

  draw(rows, span) {
    const box = this.svg.getBoundingClientRect();
    if (!box.width) return;
    Object.assign(this, { width: box.width, height: box.height, span });
    this.svg.setAttribute("viewBox", `0 0 ${round2(box.width)} ${round2(box.height)}`);
    const layers = this.layers(rows);
    const values = layers.flatMap((layer) => layer.points.map((point) => point[1]));
    const shapes = [];
    if (!values.length) {
      const middle = { class: "empty", x: box.width / 2, y: box.height / 2 };
      shapes.push(shape("text", middle, "nothing measured yet"));
    } else {
      this.scale(values);
      shapes.push(...this.axes(), ...layers.flatMap((layer) => this.layer(layer)));
      this.svg.setAttribute("aria-label", `${this.label}: ${this.summary(layers)}`);
    }
    this.svg.replaceChildren(...shapes, this.cross);
  }

  summary(layers) {
    return layers.filter((layer) => layer.name && layer.points.length).map((layer) => {
      const [first, last] = [layer.points[0], layer.points.at(-1)];
      return `${layer.name} ${this.format(first[1])} at round ${first[0]}, ${this.format(last[1])} at round ${last[0]}`;
    }).join("; ");
  }

  scale(values) {
    let low = Infinity, high = -Infinity;
    for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
    if (this.robust && values.length > 30) {
      // A few peaks must not flatten all the rest: they are drawn up to the edge.
      const common = [...values].sort((a, b) => a - b)[Math.floor(values.length * 0.98)];
      if (high - low > 2.5 * (common - low)) high = low + 1.5 * (common - low);
    }
    const pad = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    this.low = this.floor ?? low - pad;
    this.high = this.ceiling === null ? high + pad : Math.min(this.ceiling, high + pad);
    if (this.high <= this.low) this.high = this.low + 1;
  }

  x(round) {
    const [first, last] = this.span;
    return round2(LEFT + (this.width - LEFT - RIGHT) * (last > first ? (round - first) / (last - first) : 0.5));
  }

  y(value) {
    const share = Math.min(1, Math.max(0, (value - this.low) / (this.high - this.low)));
    return round2(this.height - BOTTOM - (this.height - BOTTOM - TOP) * share);
  }

  axes() {
    const shapes = [];
    const marks = ticks(this.low, this.high, 5);
    const digits = Math.max(0, -Math.floor(Math.log10(marks[1] - marks[0] || 1) + 1e-9));
    for (const value of marks) {
      if (this.whole && value % 1) continue;
      const y = this.y(value);
      shapes.push(shape("line", { class: "grid", x1: LEFT, x2: this.width - RIGHT, y1: y, y2: y }));
      shapes.push(shape("text", { x: LEFT - 8, y: y + 4, "text-anchor": "end" }, this.tick(value, digits)));
    }
    const [first, last] = this.span;
    for (const value of ticks(first, Math.max(last, first + 1), Math.max(3, this.width / 80))) {
      if (value % 1 || value > last) continue;
      const anchor = this.x(value) > this.width - 24 ? "end" : "middle";
      shapes.push(shape("text", { x: this.x(value), y: this.height - 5, "text-anchor": anchor }, value.toLocaleString("en")));
    }
    return shapes;
  }

  layer({ kind, colour, points }) {
    if (!points.length) return [];
    const path = (rows) => rows.map(([x, y], index) => `${index ? "L" : "M"}${this.x(x)} ${this.y(y)}`).join("");
    if (kind === "noisy") {
      const raw = shape("path", { class: `raw ${colour}`, d: path(points) });
      return [raw, shape("path", { class: `line ${colour}`, d: path(course(points)) })];
    }
    if (kind === "dotted") {
      const radius = points.length > 120 ? 0 : points.length > 40 ? 2 : 2.8;
      const dots = points.map(([x, y]) => shape("circle", { class: "dots", cx: this.x(x), cy: this.y(y), r: radius }));
      return [shape("path", { class: `line ${colour}`, d: path(points) }), ...(radius ? dots : [])];
    }
    return [shape("path", { class: kind, d: this.stairs(points, kind === "area") })];
  }

  // Each value holds for its round's width.
  stairs(points, closed) {
    const [first, last] = this.span;
    const half = (this.width - LEFT - RIGHT) / Math.max(1, last - first) / 2;
    const inside = (x) => round2(Math.min(this.width - RIGHT, Math.max(LEFT, x)));
    const steps = points.map(([x, y]) => [inside(this.x(x) - half), inside(this.x(x) + half), this.y(y)]);
    const d = steps.map(([from, to, y], index) => `${index ? "L" : "M"}${from} ${y}H${to}`).join("");
    const ground = this.y(Math.max(0, this.low));
    return closed ? `${d}V${ground}H${steps[0][0]}Z` : d;
  }

  mark(round) {
    const there = round !== null && this.width;
    this.cross.setAttribute("visibility", there ? "visible" : "hidden");
    if (!there) return;
    for (const end of ["x1", "x2"]) this.cross.setAttribute(end, this.x(round));
    this.cross.setAttribute("y1", TOP);
    this.cross.setAttribute("y2", this.height - BOTTOM);
  }

  // The round under a pointer.
  at(event) {
    const box = this.svg.getBoundingClientRect();
    const share = (event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT);
    const [first, last] = this.span;
    return Math.round(first + Math.min(1, Math.max(0, share)) * (last - first));
  }
}

// One lane a reason: a mark at each round that closed for it.
export class Lane {
  constructor(list, reason) {
    this.item = document.createElement("li");
    this.item.className = `lane-${reason}`;
    this.name = document.createElement("span");
    this.name.textContent = reason;
    this.count = document.createElement("span");
    this.count.className = "count";
    this.svg = shape("svg", { "aria-hidden": "true", preserveAspectRatio: "none" });
    this.path = shape("path", {});
    this.svg.append(this.path);
    this.item.append(this.name, this.count, this.svg);
    list.append(this.item);
    this.reason = reason;
  }

  draw(rows, span, closed) {
    const width = this.svg.getBoundingClientRect().width;
    const mine = rows.filter((row) => row.reason === this.reason);
    this.count.textContent = closed.toLocaleString("en");
    this.item.classList.toggle("none", !closed);
    if (!width) return;
    const [first, last] = span;
    const each = width / (last - first + 1);
    const drawn = Math.max(1, each - (each > 4 ? 1 : 0));
    this.svg.setAttribute("viewBox", `0 0 ${round2(width)} 14`);
    this.path.setAttribute("d", mine.map(({ round }) => `M${round2((round - first) * each)} 0h${round2(drawn)}v14h${round2(-drawn)}z`).join(""));
  }
}
