"use strict";
(() => {
  const charts = [...document.querySelectorAll("figure > .chart")];
  const drawn = new Set();
  const printWidth = 700;

  // Charts. Their colours are names of the page's style, "var(--ink)", looked up when they are drawn.

  function themed(value, style) {
    if (typeof value === "string" && value.startsWith("var(")) return style.getPropertyValue(value.slice(4, -1)).trim();
    if (Array.isArray(value)) return typeof value.at(-1) === "number" ? value : value.map((own) => themed(own, style));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([name, own]) => [name, themed(own, style)]));
  }

  function figureOf(chart) {
    const figure = themed(JSON.parse(chart.nextElementSibling.textContent), getComputedStyle(document.documentElement));
    figure.layout.dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom"; // a finger scrolls the page
    if (chart.clientWidth < 480) narrow(figure);
    return figure;
  }

  function narrow(figure) {
    figure.data = figure.data.filter((trace) => trace.meta !== "wide");
    figure.layout.font.size = 11;
    figure.layout.margin.r = 6;
  }

  function draw(chart) {
    if (drawn.has(chart)) return;
    drawn.add(chart);
    const { data, layout } = figureOf(chart);
    Plotly.newPlot(chart, data, layout, {
      responsive: true, displaylogo: false, typesetMath: false,
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]], // among the others is one that uploads
    });
    chart.on("plotly_afterplot", () => withoutTabStops(chart));
    withoutTabStops(chart);
    chart.dataset.drawn = "";
  }

  function withoutTabStops(chart) { // tools for a mouse; for a keyboard there are the tables
    chart.querySelectorAll(".modebar-btn").forEach((button) => { button.tabIndex = -1; });
  }

  function redraw() {
    for (const chart of drawn) {
      const { data, layout } = figureOf(chart);
      Plotly.react(chart, data, layout);
    }
  }

  function drawInTurn() {
    const near = new IntersectionObserver((entries) => {
      for (const entry of entries) if (entry.isIntersecting) draw(entry.target);
    }, { rootMargin: "400px" });
    charts.forEach((chart) => near.observe(chart));
    const idle = window.requestIdleCallback ?? ((work) => setTimeout(work, 30));
    const next = () => {
      const chart = charts.find((own) => !drawn.has(own));
      if (!chart) return document.documentElement.setAttribute("data-charts", "drawn");
      draw(chart);
      idle(next);
    };
    idle(next);
  }

  function print(begins) {
    document.documentElement.classList.toggle("printing", begins);
    if (begins) charts.forEach(draw);
    redraw();
    for (const chart of drawn) Plotly.relayout(chart, begins ? { width: printWidth } : { width: null, autosize: true });
  }

  async function start() {
    const letters = atob(document.getElementById("plotly").textContent);
    const packed = new Uint8Array(letters.length);
    for (let place = 0; place < letters.length; place++) packed[place] = letters.charCodeAt(place);
    const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(unpacked).text();
    document.head.append(script);
    drawInTurn();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
    addEventListener("beforeprint", () => print(true));
    addEventListener("afterprint", () => print(false));
  }

  // Tables: sorted by a click on a column's title, and searched.

  function keyOf(row, column) {
    const cell = row.cells[column];
    const number = Number(cell.dataset.value);
    return cell.classList.contains("n") ? (cell.dataset.value === undefined ? -Infinity : number) : cell.textContent.trim();
  }

  function compare(one, other) {
    return typeof one === "number" ? one - other : one.localeCompare(other, undefined, { numeric: true });
  }

  function sortBy(table, title, column) {
    const down = title.getAttribute("aria-sort") === "ascending";
    table.querySelectorAll("th[aria-sort]").forEach((own) => own.setAttribute("aria-sort", "none"));
    title.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => [keyOf(row, column), row]);
    rows.sort(([one], [other]) => (down ? compare(other, one) : compare(one, other)));
    body.append(...rows.map(([, row]) => row));
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    const titles = table.tHead.rows[table.tHead.rows.length - 1].cells;
    [...titles].forEach((title, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...title.childNodes);
      button.addEventListener("click", () => sortBy(table, title, column));
      title.append(button);
      title.setAttribute("aria-sort", "none");
    });
  }

  for (const field of document.querySelectorAll("input[data-table]")) {
    const rows = [...document.getElementById(field.dataset.table).tBodies[0].rows];
    const told = field.parentElement.querySelector("[role=status]");
    field.parentElement.hidden = rows.length < 8;
    field.addEventListener("input", () => {
      const wanted = field.value.trim().toLowerCase();
      rows.forEach((row) => { row.hidden = !row.textContent.toLowerCase().includes(wanted); });
      const found = rows.filter((row) => !row.hidden).length;
      told.textContent = wanted ? `${found} of ${rows.length} ${told.dataset.noun}` : "";
    });
  }

  // Tables to copy.

  async function copy(text) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = document.createElement("textarea"); // where the clipboard is not open to scripts
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
  }

  for (const button of document.querySelectorAll("button[data-copies]")) {
    button.parentElement.hidden = false;
    button.addEventListener("click", async () => {
      await copy(JSON.parse(document.getElementById(button.dataset.copies).textContent));
      button.parentElement.querySelector("[role=status]").textContent = `Copied as ${button.textContent}.`;
    });
  }

  function withoutCharts(error) {
    document.getElementById("no-charts").hidden = false;
    document.querySelectorAll("details").forEach((own) => { own.open = true; });
    charts.forEach((chart) => { chart.style.minHeight = 0; });
    throw error;
  }

  if (charts.length) start().catch(withoutCharts);
})();
