"use strict";
(function () {
  // Tables: a heading sorts by its column, again the other way round. Cells without a value stay at the end.
  function value(row, column) {
    const cell = row.cells[column];
    const said = cell.dataset.v === undefined ? cell.textContent : cell.dataset.v;
    return said === "" || isNaN(said) ? said : Number(said);
  }
  function compare(a, b, sign) {
    if (a === "" || b === "") return (a === "") - (b === "");
    if (typeof a === "number" && typeof b === "number") return sign * (a - b);
    return sign * String(a).localeCompare(String(b), "en", { numeric: true });
  }
  for (const table of document.querySelectorAll("table.sortable")) {
    const headings = Array.from(table.tHead.rows[0].cells);
    headings.forEach(function (heading, column) {
      heading.querySelector("button").addEventListener("click", function () {
        const upwards = heading.getAttribute("aria-sort") !== "ascending";
        for (const other of headings) other.setAttribute("aria-sort", "none");
        heading.setAttribute("aria-sort", upwards ? "ascending" : "descending");
        const body = table.tBodies[0];
        const rows = Array.from(body.rows).map((row) => [value(row, column), row]);
        rows.sort((a, b) => compare(a[0], b[0], upwards ? 1 : -1));
        body.append(...rows.map((pair) => pair[1]));
      });
    });
  }

  // One point at a time.
  const choose = document.getElementById("choose");
  const points = Array.from(document.querySelectorAll("article.point"));
  function show(id) {
    if (!points.some((point) => point.id === id)) return false;
    for (const point of points) point.hidden = point.id !== id;
    choose.value = id;
    return true;
  }
  choose.addEventListener("change", function () { show(choose.value); });
  function follow() {
    const id = location.hash.slice(1);
    if (show(id)) document.getElementById(id).scrollIntoView();
  }
  addEventListener("hashchange", follow);
  document.addEventListener("click", function (event) {
    const link = event.target.closest("a[href^='#p']");
    if (link) show(link.getAttribute("href").slice(1));
  });
  follow();

  // Curves: the arrow keys visit every point from left to right; what is pointed at is written below.
  for (const chart of document.querySelectorAll("svg.curve")) {
    // Listeners stand on the figure: Chromium puts an SVG that listens for focus among the tab stops.
    const figure = chart.parentElement;
    const readout = figure.querySelector(".readout");
    const links = Array.from(chart.querySelectorAll("a"));
    const left = (link) => link.firstElementChild.transform.baseVal[0].matrix.e;
    const ordered = links.slice().sort((a, b) => left(a) - left(b));
    const read = (event) => {
      const link = event.target.closest("svg.curve a");
      if (link) readout.textContent = link.getAttribute("aria-label");
    };
    figure.addEventListener("focusin", read);
    figure.addEventListener("pointerover", read);
    chart.addEventListener("keydown", function (event) {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      const here = ordered.indexOf(document.activeElement);
      if (!step || here < 0) return;
      event.preventDefault();
      ordered[Math.min(ordered.length - 1, Math.max(0, here + step))].focus();
    });
  }
})();
