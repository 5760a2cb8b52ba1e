// The memory of runs: what was measured beside what was forecast, by what it holds.

import { begun, runPath } from "./data.js";
import { h, nothing, wide } from "./dom.js";
import { bytes, spoken } from "./format.js";

const MB = 1e6;
const KINDS = 6; // colours of parts; the rest is "other"

/** Return [[kind, bytes], ...] of a forecast's peak, the largest first, small ones as "other". */
export function parts(forecast) {
  const all = Object.entries(forecast?.plan?.at_peak ?? {}).filter(([, size]) => size > 0);
  all.sort((a, b) => b[1] - a[1]);
  const rest = all.slice(KINDS - 1).reduce((sum, [, size]) => sum + size, 0);
  return rest ? [...all.slice(0, KINDS - 1), ["other", rest]] : all;
}

/** Make bars and a table of a forecast, as `lorakit plan --json` prints it. */
export function forecastView(forecast, measured = null) {
  const { plan, usable, device, fits, notes } = forecast;
  const whole = Math.max(plan.peak, plan.reserved ?? 0, measured ?? 0);
  const found = parts(forecast);
  const verdict = usable
    ? `${fits ? "It fits" : "It does not fit"}: ${bytes(plan.reserved ?? plan.peak)} of ${bytes(usable)} on ${device?.name ?? "the device"}.`
    : `The peak is ${bytes(plan.peak)}.`;
  return h(
    "div",
    { class: "forecast" },
    h("p", { class: fits === false ? "verdict failure" : "verdict" }, verdict),
    bar(
      "forecast",
      found.map(([, size], i) => [size, `part-${i}`]),
      whole,
      bytes(plan.peak),
    ),
    measured === null ? null : bar("measured", [[measured, "measured"]], whole, bytes(measured)),
    wide(
      "Memory at the peak, by kind",
      h(
        "table",
        { class: "small" },
        h(
          "tbody",
          {},
          found.map(([kind, size], i) =>
            h(
              "tr",
              {},
              h("th", { scope: "row" }, h("i", { class: `dot part-${i}` }), spoken(kind)),
              h("td", { class: "number" }, bytes(size)),
            ),
          ),
        ),
      ),
    ),
    h("p", { class: "quiet" }, `The peak comes in this phase: ${plan.when}.`),
    (notes ?? []).map((note) => h("p", { class: "quiet" }, note)),
  );
}

function bar(label, pieces, whole, text) {
  const inside = pieces.map(([size, name]) =>
    h("i", { class: name, style: { width: `${(100 * size) / whole}%` } }),
  );
  return h(
    "div",
    { class: "meter" },
    h("span", {}, label),
    h("div", { class: "track", "aria-hidden": "true" }, inside),
    h("b", {}, text),
  );
}

export class Memory {
  constructor(board) {
    this.board = board;
    this.element = h("section", { "aria-label": "Memory" });
  }

  async update() {
    const runs = this.board.chosen();
    const key = JSON.stringify(runs.map((run) => [run.id, run.peak_memory_mb]));
    if (key === this.key) return;
    const ask = (run) => (begun(run) ? this.board.source.get(runPath(run.id, "memory")) : {});
    const all = await Promise.all(runs.map(ask));
    this.key = key;
    const peaks = all.map((each) => measured(each.peak_mb));
    const most = Math.max(...peaks.map((peak) => peak ?? 0), 1);
    const each = runs.map((run, i) => {
      const { forecast } = all[i];
      const plain =
        peaks[i] === null
          ? h("p", { class: "quiet" }, "Nothing was measured yet.")
          : bar("measured", [[peaks[i], "measured"]], most, bytes(peaks[i]));
      const known = forecast?.plan ? forecastView(forecast, peaks[i]) : plain;
      return h("article", { class: "card" }, h("h3", {}, run.name), known);
    });
    const empty = nothing("Select runs in the table above.");
    this.element.replaceChildren(each.length ? h("div", { class: "cards" }, each) : empty);
  }
}

function measured(peak) {
  return peak?.length ? Math.max(...peak.map(([, mb]) => mb)) * MB : null;
}
