// What the page knows of the metrics: the latest row per key, from the frames of a live sink. No DOM, no network.

/** Most rows of one metric that are kept; the one updated longest ago goes first. */
const ROWS_MAX = 10_000;

export class Metrics {
  constructor() {
    /** Name to {name, keys, columns, rows, lost, updated}. */
    this.byName = new Map();
  }

  /** Takes one frame. Returns the names of the metrics that changed. */
  apply(frame) {
    switch (frame?.type) {
      case "hello":
        return this.#hello(frame);
      case "snapshot":
      case "update":
        return this.#rows(frame);
      case "gap":
        return this.#gap(frame);
      default:
        return [];
    }
  }

  #hello(frame) {
    const before = [...this.byName.keys()];
    const known = this.byName;
    this.byName = new Map();
    for (const { name, keys } of frame.metrics ?? []) {
      const old = known.get(name);
      const same = old !== undefined && JSON.stringify(old.keys) === JSON.stringify(keys);
      // What was there stays on the page until the snapshot replaces it.
      this.byName.set(name, same ? old : newMetric(name, keys));
    }
    return [...new Set([...before, ...this.byName.keys()])];
  }

  #rows(frame) {
    const metric = this.#metric(frame.metric);
    // A snapshot replaces what there was; the further parts of a long one add to it.
    if (frame.type === "snapshot" && (frame.part ?? 1) === 1) {
      metric.rows.clear();
      metric.columns = [];
      metric.lost = 0;
    }
    for (const row of frame.data ?? []) {
      for (const column of Object.keys(row)) {
        if (!metric.columns.includes(column)) {
          metric.columns.push(column);
        }
      }
      const key = JSON.stringify(metric.keys.map((column) => row[column] ?? null));
      // Deleted first, so that the map is in the order of the updates.
      metric.rows.delete(key);
      metric.rows.set(key, row);
      if (metric.rows.size > ROWS_MAX) {
        metric.rows.delete(metric.rows.keys().next().value);
      }
    }
    if ((frame.data ?? []).length > 0) {
      metric.updated = frame.timestamp;
    }
    return [metric.name];
  }

  #gap(frame) {
    const metric = this.#metric(frame.metric);
    metric.lost += frame.lost ?? 0;
    return [metric.name];
  }

  #metric(name) {
    let metric = this.byName.get(name);
    if (metric === undefined) {
      metric = newMetric(name, []);
      this.byName.set(name, metric);
    }
    return metric;
  }
}

function newMetric(name, keys) {
  return { name, keys: keys ?? [], columns: [], rows: new Map(), lost: 0, updated: null };
}

const collator = new Intl.Collator(undefined, { numeric: true });

/** The rows of a metric as [key, row], sorted by key. */
export function sortedRows(metric) {
  const text = (row, column) => String(row[column] ?? "");
  return [...metric.rows].sort(([, a], [, b]) => {
    for (const column of metric.keys) {
      const order = collator.compare(text(a, column), text(b, column));
      if (order !== 0) {
        return order;
      }
    }
    return 0;
  });
}

const number = new Intl.NumberFormat(undefined, { maximumFractionDigits: 3 });

/** How a value is shown, as text. */
export function shown(value) {
  if (value === null || value === undefined) {
    return "–";
  }
  if (typeof value === "number") {
    // Very large and very small numbers would lose their digits.
    const plain = value === 0 || (Math.abs(value) >= 0.001 && Math.abs(value) < 1e15);
    return plain ? number.format(value) : String(value);
  }
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}
