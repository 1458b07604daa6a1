const data = JSON.parse(document.getElementById("report-data").textContent);
const root = document.documentElement;
const drawn = new Map();
const hidden = new Set(data.hidden);
let metric = "ms";

// Colours that would be lost on a dark page, and what stands for them there.
const forDark = {"#000000": "#ffffff", "#332288": "#a594f9", "#882255": "#e77cae", "#117733": "#4fbf73",
  "#0072B2": "#4aa8e8", "#661100": "#d9866f", "#4B4B4B": "#b5b5b5", "#999933": "#c9c95e", "#AA4466": "#e08aa3",
  "#8C8C8C": "#b0b0b0", "#CC79A7": "#e39cc4"};
const isDark = () => root.classList.contains("dark");
const shade = colour => (isDark() && forDark[colour]) || colour;

function themed(value) {
  if (typeof value === "string") return shade(value);
  if (Array.isArray(value)) return value.map(themed);
  if (value && typeof value === "object")
    return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, themed(v)]));
  return value;
}

function config() {
  const css = name => getComputedStyle(root).getPropertyValue(name).trim();
  const ink = css("--ink"), soft = css("--soft"), line = css("--line");
  const font = "system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif";
  return {background: css("--panel"), font, view: {stroke: null}, text: {color: ink}, rule: {color: ink},
    line: {color: soft}, axis: {labelColor: ink, titleColor: soft, gridColor: line, domainColor: soft,
      tickColor: soft, titleFontWeight: "normal", labelFontSize: 11, titleFontSize: 11},
    legend: {labelColor: ink, titleColor: soft, labelFontSize: 11, symbolFillColor: "transparent"}};
}

function specification(id) {
  const chart = data.charts[id];
  const name = data.specs[chart.spec] ? chart.spec : `${chart.spec}-${metric}`;
  const spec = themed(data.specs[name]);
  spec.datasets = {...(spec.datasets || {}), values: chart.values};
  spec.description = chart.title;
  spec.config = config();
  // a height in steps would make Vega-Lite warn that it cannot fit one axis only
  if (spec.height?.step) spec.height = spec.height.step * Math.max(1, chart.rows);
  return spec;
}

async function draw(figure) {
  const id = figure.dataset.chart;
  const wanted = `${isDark()} ${metric}`;
  if (drawn.get(id)?.wanted === wanted) return;
  drawn.get(id)?.result?.finalize();
  const entry = {wanted};
  drawn.set(id, entry);
  entry.result = await vegaEmbed(figure.querySelector(".plot"), specification(id), {
    renderer: "svg", downloadFileName: id, tooltip: {theme: isDark() ? "dark" : "light"},
    actions: {export: {svg: true, png: true}, source: false, compiled: false, editor: false}, scaleFactor: {png: 2},
  });
  await hideLines(entry.result.view);
}

async function hideLines(view) {
  try { await view.signal("hidden", [...hidden]).runAsync(); } catch { /* a chart without lines to hide */ }
}

const visible = figure => figure.offsetParent !== null;
const figures = () => [...document.querySelectorAll("figure.chart")];
const watcher = new IntersectionObserver(entries => {
  for (const entry of entries) if (entry.isIntersecting) draw(entry.target);
}, {rootMargin: "300px"});
const redraw = () => Promise.all(figures().filter(f => drawn.has(f.dataset.chart) && visible(f)).map(draw));
const drawAll = () => Promise.all(figures().filter(visible).map(draw));

function legends() {
  for (const legend of document.querySelectorAll(".legend")) {
    legend.replaceChildren(...data.looks.map(({name, colour, path, sink}) => {
      const button = document.createElement("button");
      button.type = "button";
      button.value = name;
      button.setAttribute("aria-pressed", String(!hidden.has(name)));
      const dash = sink ? "" : ' stroke-dasharray="3 2"';
      button.innerHTML = `<svg width="26" height="14" viewBox="-13 -7 26 14" aria-hidden="true"><line x1="-13" x2="13"
        stroke="${shade(colour)}" stroke-width="1.6"${dash}/><path d="${path}" transform="scale(5)"
        fill="${shade(colour)}"/></svg>`;
      button.append(name + (sink ? "" : " (no sink)"));
      button.onclick = async () => {
        if (!hidden.delete(name)) hidden.add(name);
        legends();
        await Promise.all([...drawn.values()].filter(d => d.result).map(d => hideLines(d.result.view)));
      };
      return button;
    }));
  }
}

function press(group, button) {
  for (const other of group.querySelectorAll("button"))
    other.setAttribute("aria-pressed", String(other === button));
}

function show(name, value) {
  for (const part of document.querySelectorAll(`[data-shown="${name}"]`)) part.hidden = part.id !== `show-${value}`;
  for (const figure of figures()) {
    if (!visible(figure)) continue;
    watcher.unobserve(figure);
    watcher.observe(figure);
  }
}

for (const group of document.querySelectorAll("[data-choice=metric]"))
  for (const button of group.querySelectorAll("button"))
    button.onclick = () => { metric = button.value; press(group, button); return redraw(); };
for (const group of document.querySelectorAll("div[data-show]"))
  for (const button of group.querySelectorAll("button"))
    button.onclick = () => { press(group, button); show(group.dataset.show, button.value); };
for (const select of document.querySelectorAll("select[data-show]"))
  select.onchange = () => show(select.dataset.show, select.value);

function setTheme(dark) {
  root.classList.toggle("dark", dark);
  legends();
  return redraw();
}
document.getElementById("theme").onclick = () => setTheme(!isDark());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", event => setTheme(event.matches));

async function trialTable() {
  const source = document.getElementById("table-library").textContent;
  const url = URL.createObjectURL(new Blob([source], {type: "text/javascript"}));
  const {default: DataTable} = await import(url);
  URL.revokeObjectURL(url);
  const {columns, rows} = data.trials;
  // Whichever way a column is sorted, what has no value comes last.
  const missing = value => value === null || value === "";
  const by = sign => (a, b) => missing(a) || missing(b) ? missing(a) - missing(b) : sign * (a - b);
  DataTable.type("num-or-none", {order: {asc: by(1), desc: by(-1)}});
  return new DataTable("#trial-table", {
    data: rows, deferRender: true, pageLength: 25, scrollX: true, order: [], autoWidth: false,
    columns: columns.map(({title, number}) => ({title, type: number ? "num-or-none" : "string", defaultContent: "",
      className: number ? "dt-right" : "dt-left",
      render: number ? undefined : DataTable.render.text()})),
    columnDefs: columns.map(({number, list}, i) => ({targets: i,
      columnControl: ["order", [list ? "searchList" : number ? "searchNumber" : "searchText"]]})),
    ordering: {indicators: false, handler: false},
    layout: {topStart: ["pageLength", {buttons: [{extend: "csvHtml5", text: "CSV", filename: data.name},
      {extend: "colvis", text: "columns"}]}], topEnd: "search"},
    language: {search: "find ", info: "_START_ to _END_ of _TOTAL_ trials", infoFiltered: "(of _MAX_)",
      lengthMenu: "_MENU_ a page"},
  });
}

legends();
for (const figure of figures()) watcher.observe(figure);
window.sweepReport = {drawAll, table: trialTable()};
