// The table of runs: sorted, filtered, with a box for each run that selects it.

import { runPath } from "./data.js";
import { announce, confirmed, h, say, unseen } from "./dom.js";
import { bytes, date, digits, duration, number } from "./format.js";
import { swatch } from "./palette.js";

const STATES = { running: "●", finished: "✓", stopped: "■", failed: "✕" };
const memory = (run) => (run.peak_memory_mb == null ? null : bytes(run.peak_memory_mb * 1e6));

// key, head, text of a run, and whether it is a number
const COLUMNS = [
  ["name", "Run", (run) => run.name, false],
  ["state", "State", (run) => run.state, false],
  ["step", "Step", (run) => steps(run), true],
  ["loss", "Loss", (run) => digits(run.loss), true],
  ["eval_loss", "Validation", (run) => digits(run.eval_loss), true],
  ["tokens_per_second", "Tokens/s", (run) => number(Math.round(run.tokens_per_second ?? NaN)), true],
  ["peak_memory_mb", "Memory", (run) => memory(run) ?? "–", true],
  ["seconds", "Time", (run) => duration(run.seconds), true],
  ["started", "Started", (run) => date(run.started), true],
  ["objective", "Objective", (run) => run.objective ?? "–", false],
  ["model", "Model", (run) => leaf(run.model), false],
];

function leaf(path) {
  return String(path ?? "–")
    .split("/")
    .slice(-1)[0];
}

function steps(run) {
  return run.total_steps ? `${number(run.step ?? 0)} / ${number(run.total_steps)}` : number(run.step);
}

/** Return the runs in the order of a column. What has no value comes last, either way. */
export function sorted(runs, { key, down }) {
  const missing = (run) => run[key] === null || run[key] === undefined;
  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number"
      ? a - b
      : String(a).localeCompare(String(b), "en", { numeric: true });
  return [...runs].sort((a, b) => {
    if (missing(a) || missing(b)) return missing(a) - missing(b);
    return (down ? -1 : 1) * compare(a[key], b[key]);
  });
}

/** Return the runs in which every word of a text occurs: in name, state, model or objective. */
function filtered(runs, text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  return runs.filter((run) => {
    const hay = [run.id, run.name, run.state, run.model, run.objective].join(" ").toLowerCase();
    return words.every((word) => hay.includes(word));
  });
}

export class RunsTable {
  constructor(board) {
    this.board = board;
    this.rows = new Map();
    this.states = new Map();
    this.order = { key: "started", down: true };
    this.text = "";
    this.count = h("p", { class: "quiet count" });
    this.all = h("input", {
      type: "checkbox",
      "aria-label": "Select all runs shown",
      onchange: () => this.#all(),
    });
    this.body = h("tbody", {});
    this.heads = new Map(COLUMNS.map(([key, head, , numeric]) => [key, this.#head(key, head, numeric)]));
    const filter = h("input", {
      type: "search",
      placeholder: "Filter runs",
      "aria-label": "Filter runs",
      oninput: () => {
        this.text = filter.value;
        this.update();
      },
    });
    this.empty = h("p", { class: "quiet nothing", hidden: true });
    const none = h(
      "button",
      { type: "button", class: "plain", onclick: () => board.select([]) },
      "Clear selection",
    );
    const first = h("tr", {}, h("th", { class: "pick", scope: "col" }, this.all), [...this.heads.values()]);
    if (board.source.live) first.append(h("th", { scope: "col" }, unseen("Actions")));
    this.element = h(
      "section",
      { "aria-label": "Runs" },
      h("div", { class: "controls" }, filter, this.count, none),
      h(
        "div",
        { class: "wide runs", role: "region", "aria-label": "Table of runs", tabindex: 0 },
        h("table", {}, h("thead", {}, first), this.body),
        this.empty,
      ),
    );
  }

  update() {
    const { runs, selected } = this.board;
    this.shown = sorted(filtered(runs, this.text), this.order);
    const ids = new Set(this.shown.map((run) => run.id));
    for (const [id, row] of this.rows) {
      if (ids.has(id)) continue;
      row.element.remove();
      this.rows.delete(id);
    }
    this.shown.forEach((run, i) => {
      const row = this.rows.get(run.id) ?? this.#row(run);
      row.fill(run);
      if (this.body.children[i] !== row.element)
        this.body.insertBefore(row.element, this.body.children[i] ?? null);
    });
    for (const [key, head] of this.heads) {
      const direction = this.order.down ? "descending" : "ascending";
      head.setAttribute("aria-sort", key === this.order.key ? direction : "none");
    }
    const part =
      this.shown.length === runs.length ? `${runs.length}` : `${this.shown.length} of ${runs.length}`;
    say(this.count, `${part} ${runs.length === 1 ? "run" : "runs"}, ${selected.size} selected`);
    this.empty.hidden = this.shown.length > 0;
    say(this.empty, runs.length ? "No run has these words." : "There are no runs here yet.");
    this.all.checked = this.shown.length > 0 && this.shown.every((run) => selected.has(run.id));
    this.#tell(runs);
  }

  /** Say which runs changed their state since the last time. */
  #tell(runs) {
    const told = [];
    for (const run of runs) {
      const before = this.states.get(run.id);
      if (this.states.size && before !== run.state) told.push(`${run.name}: ${run.state}`);
    }
    this.states = new Map(runs.map((run) => [run.id, run.state]));
    if (told.length) announce(told.join(", "));
  }

  #head(key, text, numeric) {
    const sort = () => {
      this.order = { key, down: this.order.key === key ? !this.order.down : numeric };
      this.update();
    };
    return h(
      "th",
      { scope: "col", class: numeric ? `number ${key}` : key },
      h("button", { type: "button", class: "sort", onclick: sort }, text),
    );
  }

  #all() {
    const ids = this.shown.map((run) => run.id);
    const others = [...this.board.selected].filter((id) => !ids.includes(id));
    this.board.select(this.all.checked ? [...others, ...ids] : others);
  }

