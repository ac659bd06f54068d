// The page: one section per metric with the latest row per key, updated live. Everything that comes from the server is
// put in as text, never as HTML.

import { Connection } from "./connection.js";
import { Metrics, shown, sortedRows } from "./metrics.js";

/** More rows than this make a page slow and nobody wiser; the note says how many there are. */
const ROWS_SHOWN = 200;

/** As often as an eye follows numbers. */
const DRAW_EVERY_MS = 100;

const STATES = { connecting: "Connecting", live: "Live", offline: "Offline" };

const metrics = new Metrics();
const sections = new Map();
const changed = new Set();
let drawAsked = false;
let lastDraw = 0;
let isLive = false;

const byId = (id) => document.getElementById(id);

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) {
    made.className = className;
  }
  if (text !== undefined) {
    made.textContent = text;
  }
  return made;
}

/** The live sinks of the running graph, WebSocket first. */
async function findSinks() {
  const response = await fetch(new URL("api/v1/pipelines", document.baseURI), { cache: "no-store" });
  if (!response.ok) {
    throw new Error(`${response.status} ${response.statusText}`);
  }
  const sinks = (await response.json()).sinks ?? [];
  const ofType = (type) => sinks.filter((sink) => sink.type === type && typeof sink.path === "string");
  const found = [...ofType("websocket"), ...ofType("sse")];
  if (found.length === 0) {
    problem("There is no live sink. Add one to pipelines.yaml: live: {type: websocket, path: /ws}");
  }
  return found;
}

function state(name, sink) {
  isLive = name === "live";
  const badge = byId("badge");
  badge.dataset.state = name;
  badge.textContent = STATES[name];
  byId("source").textContent = sink === null ? "" : `${sink.name ?? sink.type} ${sink.path}`;
  ask();
}

function problem(text) {
  const notice = byId("notice");
  notice.hidden = text === null;
  notice.textContent = text ?? "";
}

/** Draws what changed, a few times a second however fast rows come. */
function ask() {
  if (!drawAsked) {
    drawAsked = true;
    const wait = Math.max(0, lastDraw + DRAW_EVERY_MS - performance.now());
    setTimeout(() => requestAnimationFrame(draw), wait);
  }
}

function draw() {
  drawAsked = false;
  lastDraw = performance.now();
  for (const name of changed) {
    const metric = metrics.byName.get(name);
    if (metric === undefined) {
      sections.get(name)?.root.remove();
      sections.delete(name);
    } else {
      drawMetric(metric);
    }
  }
  changed.clear();
  let empty = document.querySelector("main > .empty");
  if (sections.size > 0) {
    empty?.remove();
    return;
  }
  if (empty === null) {
    empty = element("p", "empty");
    byId("metrics").append(empty);
  }
  empty.textContent = isLive ? "No metric comes here yet. Name this sink under `to:` of a pipeline." : "No data yet.";
}

function drawMetric(metric) {
  let section = sections.get(metric.name);
  if (section === undefined) {
    section = newSection(metric.name);
    sections.set(metric.name, section);
  }
  const all = sortedRows(metric);
  section.note.textContent = note(metric, all.length);
  // Without keys there is one row: its columns are cards.
  if (metric.keys.length === 0) {
    drawCards(section, metric);
  } else {
    drawTable(section, metric, all.slice(0, ROWS_SHOWN));
  }
}

function newSection(name) {
  const root = element("section", "metric");
  const section = { root, note: element("span", "note"), body: element("div"), shape: "", cells: new Map() };
  root.append(element("h2", "", name), section.note, section.body);
  // By name, so that the page does not depend on what came first.
  const following = [...sections.keys()].filter((other) => other > name).sort()[0];
  byId("metrics").insertBefore(root, sections.get(following)?.root ?? null);
  return section;
}

function note(metric, count) {
  const parts = [];
  if (count === 0) {
    parts.push("waiting for the first row");
  } else if (metric.keys.length > 0) {
    parts.push(count > ROWS_SHOWN ? `${ROWS_SHOWN} of ${count} keys` : `${count} ${count === 1 ? "key" : "keys"}`);
  }
  if (metric.updated !== null) {
    const time = new Date(metric.updated);
    parts.push(Number.isNaN(time.getTime()) ? metric.updated : `updated ${time.toLocaleTimeString()}`);
  }
  if (metric.lost > 0) {
    parts.push(`${metric.lost} frames lost: this client is too slow`);
  }
  return parts.join(" · ");
}

function drawCards(section, metric) {
  const shape = JSON.stringify(metric.columns);
  const row = metric.rows.values().next().value ?? {};
  if (section.shape !== shape) {
    section.shape = shape;
    section.cells.clear();
    const list = element("dl", "cards");
    for (const column of metric.columns) {
      const card = element("div");
      const value = element("dd");
      card.append(element("dt", "", column), value);
      list.append(card);
      section.cells.set(column, value);
    }
    section.body.replaceChildren(list);
  }
  for (const [column, cell] of section.cells) {
    put(cell, row[column]);
  }
}

function drawTable(section, metric, rows) {
  const isNumber = (column) => rows.some(([, row]) => typeof row[column] === "number");
  const columns = metric.columns.map((name) => ({ name, className: isNumber(name) ? "number" : "" }));
  const shape = JSON.stringify([metric.keys, columns]);
  if (section.shape !== shape) {
    section.shape = shape;
    section.cells.clear();
    section.tbody = element("tbody");
    const head = element("tr");
    for (const { name, className } of columns) {
      const cell = element("th", metric.keys.includes(name) ? `${className} key` : className, name);
      cell.scope = "col";
      head.append(cell);
    }
    const thead = element("thead");
    thead.append(head);
    const table = element("table");
    table.append(thead, section.tbody);
    const scroll = element("div", "scroll");
    scroll.append(table);
    section.body.replaceChildren(scroll);
  }
  const stale = new Set(section.cells.keys());
  let place = section.tbody.firstChild;
  for (const [key, row] of rows) {
    stale.delete(key);
    let line = section.cells.get(key);
    if (line === undefined) {
      line = element("tr");
      line.append(...columns.map(({ className }) => element("td", className)));
      section.cells.set(key, line);
    }
    // Rows stand in order already, as a rule; only a new one is put in its place.
    if (line === place) {
      place = place.nextSibling;
    } else {
      section.tbody.insertBefore(line, place);
    }
    columns.forEach(({ name }, index) => put(line.children[index], row[name]));
  }
  for (const key of stale) {
    section.cells.get(key).remove();
    section.cells.delete(key);
  }
}

/** Shows a value, and that it changed. */
function put(cell, value) {
  const text = shown(value);
  if (cell.textContent === text && cell.dataset.filled) {
    return;
  }
  const isFirst = !cell.dataset.filled;
  cell.textContent = text;
  cell.title = typeof value === "number" ? String(value) : text;
  cell.classList.toggle("absent", value === null || value === undefined);
  cell.dataset.filled = "yes";
  if (!isFirst) {
    cell.classList.add("changed");
  }
}

// The class goes when its animation is over, so that the next change shows again.
document.addEventListener("animationend", (event) => event.target.classList.remove("changed"));

const connection = new Connection({
  findSinks,
  onFrame(frame) {
    for (const name of metrics.apply(frame)) {
      changed.add(name);
    }
    ask();
  },
  onState: state,
  onProblem: problem,
});
window.addEventListener("online", () => connection.wake());
document.addEventListener("visibilitychange", () => document.hidden || connection.wake());
connection.connect();
