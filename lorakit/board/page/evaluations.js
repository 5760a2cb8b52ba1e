// Evaluations of the selected runs: the last one of each, and all of them, run by run.

import { begun, runPath } from "./data.js";
import { h, nothing, wide } from "./dom.js";
import { digits, number, spoken } from "./format.js";

const LOWER = /loss|perplexity/; // quantities of which less is better

/** Return whether less of a quantity is better. */
function isLower(name) {
  return LOWER.test(name);
}

/** Return the index of the best of values, or -1 if fewer than two are numbers. */
function best(values, lower) {
  const found = values.filter((value) => typeof value === "number");
  if (found.length < 2) return -1;
  return values.indexOf(lower ? Math.min(...found) : Math.max(...found));
}

export class Evaluations {
  constructor(board) {
    this.board = board;
    this.element = h("section", { "aria-label": "Evaluations" });
  }

  async update() {
    const runs = this.board.chosen().filter(begun);
    const key = JSON.stringify(runs.map((run) => [run.id, run.updated]));
    if (key === this.key) return;
    const all = await Promise.all(runs.map((run) => this.board.source.get(runPath(run.id, "evaluations"))));
    this.key = key;
    const measured = runs.map((run, i) => [run, all[i]]).filter(([, rows]) => rows.length);
    if (!measured.length) {
      const text = this.board.selected.size
        ? "These runs have not been evaluated yet."
        : "Select runs in the table above.";
      this.element.replaceChildren(nothing(text));
      return;
    }
    const open = new Set([...this.element.querySelectorAll("details[open]")].map((each) => each.dataset.run));
    const last = measured.map(([run, rows]) => [run.name, rows[rows.length - 1]]);
    this.element.replaceChildren(
      h("h2", {}, "Last evaluation"),
      table("Last evaluation of each run", "Run", last),
      ...measured.map(([run, rows]) =>
        h(
          "details",
          { open: open.has(run.id) || measured.length === 1, data: { run: run.id } },
          h("summary", {}, `${run.name}: ${rows.length} ${rows.length === 1 ? "evaluation" : "evaluations"}`),
          table(
            `Evaluations of ${run.name}`,
            null,
            rows.map((row) => [null, row]),
          ),
        ),
      ),
    );
  }
}

function table(label, first, rows) {
  const names = [...new Set(rows.flatMap(([, row]) => Object.keys(row)))];
  const shown = ["step", ...names.filter((name) => name !== "step" && !/_(low|high)$/.test(name))];
  const heads = [...(first ? [first] : []), ...shown.map((name) => spoken(name))];
  const winners = Object.fromEntries(
    shown.map((name) => [
      name,
      name === "step"
        ? -1
        : best(
            rows.map(([, row]) => row[name]),
            isLower(name),
          ),
    ]),
  );
  const body = rows.map(([head, row], i) =>
    h(
      "tr",
      {},
      head === null ? null : h("th", { scope: "row" }, head),
      shown.map((name) => cell(row, name, winners[name] === i)),
    ),
  );
  const top = h(
    "tr",
    {},
    heads.map((text, i) => h("th", { scope: "col", class: first && i === 0 ? null : "number" }, text)),
  );
  return wide(label, h("table", {}, h("thead", {}, top), h("tbody", {}, body)));
}

function cell(row, name, wins) {
  const [low, high] = [row[`${name}_low`], row[`${name}_high`]];
  const interval = low === undefined ? null : h("small", {}, ` ${number(low)} to ${number(high)}`);
  return h(
    "td",
    { class: "number" },
    name === "step" ? number(row[name]) : digits(row[name]),
    interval,
    wins ? h("small", { class: "best" }, " best") : null,
  );
}
