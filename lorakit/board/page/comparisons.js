// Comparisons: a table for each task with intervals drawn, what is within noise, and the advice.

import { h, nothing, svg, wide } from "./dom.js";
import { bytes, duration, number, score, spoken } from "./format.js";

const [WIDTH, TALL] = [140, 22]; // of a drawn interval

export class Comparisons {
  constructor(board, id) {
    this.board = board;
    this.id = id;
    this.element = h("section", { "aria-label": "Comparisons" }, nothing("Loading …"));
  }

  async update() {
    const list = await this.board.source.get("api/comparisons");
    const found = list.find((each) => each.id === this.id) ?? list[0];
    const value = found && (await this.read(found.id));
    const key = JSON.stringify([list, value]);
    if (key === this.key) return;
    this.key = key;
    if (!found) {
      this.element.replaceChildren(
        h("h1", {}, "Comparisons"),
        nothing("There is no comparison in this folder. `lorakit compare compare.yaml` makes one."),
      );
      return;
    }
    const links = list.map((each) =>
      h(
        "a",
        {
          href: `#/comparisons/${encodeURIComponent(each.id)}`,
          "aria-current": each === found ? "page" : null,
        },
        each.name,
      ),
    );
    this.element.replaceChildren(
      list.length > 1 ? h("nav", { class: "tabs", "aria-label": "Comparisons" }, links) : "",
      h("h1", {}, value.name ?? found.name),
      value.failure ? h("p", { class: "failure" }, value.failure) : "",
      this.board.source.live && !value.failure
        ? h(
            "p",
            {},
            h("a", { href: `#/vote/${encodeURIComponent(found.id)}` }, "Vote blindly between answers"),
          )
        : "",
      ...progress(value.runs ?? []),
      value.recommendation ? advice(value.recommendation) : "",
      ...(value.tasks ?? []).map(task),
      ...(value.notes ?? []).map((note) => h("p", { class: "quiet" }, note)),
    );
  }

  /** Return the values of a comparison; of one that is damaged, only the reason. */
  async read(id) {
    try {
      return await this.board.source.get(`api/comparisons/${encodeURIComponent(id)}`);
    } catch (error) {
      return { failure: error.message };
    }
  }
}

function progress(runs) {
  const open = runs.filter((run) => run.state !== "finished");
  const failed = open.filter((run) => run.state === "failed");
  return [
    open.length
      ? h("p", { class: "quiet" }, `${runs.length - open.length} of ${runs.length} runs are finished.`)
      : "",
    ...failed.map((run) =>
      h("p", { class: "failure" }, `${run.id} failed: ${run.error ?? "its folder says why"}`),
    ),
  ];
}

function advice({ text, rules }) {
  const items = (rules ?? []).map(({ rule, says }) =>
    h("li", {}, h("span", { class: "rule" }, rule), " ", h("span", {}, says)),
  );
  return h(
    "article",
    { class: "card advice" },
    h("h2", {}, "Recommendation"),
    h("p", {}, text),
    items.length ? h("details", { open: true }, h("summary", {}, "By these rules"), h("ol", {}, items)) : "",
  );
}

function task(each) {
  const rows = each.rows ?? [];
  const scale = Object.fromEntries(each.metrics.map((metric) => [metric, range(rows, metric)]));
  const exports = [...new Set(rows.flatMap((row) => Object.keys(row.export ?? {})))];
  const numbers = ["Tokens/s", "Time", "Peak memory", ...exports.map((name) => name.toUpperCase())];
  const heads = ["Model", "Settings", ...each.metrics.map(spoken)].map((text) =>
    h("th", { scope: "col" }, text),
  );
  const body = rows.map((row) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, row.model),
      h("td", {}, row.settings ?? "–"),
      each.metrics.map((metric) => h("td", {}, drawn(row.scores?.[metric], scale[metric]))),
      h("td", { class: "number" }, number(Math.round(row.tokens_per_second ?? NaN))),
      h("td", { class: "number" }, duration(row.seconds)),
      h("td", { class: "number" }, row.peak_memory_mb ? bytes(row.peak_memory_mb * 1e6) : "–"),
      exports.map((name) => h("td", { class: "number" }, exported(row.export?.[name]))),
    ),
  );
  const head = h(
    "tr",
    {},
    heads,
    numbers.map((text) => h("th", { scope: "col", class: "number" }, text)),
  );
  return h(
    "article",
    { class: "task" },
    h("h2", {}, each.name, h("small", {}, ` ${sizes(each)}`)),
    wide(`Scores of ${each.name}`, h("table", {}, h("thead", {}, head), h("tbody", {}, body))),
    ...differences(each),
  );
}

