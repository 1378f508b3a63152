"use strict";
// Everything can be read without this script; it adds sorting, values under the pointer and focus on one model.
const numeric = (cell) => (cell.dataset.value === "" ? NaN : Number(cell.dataset.value));

function sortBy(header) {
  const table = header.closest("table");
  const column = [...header.parentNode.children].indexOf(header);
  const ascending = header.getAttribute("aria-sort") === "descending" || (column === 0 && !header.hasAttribute("aria-sort"));
  for (const other of header.parentNode.children) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const rows = [...table.tBodies[0].rows];
  rows.sort((first, second) => {
    const [a, b] = [first.cells[column], second.cells[column]];
    if (column === 0) return (ascending ? 1 : -1) * a.dataset.value.localeCompare(b.dataset.value);
    const [x, y] = [numeric(a), numeric(b)];
    if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
    return ascending ? x - y : y - x;
  });
  table.tBodies[0].append(...rows);
}

const tip = document.getElementById("tip");
function showTip(event) {
  const target = event.target.closest("[data-tip]");
  tip.hidden = !target;
  if (!target) return;
  tip.textContent = target.dataset.tip;
  const box = target.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left + box.width / 2 - tip.offsetWidth / 2), innerWidth - tip.offsetWidth - 8);
  const above = box.top - tip.offsetHeight - 8;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 8 ? above : box.bottom + 8}px`;
}

function focusOn(button) {
  const pressed = button.getAttribute("aria-pressed") !== "true";
  const section = button.closest("section");
  for (const other of section.querySelectorAll(".legend button")) other.setAttribute("aria-pressed", String(other === button && pressed));
  section.querySelector(".panels").classList.toggle("focused", pressed);
  for (const line of section.querySelectorAll(".line")) {
    const own = pressed && line.dataset.entry === button.dataset.entry;
    line.classList.toggle("focus", own);
    if (own) line.parentNode.append(line);
  }
}

async function copy(button) {
  const text = document.getElementById(button.dataset.target);
  try {
    await navigator.clipboard.writeText(text.textContent);
  } catch {
    getSelection().selectAllChildren(text);  // a page on disk may not use the clipboard: leave the last step to Ctrl+C
    document.execCommand("copy");
  }
  button.textContent = "Copied";
}

document.addEventListener("click", (event) => {
  const header = event.target.closest(".sortable thead th");
  const key = event.target.closest(".legend button");
  const button = event.target.closest("button.copy");
  if (header) sortBy(header);
  if (key) focusOn(key);
  if (button) copy(button);
  showTip(event);
});
document.addEventListener("pointerover", showTip);
document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
document.documentElement.dataset.ready = "true";
