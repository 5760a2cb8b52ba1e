// The curves of the selected runs: a chart for each quantity, with one axis and one look for all.

import { Chart, nearest, smoothed } from "./charts.js";
import { begun, runPath } from "./data.js";
import { choice, h, nothing } from "./dom.js";
import { spoken } from "./format.js";

const FIRST = ["loss", "mean_token_accuracy", "learning_rate", "grad_norm", "tokens_per_second"];
const AXES = ["step", "epoch", "tokens", "seconds", "padding"]; // no charts of their own
const EXACT = ["learning_rate", "peak_memory_mb"]; // nothing to smooth
const MOST = 1000; // points of a curve
const OFTEN = 150; // ms between two drawings while curves come in
const ALL = 20000; // points of a quantity, of all runs together

/** Return a curve's places on another axis, by linear interpolation in the axis's own curve. */
export function onAxis(steps, axis) {
  return steps.map((step) => {
    const at = nearest(axis.step, step);
    const other = axis.step[at] < step ? at + 1 : at - 1;
    if (axis.step[at] === step || other < 0 || other >= axis.step.length) return axis.value[at];
    const part = (step - axis.step[at]) / (axis.step[other] - axis.step[at]);
    return axis.value[at] + part * (axis.value[other] - axis.value[at]);
  });
}

/** Return the names of the charts: of all quantities of the runs, the chief ones first. */
export function chartNames(curves) {
  const names = new Set(curves.flatMap((each) => Object.keys(each)));
  const rest = [...names].filter((name) => !FIRST.includes(name) && !AXES.includes(name));
  const alone = rest.filter((name) => name !== "eval_loss" || !names.has("loss"));
  return [...FIRST.filter((name) => names.has(name)), ...alone.sort()];
}

export class Curves {
  constructor(board) {
    this.board = board;
    this.look = board.look;
    this.known = new Map(); // run id -> {key, curves}
    this.charts = new Map();
    this.grid = h("div", { class: "charts" });
    this.note = h("div", {});
    this.controls = h("div", { class: "controls" });
    this.element = h("section", { "aria-label": "Curves" }, this.controls, this.note, this.grid);
    this.#control();
    this.repaint = () => this.charts.forEach((chart) => chart.repaint());
    addEventListener("themechange", this.repaint);
  }

  close() {
    this.closed = true;
    removeEventListener("themechange", this.repaint);
    this.charts.forEach((chart) => chart.close());
  }

  async update() {
    const runs = this.board.chosen();
    const points = Math.max(100, Math.min(MOST, Math.floor(ALL / Math.max(1, runs.length))));
    let last = performance.now();
    const fetched = async (run) => {
      await this.#fetch(run, points);
      if (performance.now() - last < OFTEN) return;
      this.draw(); // what is there, while long runs are being read
      last = performance.now();
    };
    await Promise.all(runs.map(fetched));
    this.draw();
  }

  async #fetch(run, points) {
    const key = `${run.step}/${run.updated}/${points}`;
    const known = this.known.get(run.id);
    if (known?.key === key) return;
    if (!begun(run)) {
      this.known.set(run.id, { key, curves: {} });
      return;
    }
    const path = runPath(run.id, "metrics");
    try {
      this.known.set(run.id, { key, curves: await this.board.source.get(`${path}?points=${points}`) });
    } catch (error) {
      if (!known) this.known.set(run.id, { key, curves: {} });
      this.board.trouble(error);
    }
  }

  draw() {
    if (this.closed) return;
    const runs = this.board.chosen().filter((run) => this.known.has(run.id));
    const curves = runs.map((run) => this.known.get(run.id).curves);
    const names = chartNames(curves);
    const empty = this.board.selected.size ? "There are no steps yet." : "Select runs in the table above.";
    this.note.replaceChildren(names.length ? "" : nothing(empty));
    for (const [name, chart] of this.charts) {
      if (names.includes(name)) continue;
      chart.close();
      chart.element.remove();
      this.charts.delete(name);
    }
    for (const name of names) {
      if (!this.charts.has(name)) this.charts.set(name, new Chart(spoken(name), "curves"));
      const chart = this.charts.get(name);
      if (this.grid.children[names.indexOf(name)] !== chart.element) {
        this.grid.insertBefore(chart.element, this.grid.children[names.indexOf(name)] ?? null);
      }
      chart.draw(this.#series(name, runs), {
        log: this.look.log && name !== "learning_rate",
        label: this.look.axis,
      });
    }
  }

  #series(name, runs) {
    const drawn = [];
    for (const run of runs) {
      const curves = this.known.get(run.id).curves;
      const named = { name: run.name, slot: this.board.slots.get(run.id) };
      const curve = curves[name];
      if (curve) {
        const x = this.#x(curve, curves);
        const points = name.startsWith("eval_");
        const smooth = this.look.smooth > 0 && !points && !EXACT.includes(name);
        if (smooth) drawn.push({ ...named, id: `${run.id} raw`, x, y: curve.value, faint: true });
        const y = smooth ? smoothed(curve.value, this.look.smooth) : curve.value;
        drawn.push({ ...named, id: run.id, x, y, points });
      }
      const measured = name === "loss" ? curves.eval_loss : null;
      if (measured) {
        drawn.push({
          ...named,
          name: `validation of ${run.name}`,
          id: `${run.id} eval`,
          x: this.#x(measured, curves),
          y: measured.value,
          dashed: true,
          points: true,
        });
      }
    }
    return drawn;
  }

  #x(curve, curves) {
    const axis = { tokens: curves.tokens, seconds: curves.seconds }[this.look.axis];
    return axis ? onAxis(curve.step, axis) : curve.step;
  }

  #control() {
    const set = (name) => (value) => {
      this.look[name] = value;
      this.draw();
    };
    const smooth = h("input", {
      type: "range",
      min: 0,
      max: 0.98,
      step: 0.02,
      value: this.look.smooth,
      oninput: () => {
        shown.textContent = smooth.value === "0" ? "raw" : Number(smooth.value).toFixed(2);
        set("smooth")(Number(smooth.value));
      },
    });
    const shown = h("output", {}, this.look.smooth ? this.look.smooth.toFixed(2) : "raw");
    const log = h("input", {
      type: "checkbox",
      checked: this.look.log,
      onchange: () => set("log")(log.checked),
    });
    const axes = [
      ["step", "step"],
      ["tokens", "tokens"],
      ["seconds", "seconds"],
    ];
    this.controls.append(
      choice("Over", "axis", axes, this.look.axis, set("axis")),
      h("label", { class: "field" }, h("span", {}, "Smooth"), smooth, shown),
      h("label", { class: "field" }, log, h("span", {}, "log scale")),
      h("p", { class: "quiet hint" }, "Drag to zoom, double click to reset."),
    );
  }
}
