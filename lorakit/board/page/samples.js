// What the selected runs answered at their evaluations, beside the reference.

import { runPath } from "./data.js";
import { h, nothing, say, unseen } from "./dom.js";
import { number, promptText } from "./format.js";
import { runClass } from "./palette.js";
import { difference } from "./words.js";

const KINDS = { same: "span", gone: "del", new: "ins" };

export class Samples {
  constructor(board) {
    this.board = board;
    this.at = null; // the step that is shown; null follows the last one
    this.differs = false;
    this.output = h("output", {});
    this.slider = h("input", { type: "range", min: 0, max: 0, value: 0, oninput: () => this.#slide() });
    const box = h("input", { type: "checkbox", onchange: () => this.#mark(box.checked) });
    this.controls = h(
      "div",
      { class: "controls", hidden: true },
      h("label", { class: "field steps" }, h("span", {}, "At step"), this.slider, this.output),
      h("label", { class: "field" }, box, h("span", {}, "mark what differs from the reference")),
    );
    this.list = h("div", {});
    this.element = h("section", { "aria-label": "Samples" }, this.controls, this.list);
  }

  async update() {
    const runs = this.board.chosen();
    const key = JSON.stringify(runs.map((run) => [run.id, run.updated]));
    if (key === this.key) return;
    const all = await Promise.all(runs.map((run) => this.board.source.get(runPath(run.id, "samples"))));
    this.key = key;
    this.runs = runs.map((run, i) => ({ run, samples: all[i] })).filter((each) => each.samples.length);
    this.steps = [...new Set(this.runs.flatMap((each) => each.samples.map((s) => s.step)))].sort(
      (a, b) => a - b,
    );
    this.controls.hidden = this.steps.length === 0;
    this.slider.max = Math.max(0, this.steps.length - 1);
    if (this.at === null) this.slider.value = this.slider.max;
    else this.slider.value = Math.max(0, this.steps.indexOf(this.at));
    this.#show();
  }

  #slide() {
    const last = Number(this.slider.value) === this.steps.length - 1;
    this.at = last ? null : this.steps[Number(this.slider.value)];
    this.#show();
  }

  #mark(differs) {
    this.differs = differs;
    this.#show();
  }

  #show() {
    if (!this.steps.length) {
      const text = this.board.chosen().length
        ? "These runs keep no samples. A run file that asks for some has them at each evaluation."
        : "Select runs in the table above.";
      this.list.replaceChildren(nothing(text));
      return;
    }
    const step = this.steps[Number(this.slider.value)];
    say(this.output, number(step));
    this.slider.setAttribute("aria-valuetext", `step ${step}`);
    const rows = new Map(); // prompt and reference -> {sample, answers}
    for (const { run, samples } of this.runs) {
      const before = samples.filter((sample) => sample.step <= step);
      const latest = new Map(before.map((sample) => [sample.row, sample]));
      for (const sample of latest.values()) {
        const key = JSON.stringify([sample.prompt, sample.reference]);
        if (!rows.has(key)) rows.set(key, { sample, answers: [] });
        rows.get(key).answers.push({ run, sample });
      }
    }
    this.list.replaceChildren(...[...rows.values()].map((row) => this.#row(row)));
  }

  #row({ sample, answers }) {
    const side = (head, ...text) =>
      h("div", { class: "side" }, h("h3", {}, head), h("p", { class: "text" }, ...text));
    const shown = answers.map(({ run, sample: each }) => {
      const slot = this.board.slots.get(run.id) ?? 0;
      const head = h("span", { class: `bar ${runClass(slot)}` }, `${run.name}, step ${number(each.step)}`);
      const parts = this.differs ? marked(each.reference ?? "", each.completion) : [each.completion];
      return side(head, ...(each.completion || this.differs ? parts : ["(nothing)"]));
    });
    const reference =
      sample.reference === null || sample.reference === undefined
        ? []
        : [side(sample.label === false ? "Reference, a bad answer" : "Reference", sample.reference)];
    return h(
      "article",
      { class: "sample" },
      h("p", { class: "prompt" }, unseen("Prompt: "), promptText(sample.prompt)),
      h("div", { class: "sides" }, reference, shown),
    );
  }
}

function marked(reference, completion) {
  return difference(reference, completion).map(([kind, text]) => h(KINDS[kind], {}, text));
}