function sizes({ kind, sizes: counts }) {
  const rows = counts
    ? `, ${Object.entries(counts)
        .map(([part, count]) => `${number(count)} ${part}`)
        .join(", ")} rows`
    : "";
  return `${spoken(kind ?? "")}${rows}`;
}

/** Make the sentences about pairs: those of the metric that decides, and the other ones folded. */
function differences({ metrics, pairs = [] }) {
  const list = (found) =>
    h(
      "ul",
      { class: "pairs" },
      found.map((pair) => h("li", {}, verdict(pair))),
    );
  const [chief, others] = [
    pairs.filter((p) => p.metric === metrics[0]),
    pairs.filter((p) => p.metric !== metrics[0]),
  ];
  return [
    chief.length ? list(chief) : "",
    others.length
      ? h("details", {}, h("summary", {}, `${others.length} differences in other metrics`), list(others))
      : "",
  ];
}

function exported(value) {
  if (!value) return "–";
  if (value.error) return h("small", { class: "failure" }, value.error);
  const speed = value.tokens_per_second ? `, ${number(Math.round(value.tokens_per_second))} tokens/s` : "";
  return `${bytes(value.bytes)}${speed}`;
}

/** Return [low, high] that holds all intervals of a metric. */
function range(rows, metric) {
  const found = rows.map((row) => row.scores?.[metric]).filter(Boolean);
  const low = Math.min(...found.map((s) => s.low ?? s.value));
  const high = Math.max(...found.map((s) => s.high ?? s.value));
  return high > low ? [low, high] : [low - 0.5, high + 0.5];
}

function drawn(found, [least, most]) {
  if (!found || found.value === null) return "–";
  const { value, low, high } = found;
  const at = (x) => 5 + ((x - least) / (most - least)) * (WIDTH - 10);
  const known = low !== undefined && low !== null;
  const picture = svg(
    "svg",
    { class: "interval", viewBox: `0 0 ${WIDTH} ${TALL}`, "aria-hidden": "true" },
    svg("line", { class: "base", x1: 0, x2: WIDTH, y1: TALL / 2, y2: TALL / 2 }),
    known ? svg("line", { class: "span", x1: at(low), x2: at(high), y1: TALL / 2, y2: TALL / 2 }) : null,
    svg("circle", { cx: at(value), cy: TALL / 2, r: 4 }),
  );
  const text = known ? h("small", {}, `${score(low)} to ${score(high)}`) : "";
  return h("div", { class: "score" }, h("b", {}, score(value)), picture, text);
}

/** Return the sentence about two rows that were compared; a difference is the second minus the first. */
export function verdict({ first, second, metric, difference, p_value: p, within_noise: noise }) {
  const chance = p === null || p === undefined ? "" : p < 0.001 ? ", p < 0.001" : `, p = ${p.toFixed(3)}`;
  const gap = `${score(Math.abs(difference.value))} in ${spoken(metric)}`;
  const interval = `(${score(difference.low)} to ${score(difference.high)}${chance})`;
  if (noise)
    return `${label(first)} and ${label(second)}: the difference of ${gap} is within noise ${interval}.`;
  const sign = difference.value >= 0 ? "above" : "below";
  return `${label(second)} is ${gap} ${sign} ${label(first)} ${interval}.`;
}

function label(side) {
  return [side.model, side.settings].filter(Boolean).join(", ");
}
