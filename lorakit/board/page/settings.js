// Settings of the selected runs side by side: those that differ are shown, equal ones are folded.

import { runPath } from "./data.js";
import { h, nothing, unseen, wide } from "./dom.js";

/** Return [[name, texts, whether they differ], ...] of the settings of runs, by name. */
export function compared(settings) {
  const names = [...new Set(settings.flatMap((each) => Object.keys(each)))].sort();
  return names.map((name) => {
    const texts = settings.map((each) => (name in each ? written(each[name]) : "not set"));
    return [name, texts, texts.some((text) => text !== texts[0])];
  });
}

function written(value) {
  return typeof value === "string" ? value : JSON.stringify(value);
}

export class Settings {
  constructor(board) {
    this.board = board;
    this.known = new Map();
    this.element = h("section", { "aria-label": "Settings" });
  }

  async update() {
    const runs = this.board.chosen();
    const key = JSON.stringify(runs.map((run) => run.id));
    if (key === this.key) return;
    for (const run of runs) {
      if (this.known.has(run.id)) continue;
      this.known.set(run.id, await this.board.source.get(runPath(run.id, "settings")));
    }
    this.key = key;
    if (!runs.length) {
      this.element.replaceChildren(nothing("Select runs in the table above."));
      return;
    }
    const rows = compared(runs.map((run) => this.known.get(run.id)));
    const [other, equal] = [rows.filter((row) => row[2]), rows.filter((row) => !row[2])];
    const one = runs.length === 1;
    const text = one
      ? `${equal.length} settings of ${runs[0].name}`
      : other.length
        ? `${other.length} ${other.length === 1 ? "setting differs" : "settings differ"} between ${runs.length} runs`
        : "All settings are equal";
    const folded = h(
      "details",
      { open: one || !other.length },
      h("summary", {}, `${equal.length} equal settings`),
      table(
        "Equal settings",
        ["Setting", "Value"],
        equal.map(([name, texts]) => [name, [texts[0]], false]),
      ),
    );
    const heads = ["Setting", ...runs.map((run) => run.name)];
    this.element.replaceChildren(
      h("h2", {}, text),
      other.length ? table("Settings that differ", heads, other) : "",
      equal.length ? folded : "",
    );
  }
}

function table(label, heads, rows) {
  const body = rows.map(([name, texts, differs]) => {
    const seen = new Map();
    texts.forEach((text) => seen.set(text, (seen.get(text) ?? 0) + 1));
    const most = Math.max(...seen.values());
    const cells = texts.map((text) => {
      const rare = differs && seen.get(text) < most;
      return h(
        "td",
        { class: rare ? "other" : null },
        h("code", {}, text),
        rare ? unseen(" (unlike most)") : null,
      );
    });
    return h("tr", {}, h("th", { scope: "row" }, h("code", {}, name)), cells);
  });
  const head = h(
    "tr",
    {},
    heads.map((text) => h("th", { scope: "col" }, text)),
  );
  return wide(label, h("table", { class: "settings" }, h("thead", {}, head), h("tbody", {}, body)));
}
