// Tables that are sorted, searched and limited; every word is set as text, never as markup.

const order = new Intl.Collator("en", { numeric: true });

export const $ = (id) => document.getElementById(id);

export function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export class Table {
  // Columns: {name, title, className, value(row): sorts by, text(row) or fill(cell, row)}.
  constructor(table, columns, { key, more = null, limit = 50, sort = columns[0].name, down = false, nothing = "None." }) {
    Object.assign(this, { table, columns, key, more, limit, sort, down, nothing, step: limit, sorted: [], head: new Map() });
    const row = element("tr");
    for (const column of columns) row.append(this.header(column));
    this.body = element("tbody");
    const head = element("thead");
    head.append(row);
    table.append(head, this.body);
    this.empty = element("tr");
    const cell = element("td", "nothing", nothing);
    cell.colSpan = columns.length;
    this.empty.append(cell);
    more?.addEventListener("click", () => { this.limit += this.step; this.redraw(); });
    this.mark();
  }

  // What stands in the place of rows where there are none.
  hint(text) {
    say(this.empty.firstChild, text);
  }

  header(column) {
    const cell = element("th", `c-${column.name} ${column.className ?? ""}`);
    cell.scope = "col";
    if (column.value) {
      const button = element("button", "", column.title);
      button.type = "button";
      button.addEventListener("click", () => {
        this.down = this.sort === column.name ? !this.down : Boolean(column.className?.includes("n"));
        this.sort = column.name;
        this.mark();
        this.draw(this.rows, true);
      });
      cell.append(button);
    } else {
      cell.textContent = column.title;
    }
    this.head.set(column.name, cell);
    return cell;
  }

  mark() {
    for (const [name, cell] of this.head) {
      if (name === this.sort) cell.setAttribute("aria-sort", this.down ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    }
  }

  // Sorting again moves rows under the reader's eyes: the caller says when.
  draw(rows, sorting = true) {
    this.rows = rows;
    const { value } = this.columns.find((column) => column.name === this.sort);
    const byKey = new Map(rows.map((row) => [row[this.key], row]));
    if (!sorting && this.sorted.length === rows.length && this.sorted.every((row) => byKey.has(row[this.key]))) {
      this.sorted = this.sorted.map((row) => byKey.get(row[this.key]));
    } else {
      const sign = this.down ? -1 : 1;
      this.sorted = rows.map((row) => [value(row), row]).sort(([a], [b]) => {
        if (typeof a === "number" && typeof b === "number") return sign * (a - b);
        return sign * order.compare(a, b);
      }).map((pair) => pair[1]);
    }
    this.redraw();
  }

  redraw() {
    const shown = this.sorted.slice(0, this.limit);
    if (!shown.length) {
      this.body.replaceChildren(this.empty);
    } else {
      this.empty.remove();
      while (this.body.rows.length > shown.length) this.body.lastChild.remove();
      while (this.body.rows.length < shown.length) this.body.append(this.blank());
      shown.forEach((row, index) => this.fill(this.body.rows[index], row));
    }
    if (this.more) {
      this.more.hidden = this.sorted.length <= this.limit;
      say(this.more, `Show ${Math.min(this.step, this.sorted.length - this.limit).toLocaleString("en")} more`);
    }
  }

  blank() {
    const row = element("tr");
    this.columns.forEach((column, index) => {
      const cell = element(index ? "td" : "th", column.className ?? "");
      if (!index) cell.scope = "row";
      row.append(cell);
    });
    return row;
  }

  fill(line, row) {
    this.columns.forEach((column, index) => {
      const cell = line.cells[index];
      if (column.fill) column.fill(cell, row);
      else say(cell, column.text(row));
    });
  }

  get shown() {
    return Math.min(this.limit, this.sorted.length);
  }
}
