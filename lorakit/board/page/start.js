// The form that starts a run from a run file, with the forecast of its memory beside it.

import { runPath } from "./data.js";
import { announce, failure, h, nothing, select } from "./dom.js";
import { forecastView } from "./memory.js";

const WAIT = 900; // ms after the last key until the forecast is asked for
const EMPTY = `model: path/to/model
data: rows.jsonl
lora: {r: 8}
learning_rate: 2.0e-4
max_steps: 100
`;

export class Start {
  constructor(board) {
    this.board = board;
    this.asked = 0;
    const changed = () => {
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.#forecast(), WAIT);
    };
    this.name = h("input", { id: "name", type: "text", required: true, autocomplete: "off", value: "run" });
    this.text = h(
      "textarea",
      { id: "text", rows: 18, spellcheck: "false", required: true, oninput: changed },
      EMPTY,
    );
    this.panel = h(
      "div",
      { class: "panel", "aria-live": "polite" },
      nothing("The forecast comes when you change the run file."),
    );
    this.problem = h("div", {});
    this.button = h("button", { type: "submit", class: "main" }, "Start the run");
    this.from = h("span", {});
    this.element = h(
      "section",
      { "aria-label": "Start a run", class: "start" },
      h("h1", {}, "Start a run"),
      h(
        "div",
        { class: "halves" },
        h(
          "form",
          { onsubmit: (event) => this.#submit(event) },
          this.from,
          h("label", { for: "name" }, "Name of its folder"),
          this.name,
          h("label", { for: "text" }, "Run file"),
          this.text,
          this.problem,
          h(
            "p",
            { class: "buttons" },
            h("button", { type: "button", onclick: () => this.#forecast() }, "Forecast"),
            this.button,
          ),
        ),
        h("aside", { "aria-label": "Forecast" }, h("h2", {}, "Will it fit?"), this.panel),
      ),
    );
  }

  close() {
    clearTimeout(this.timer);
  }

  update() {
    const { runs } = this.board;
    const key = JSON.stringify(runs.map((run) => run.id));
    if (key === this.key || !runs.length) return;
    this.key = key;
    const options = [["", "an empty one"], ...runs.map((run) => [run.id, run.name])];
    this.from.replaceChildren(select("Begin with the run file of", options, "", (id) => this.#take(id)));
  }

  async #take(id) {
    if (!id) return;
    try {
      const { text } = await this.board.source.get(runPath(id, "run_file"));
      this.text.value = text;
      this.problem.replaceChildren();
      await this.#forecast();
    } catch (error) {
      this.problem.replaceChildren(failure(error));
    }
  }

  async #forecast() {
    clearTimeout(this.timer);
    const turn = (this.asked += 1);
    this.panel.replaceChildren(nothing("Computing the forecast …"));
    let content;
    try {
      content = forecastView(await this.board.source.post("api/forecast", { run_file: this.text.value }));
    } catch (error) {
      content = h("p", { class: "failure" }, error.message);
    }
    if (turn === this.asked) this.panel.replaceChildren(content);
  }

  async #submit(event) {
    event.preventDefault();
    this.button.disabled = true;
    this.problem.replaceChildren();
    try {
      const body = { run_file: this.text.value, name: this.name.value };
      const { id } = await this.board.source.post("api/runs", body);
      announce(`${this.name.value} starts.`);
      this.board.wish(id);
      location.hash = "#/runs/curves";
      await this.board.refresh();
    } catch (error) {
      this.problem.replaceChildren(failure(error));
    }
    this.button.disabled = false;
  }
}
