"use strict";
// Without this script the page is a plain table. Sorting and hiding change nothing but its look.
const table = document.getElementById("rows");
const body = table.tBodies[0];

// What a row sorts by in a column: a number, a name, or nothing.
function keyOf(row, column) {
  const cell = row.cells[column];
  const key = cell && cell.dataset.key;
  if (key === undefined) return null;
  return column === 0 ? key : Number.isFinite(Number(key)) ? Number(key) : key;
}

// Rows without a key stay last in either direction; equal ones keep the study's order.
function compare(a, b, column, sign) {
  const [x, y] = [keyOf(a, column), keyOf(b, column)];
  const order = Number(a.dataset.number) - Number(b.dataset.number);
  if (x === null || y === null) return (x === null) - (y === null) || order;
  const difference = typeof x === "number" && typeof y === "number"
    ? x - y
    : String(x).localeCompare(String(y), undefined, { numeric: true });
  return sign * difference || order;
}

// First ascending, then descending, then the study's order again.
function sortBy(heads, column) {
  const next = { none: "ascending", ascending: "descending", descending: "none" };
  const state = next[heads[column].getAttribute("aria-sort")];
  heads.forEach((head) => head.setAttribute("aria-sort", "none"));
  heads[column].setAttribute("aria-sort", state);
  const sign = state === "descending" ? -1 : 1;
  const inStudyOrder = (a, b) => Number(a.dataset.number) - Number(b.dataset.number);
  const byColumn = (a, b) => compare(a, b, column, sign);
  body.append(...[...body.rows].sort(state === "none" ? inStudyOrder : byColumn));
}

const heads = [...table.tHead.rows[0].cells];
heads.forEach((head, column) => {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...head.childNodes);
  button.addEventListener("click", () => sortBy(heads, column));
  head.append(button);
});

const hide = document.getElementById("hide-controls");
if (hide) {
  hide.hidden = false;
  hide.addEventListener("click", () => {
    const pressed = hide.getAttribute("aria-pressed") !== "true";
    hide.setAttribute("aria-pressed", String(pressed));
    document.querySelectorAll("[data-control]").forEach((row) => { row.hidden = pressed; });
  });
}
