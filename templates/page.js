"use strict";

// Tables: the titles of columns become buttons, which sort the rows. Cells without a value stay at the end.
function valueOf(row, column) {
  const cell = row.cells[column];
  const text = cell && cell.colSpan === 1 && cell.firstChild ? cell.firstChild.textContent.trim() : "";
  if (text === "" || text === "n/a") return null;
  return /^[-+]?[\d,]*\.?\d+( %)?$/.test(text) ? Number(text.replace(/[, %]/g, "")) : text;
}

function compare(first, second) {
  if (typeof first === "number" && typeof second === "number") return first - second;
  return String(first).localeCompare(String(second), "en", { numeric: true });
}

function sort(table, title, column) {
  const order = title.ariaSort === "ascending" ? "descending" : "ascending";
  for (const other of table.tHead.rows[0].cells) other.ariaSort = null;
  title.ariaSort = order;
  const rows = [...table.tBodies[0].rows].map((row) => ({ row, value: valueOf(row, column) }));
  const known = rows.filter((entry) => entry.value !== null);
  known.sort((a, b) => compare(a.value, b.value) * (order === "ascending" ? 1 : -1));
  const unknown = rows.filter((entry) => entry.value === null);
  table.tBodies[0].append(...known.concat(unknown).map((entry) => entry.row));
}

for (const table of document.querySelectorAll("table")) {
  if (table.tBodies[0].rows.length < 2) continue;
  [...table.tHead.rows[0].cells].forEach((title, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...title.childNodes);
    button.addEventListener("click", () => sort(table, title, column));
    title.append(button);
  });
}

// Images: each becomes a button that shows it large; Escape, a click and the button close.
const dialog = document.createElement("dialog");
dialog.ariaLabel = "Enlarged image";
const close = document.createElement("button");
close.type = "button";
close.textContent = "Close";
const large = new Image(), caption = document.createElement("p");
dialog.addEventListener("click", () => dialog.close());
document.body.append(dialog);

for (const image of document.querySelectorAll("main img")) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "zoom";
  button.ariaLabel = `Enlarge: ${image.alt}`;
  image.replaceWith(button);
  button.append(image);
  button.addEventListener("click", () => {
    large.src = image.src;
    large.alt = caption.textContent = image.alt;
    dialog.replaceChildren(close, large, caption);
    dialog.showModal();
  });
}

// Examples: only those with the chosen label and skin type.
const filters = document.getElementById("filters");
if (filters) {
  const choices = [...filters.querySelectorAll("select")], samples = [...document.querySelectorAll(".kind .sample")];
  const apply = () => {
    for (const sample of samples) {
      sample.hidden = choices.some((choice) => choice.value && sample.dataset[choice.name] !== choice.value);
    }
    for (const kind of document.querySelectorAll(".kind")) {
      kind.querySelector(".none").hidden = kind.querySelector(".sample:not([hidden])") !== null;
    }
    const shown = samples.filter((sample) => !sample.hidden).length;
    filters.querySelector("output").textContent = `${shown} of ${samples.length} examples`;
  };
  filters.addEventListener("change", apply);
  filters.hidden = false;
  apply();
}
