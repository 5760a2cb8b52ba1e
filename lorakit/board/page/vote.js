// Blind votes: pairs of answers one by one, by keys 1, 2 and 0; nobody sees whose they are.

import { failure, h, nothing, select } from "./dom.js";
import { number, promptText, score } from "./format.js";

const WINNERS = { 1: "left", 2: "right", 0: "tie" };

export class Vote {
  constructor(board, id) {
    this.board = board;
    this.path = `api/comparisons/${encodeURIComponent(id)}`;
    this.place = h("div", {});
    this.controls = h("div", { class: "controls" });
    this.heading = h("h1", { tabindex: -1 }, "Which answer is better?");
    this.result = h("p", { class: "quiet", role: "status" });
    const back = h("a", { href: `#/comparisons/${encodeURIComponent(id)}` }, "Back to the comparison");
    this.element = h(
      "section",
      { "aria-label": "Vote", class: "vote" },
      this.heading,
      this.controls,
      this.place,
      this.result,
      h("p", {}, back),
    );
    this.key = (event) => this.#key(event);
    document.addEventListener("keydown", this.key);
    this.#begin();
  }

  close() {
    document.removeEventListener("keydown", this.key);
  }

  update() {}

  async #begin() {
    try {
      const { runs } = await this.board.source.get(this.path);
      this.runs = runs.filter((run) => run.state === "finished");
    } catch (error) {
      this.place.replaceChildren(failure(error));
      return;
    }
    const tasks = [...new Set(this.runs.map((run) => run.task))];
    this.tasks = tasks.filter((task) => this.runs.filter((run) => run.task === task).length > 1);
    if (!this.tasks.length) this.place.replaceChildren(nothing("Votes need two finished runs of one task."));
    else this.#choose(this.tasks[0]);
  }

  #choose(task, first, second) {
    const ids = this.runs.filter((run) => run.task === task).map((run) => run.id);
    this.first = first ?? ids[0];
    this.second = second ?? ids.find((id) => id !== this.first);
    const options = ids.map((id) => [id, id]);
    this.controls.replaceChildren(
      this.tasks.length > 1
        ? select(
            "Task",
            this.tasks.map((name) => [name, name]),
            task,
            (name) => this.#choose(name),
          )
        : "",
      select("Between", options, this.first, (id) =>
        this.#choose(task, id, id === this.second ? undefined : this.second),
      ),
      select(
        "and",
        options.filter(([id]) => id !== this.first),
        this.second,
        (id) => this.#choose(task, this.first, id),
      ),
    );
    this.#next();
  }

  #key(event) {
    const winner = WINNERS[event.key];
    const typing =
      event.target.matches("input, textarea, select") || event.ctrlKey || event.metaKey || event.altKey;
    if (winner && !typing) this.#vote(winner);
  }

  #next() {
    const query = new URLSearchParams({ first: this.first, second: this.second });
    return this.#take(this.board.source.get(`${this.path}/vote?${query}`));
  }

  /** Show the pair that is promised, or what the votes say if there is none left. */
  async #take(promise) {
    this.pair = null;
    this.result.textContent = "";
    let pair;
    try {
      pair = await promise;
    } catch (error) {
      this.place.replaceChildren(failure(error));
      return;
    }
    this.pair = pair;
    pair.done ? this.#done(pair.share) : this.#show(pair);
  }

  #show({ prompt, left, right, left_over: leftOver }) {
    const side = (head, text) =>
      h("div", { class: "side" }, h("h2", {}, head), h("p", { class: "text" }, text || "(nothing)"));
    const button = (key, text) =>
      h("button", { type: "button", onclick: () => this.#vote(WINNERS[key]) }, h("kbd", {}, key), ` ${text}`);
    this.heading.textContent = "Which answer is better?";
    this.place.replaceChildren(
      h("p", { class: "prompt" }, promptText(prompt)),
      h("div", { class: "sides" }, side("Answer 1", left), side("Answer 2", right)),
      h(
        "p",
        { class: "buttons" },
        button("1", "The first"),
        button("2", "The second"),
        button("0", "Neither"),
      ),
    );
    if (leftOver !== undefined) this.result.textContent = `${number(leftOver)} to go`;
    this.heading.focus({ preventScroll: true });
  }

  #vote(winner) {
    if (!this.pair || this.pair.done) return;
    const vote = { first: this.first, second: this.second, ticket: this.pair.ticket, winner };
    this.#take(this.board.source.post(`${this.path}/vote`, vote));
  }

  #done({ value, low, high, first, second, ties, same }) {
    const counted = `${number(second)} for ${this.second}, ${number(first)} for ${this.first}, ${number(ties)} for neither; ${number(same)} rows have the same answer.`;
    const share =
      value === null || value === undefined
        ? "There was nothing to vote on."
        : `${this.second} wins ${score(value)} of the votes, ties as half (${score(low)} to ${score(high)}).`;
    this.heading.textContent = "All pairs are judged";
    this.place.replaceChildren(h("p", {}, h("b", {}, share)), h("p", {}, counted));
    this.heading.focus({ preventScroll: true });
  }
}