  #row(run) {
    const box = h("input", { type: "checkbox", onchange: () => this.board.toggle(run.id, box.checked) });
    const line = h("span", {});
    const name = h("span", { class: "name" });
    const cells = new Map();
    const element = h(
      "tr",
      {},
      h(
        "td",
        { class: "pick" },
        h("label", {}, box, line, unseen("Select "), h("span", { class: "unseen" }, run.name)),
      ),
    );
    for (const [key, , , numeric] of COLUMNS) {
      const cell = h(key === "name" ? "th" : "td", {
        class: numeric ? `number ${key}` : key,
        scope: key === "name" ? "row" : null,
      });
      cells.set(key, cell);
      element.append(cell);
    }
    cells.get("name").append(name);
    const action = h("td", { class: "action" });
    if (this.board.source.live) element.append(action);
    let slot;
    const fill = (now) => {
      box.checked = this.board.selected.has(now.id);
      element.classList.toggle("selected", box.checked);
      const place = this.board.slots.get(now.id);
      if (place !== slot) line.replaceChildren(place === undefined ? "" : swatch(place));
      slot = place;
      say(name, now.name);
      name.title = now.id;
      for (const [key, , text] of COLUMNS) {
        if (key === "state") this.#state(cells.get(key), now);
        else if (key !== "name") say(cells.get(key), text(now));
      }
      cells.get("model").title = now.model ?? "";
      this.#action(action, now);
    };
    const row = { element, fill };
    this.rows.set(run.id, row);
    return row;
  }

  #state(cell, run) {
    const why = run.state === "failed" ? (run.error ?? "") : "";
    if (cell.dataset.state === run.state && cell.title === why) return;
    cell.dataset.state = run.state;
    cell.title = why;
    const error = why ? h("small", { class: "why" }, why) : "";
    cell.replaceChildren(
      h("span", { "aria-hidden": "true" }, STATES[run.state] ?? "·"),
      ` ${run.state}`,
      error,
    );
  }

  #action(cell, run) {
    const what = run.state === "running" ? "stop" : run.can_resume ? "resume" : "";
    if (cell.dataset.what === what) return;
    cell.dataset.what = what;
    const label = { stop: "Stop", resume: "Resume" }[what];
    const act = () => this.#act(run, what, cell.firstChild);
    cell.replaceChildren(
      what ? h("button", { type: "button", onclick: act }, label, unseen(` ${run.name}`)) : "",
    );
  }

  async #act(run, what, button) {
    const question =
      what === "stop"
        ? `Stop ${run.name} after its current step? It writes a checkpoint and can go on later.`
        : `Let ${run.name} go on from its last checkpoint?`;
    if (!(await confirmed(question, what === "stop" ? "Stop it" : "Resume it"))) return;
    button.disabled = true;
    try {
      await this.board.source.post(runPath(run.id, what));
      announce(what === "stop" ? `${run.name} stops after its step.` : `${run.name} goes on.`);
      await this.board.refresh();
    } catch (error) {
      this.board.trouble(error);
    }
    button.disabled = false;
  }
}
