// Sorts a table by the column whose head is clicked, and hides rows that lack the words typed above it. Without it the
// page reads the same.
"use strict";
(function () {
  const LAST = "\u2014"; // unknown values stay at the end, whichever way a column is sorted

  function key(row, column) {
    const text = row.cells[column].textContent.trim().replace(/\u2212/g, "-").replace(/(\d),(?=\d{3})/g, "$1");
    const number = text.match(/^[<>+\u00b1 ]*(-?\d+(?:\.\d+)?(?:e-?\d+)?)/);
    return number ? parseFloat(number[1]) : text.toLowerCase();
  }

  function compare(a, b) {
    if (typeof a === "number" && typeof b === "number") return a - b;
    if (typeof a === typeof b) return a < b ? -1 : a > b ? 1 : 0;
    return typeof a === "number" ? -1 : 1;
  }

  function sort(table, order, column, ways) {
    const body = table.tBodies[0];
    const unknown = (row) => row.cells[column].textContent.startsWith(LAST);
    const known = order.filter((row) => !unknown(row));
    if (ways) known.sort((a, b) => ways * compare(key(a, column), key(b, column)));
    (ways ? known.concat(order.filter(unknown)) : order).forEach((row) => body.appendChild(row));
  }

  function sortable(table) {
    const order = Array.from(table.tBodies[0].rows);
    const heads = Array.from(table.tHead.rows[0].cells);
    heads.forEach((head, column) => {
      const act = () => {
        const next = { none: "ascending", ascending: "descending", descending: "none" }[head.getAttribute("aria-sort")];
        heads.forEach((other) => other.setAttribute("aria-sort", "none"));
        head.setAttribute("aria-sort", next);
        sort(table, order, column, { none: 0, ascending: 1, descending: -1 }[next]);
      };
      head.setAttribute("aria-sort", "none");
      head.tabIndex = 0;
      head.title = "sort by this column";
      head.addEventListener("click", act);
      head.addEventListener("keydown", (event) => { if (event.key === "Enter") act(); });
    });
    return order;
  }

  function filterable(figure, rows) {
    const field = document.createElement("input");
    field.type = "search";
    field.placeholder = "show rows with \u2026";
    field.setAttribute("aria-label", "show only the rows with these words");
    field.addEventListener("input", () => {
      const words = field.value.toLowerCase().split(/\s+/);
      rows.forEach((row) => {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
      });
    });
    figure.querySelector("figcaption").after(field);
  }

  document.querySelectorAll("figure.table").forEach((figure) => {
    const table = figure.querySelector("table");
    if (!table || table.tBodies[0].rows.length < 3) return;
    const rows = sortable(table);
    if (rows.length > 8) filterable(figure, rows);
  });
})();
