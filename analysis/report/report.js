// Sort a table by the column whose heading is clicked; empty cells stay last.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const value = (row, i) => row.cells[i].dataset.v ?? row.cells[i].textContent;
  table.tHead.addEventListener("click", (event) => {
    const th = event.target.closest("th");
    if (!th) return;
    const i = th.cellIndex, number = th.classList.contains("n");
    const before = th.getAttribute("aria-sort") ?? (number ? "ascending" : "descending");
    const up = before === "descending"; // a first click shows the largest number, or the first word
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    th.setAttribute("aria-sort", up ? "ascending" : "descending");
    const empty = (v) => v === "" || (number && Number.isNaN(Number(v)));
    const order = (a, b) => {
      const x = value(a, i), y = value(b, i);
      if (empty(x) || empty(y)) return empty(x) - empty(y);
      const by = number ? Number(x) - Number(y) : x.localeCompare(y, undefined, { numeric: true });
      return up ? by : -by;
    };
    body.append(...[...body.rows].sort(order));
  });
}
