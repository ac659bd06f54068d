// A connection to a live sink that comes back by itself: WebSocket or SSE, with back-off.

const DELAY_MS = 1000;
const DELAY_FACTOR = 1.5;
const DELAY_MAX_MS = 30_000;

/** Silence of so many keep-alives means that the connection is dead. */
const SILENT_KEEP_ALIVES = 2.5;
const KEEP_ALIVE_MS = 30_000;

const FRAME_TYPES = ["message", "hello", "snapshot", "update", "gap", "ping", "error"];

/** How long to wait before attempt `attempt` (from 0): growing, within limits, and not all clients at once. */
export function delayMs(attempt, random = Math.random) {
  const delay = Math.min(DELAY_MS * DELAY_FACTOR ** attempt, DELAY_MAX_MS);
  return delay * (0.8 + 0.4 * random());
}

/** The URL of a sink's path, as seen from the page at `page`, also where a proxy serves it under a prefix. */
export function sinkUrl(sink, page) {
  const url = new URL(`.${sink.path}`, new URL(".", page));
  if (sink.type === "websocket") {
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  }
  return url.href;
}

/**
 * Keeps a connection to one of several sinks.
 *
 * `findSinks()` gives the sinks, best first, before every attempt. `onFrame(frame)` gets every frame, `onState(state,
 * sink)` the states `connecting`, `live`, `offline`, and `onProblem(text)` what a server said, or null when it is over.
 */
export class Connection {
  #attempt = 0;
  #refused = 0;
  #isGreeted = false;
  #socket = null;
  #timer = 0;
  #watchdog = 0;
  #silenceMs = KEEP_ALIVE_MS * SILENT_KEEP_ALIVES;

  constructor({ findSinks, onFrame, onState, onProblem }) {
    this.findSinks = findSinks;
    this.onFrame = onFrame;
    this.onState = onState;
    this.onProblem = onProblem;
  }

  /** Connects now, whatever it was doing. */
  async connect() {
    this.#drop();
    this.onState("connecting", null);
    const attempt = {};
    this.#socket = attempt;
    let sinks;
    try {
      sinks = await this.findSinks();
    } catch (error) {
      sinks = [];
      this.onProblem(`The server does not answer: ${error.message}`);
    }
    // Another attempt may have begun meanwhile.
    if (this.#socket !== attempt) {
      return;
    }
    if (sinks.length === 0) {
      this.#retry();
      return;
    }
    // A sink that refuses a client without filters makes place for the next one.
    this.#open(sinks[this.#refused % sinks.length]);
  }

  /** Tries again at once if it is waiting: the network is back, or somebody looks. */
  wake() {
    if (this.#timer !== 0) {
      this.#attempt = 0;
      this.connect();
    }
  }

  #open(sink) {
    const url = sinkUrl(sink, document.baseURI);
    const socket = sink.type === "websocket" ? new WebSocket(url) : new EventSource(url);
    this.#socket = socket;
    this.#isGreeted = false;
    const isCurrent = () => this.#socket === socket;
    const take = (event) => {
      // An EventSource's own failures are events without data.
      if (isCurrent() && typeof event.data === "string") {
        this.#take(event.data, sink);
      }
    };
    const lost = () => isCurrent() && this.#retry();
    if (sink.type === "websocket") {
      socket.onmessage = take;
      socket.onclose = lost;
    } else {
      for (const name of new Set([...FRAME_TYPES, sink.event_name].filter(Boolean))) {
        socket.addEventListener(name, take);
      }
      // A browser would reconnect without back-off.
      socket.onerror = (event) => typeof event.data === "string" || lost();
    }
    this.#watch();
  }

  #take(text, sink) {
    let frame;
    try {
      frame = JSON.parse(text);
    } catch {
      return;
    }
    if (frame?.type === "hello") {
      this.#isGreeted = true;
      this.#attempt = 0;
      this.#silenceMs = (frame.keep_alive_ms ?? KEEP_ALIVE_MS) * SILENT_KEEP_ALIVES;
      this.onProblem(null);
      this.onState("live", sink);
    } else if (!this.#isGreeted) {
      // It wants parameters, or sends bare rows, which say nothing of their metric. The next sink may do.
      this.#refused += 1;
      const reason = frame?.type === "error" ? frame.message : "this page needs `envelope: metric`";
      this.onProblem(`${sink.name ?? sink.path}: ${reason}`);
      this.#retry();
      return;
    }
    this.#watch();
    this.onFrame(frame);
  }

  /** A connection that is silent for too long is dead, though nobody said so. */
  #watch() {
    clearTimeout(this.#watchdog);
    this.#watchdog = setTimeout(() => this.#retry(), this.#silenceMs);
  }

  #retry() {
    this.#drop();
    this.onState("offline", null);
    this.#timer = setTimeout(() => this.connect(), delayMs(this.#attempt));
    this.#attempt += 1;
  }

  #drop() {
    clearTimeout(this.#timer);
    clearTimeout(this.#watchdog);
    this.#timer = 0;
    const socket = this.#socket;
    this.#socket = null;
    socket?.close?.();
  }
}
