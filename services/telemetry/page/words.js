// How numbers, bytes and times are written.

export const number = new Intl.NumberFormat("en");
export const count = (value) => number.format(value ?? 0);
export const percent = (value, digits) => `${(value * 100).toFixed(digits ?? 1)}%`;
export const figure = (value) => (value === null || value === undefined ? "–" : Number(value).toPrecision(Math.abs(value) < 0.001 && value ? 2 : 3).replace(/e.*$/, (tail) => tail));
export const plural = (value, name) => `${count(value)} ${name}${value === 1 ? "" : "s"}`;
export const spaced = (text) => text.replaceAll("_", " ");

export function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0, rest = value ?? 0;
  while (rest >= 999.5 && unit < units.length - 1) { rest /= 1000; unit += 1; }
  return `${unit && rest < 10 ? rest.toFixed(1) : Math.round(rest)} ${units[unit]}`;
}

export function lasting(seconds) {
  if (seconds < 5) return "now";
  if (seconds < 60) return `${Math.floor(seconds / 5) * 5} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  return seconds < 86400 ? `${Math.floor(seconds / 3600)} h` : `${Math.floor(seconds / 86400)} d`;
}
