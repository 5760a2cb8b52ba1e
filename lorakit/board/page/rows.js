// Rows as the model reads them, token by token; what is learned is coloured and underlined.

import { runPath } from "./data.js";
import { failure, h, nothing, select, unseen } from "./dom.js";
import { number } from "./format.js";

const PAGE = 10;

/** Return a token's text with white space and control characters made visible. */
export function visible(text) {
  const seen = text.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "→");
  return seen.replace(/[\p{Cc}\p{Cf}]/gu, (c) => `\\x${c.codePointAt(0).toString(16)}`);
}

export class Rows {
  constructor(board) {
    this.board = board;
    this.run = null;
    this.offset = 0;
    this.pick = h("span", {});
    this.where = h("span", { class: "quiet", role: "status" });
    this.back = h("button", { type: "button", onclick: () => this.#turn(-PAGE) }, "Back");
    this.next = h("button", { type: "button", onclick: () => this.#turn(PAGE) }, "Next");
    const legend = h(
      "p",
      { class: "quiet hint" },
      h("span", { class: "token learned" }, "learned"),
      " ",
      h("span", { class: "token" }, "read only"),
    );
    this.controls = h("div", { class: "controls" }, this.pick, this.back, this.next, this.where, legend);
    this.list = h("div", {});
    this.element = h("section", { "aria-label": "Rows" }, this.controls, this.list);
  }

  async update() {
    const runs = this.board.chosen();
    const key = JSON.stringify(runs.map((run) => run.id));
    if (key === this.key) return;
    this.key = key;
    this.controls.hidden = runs.length === 0;
    if (!runs.length) {
      this.list.replaceChildren(nothing("Select a run in the table above."));
      return;
    }
    if (!runs.some((run) => run.id === this.run)) [this.run, this.offset] = [runs[0].id, 0];
    const names = runs.map((run) => [run.id, run.name]);
    this.pick.replaceChildren(
      select("Rows of", names, this.run, (id) => {
        [this.run, this.offset] = [id, 0];
        this.#load();
      }),
    );
    await this.#load();
  }

  #turn(by) {
    this.offset = Math.max(0, this.offset + by);
    return this.#load();
  }

  async #load() {
    const wanted = `${runPath(this.run, "rows")}?offset=${this.offset}&limit=${PAGE}`;
    this.wanted = wanted;
    this.list.setAttribute("aria-busy", "true");
    let content;
    let rows = [];
    try {
      rows = await this.board.source.get(wanted);
      content = rows.length ? rows.map(shown) : [nothing("There are no more rows.")];
    } catch (error) {
      content = [failure(error)];
    }
    if (this.wanted !== wanted) return;
    this.list.removeAttribute("aria-busy");
    this.list.replaceChildren(...content);
    this.back.disabled = this.offset === 0;
    this.next.disabled = rows.length < PAGE || !this.board.source.live;
    this.where.textContent = rows.length
      ? `${number(this.offset + 1)} to ${number(this.offset + rows.length)}`
      : "";
  }
}

function shown({ tokens, place, answer, error }) {
  if (error) return h("article", { class: "row" }, h("h3", {}, place), h("p", { class: "failure" }, error));
  const learned = tokens.filter((token) => token.learned).length;
  const pieces = [];
  for (const [i, token] of tokens.entries()) {
    const turns = i === 0 ? token.learned : token.learned !== tokens[i - 1].learned;
    if (turns) pieces.push(unseen(token.learned ? " [learned: " : "] "));
    pieces.push(
      h(
        "span",
        { class: token.learned ? "token learned" : "token", title: `token ${token.ids.join(", ")}` },
        visible(token.text),
      ),
    );
    if (token.text.includes("\n")) pieces.push(h("br"));
  }
  return h(
    "article",
    { class: "row" },
    h(
      "h3",
      {},
      place,
      answer ? `, ${answer}` : "",
      h("small", {}, ` ${number(tokens.length)} tokens, ${number(learned)} learned`),
    ),
    h("p", { class: "text" }, pieces),
  );
}
