
"use strict";

// What a reader without scripts does not miss: tables that sort, images that enlarge, commands that are copied.

const order = new Intl.Collator(document.documentElement.lang, { numeric: true });

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function sort(table, column) {
  const headings = table.tHead.rows[0].cells;
  const down = headings[column].getAttribute("aria-sort") === "ascending";
  const rows = [...table.tBodies[0].rows];
  const compare = (one, other) =>
    "key" in one.dataset ? one.dataset.key - other.dataset.key : order.compare(one.textContent, other.textContent);
  rows.sort((one, other) => {
    const [a, b] = [one.cells[column], other.cells[column]];
    const missing = a.classList.contains("missing") - b.classList.contains("missing");
    return missing || (a.classList.contains("missing") ? 0 : down ? compare(b, a) : compare(a, b));
  });
  table.tBodies[0].append(...rows);
  for (const heading of headings) heading.removeAttribute("aria-sort");
  headings[column].setAttribute("aria-sort", down ? "descending" : "ascending");
}

for (const table of document.querySelectorAll(".sortable")) {
  if (table.tBodies[0].rows.length < 2) continue;
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const button = element("button", { type: "button" }, ...heading.childNodes);
    button.addEventListener("click", () => sort(table, column));
    heading.append(button);
  });
}

const pictures = element("div", { class: "pictures" });
const words = element("div");
const before = element("button", { type: "button" }, "Previous");
const after = element("button", { type: "button" }, "Next");
const close = element("button", { type: "button" }, "Close");
const dialog = element(
  "dialog",
  { class: "enlarged", "aria-label": "Enlarged image" },
  pictures,
  words,
  element("div", { class: "buttons" }, before, after, close),
);
document.body.append(dialog);
let shown = null;

function show(tile) {
  if (!tile) return;
  shown = tile;
  pictures.replaceChildren(...[...tile.querySelectorAll("img")].map((image) => image.cloneNode()));
  words.replaceChildren(...[...tile.querySelectorAll("p")].map((line) => line.cloneNode(true)));
  before.disabled = !tile.previousElementSibling;
  after.disabled = !tile.nextElementSibling;
  if (!dialog.open) dialog.showModal();
}

for (const tile of document.querySelectorAll(".tile")) {
  const row = tile.querySelector(".pictures");
  if (!row.children.length) continue;
  const button = element("button", { type: "button" });
  button.addEventListener("click", () => show(tile));
  row.replaceWith(button);
  button.append(row);
}
before.addEventListener("click", () => show(shown.previousElementSibling));
after.addEventListener("click", () => show(shown.nextElementSibling));
close.addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
dialog.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") show(shown.previousElementSibling);
  if (event.key === "ArrowRight") show(shown.nextElementSibling);
});

for (const commands of document.querySelectorAll(".commands")) {
  const code = commands.querySelector("code");
  const button = element("button", { type: "button" }, "Copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      // Not everywhere allowed: what is selected can be copied by hand.
      getSelection().selectAllChildren(code);
    }
  });
  commands.append(button);
}
