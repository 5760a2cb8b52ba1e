// A chat with two models side by side: each side sees its own answers.

import { failure, h, nothing, say, select } from "./dom.js";

export class Chat {
  constructor(board) {
    this.board = board;
    this.element = h(
      "section",
      { "aria-label": "Chat", class: "chat" },
      h("h1", {}, "Chat"),
      nothing("Looking for models …"),
    );
    this.turns = []; // [{user, answers: [left, right]}]
    this.#begin();
  }

  close() {
    this.abort?.abort();
  }

  update() {}

  async #begin() {
    try {
      this.models = await this.board.source.get("api/models");
    } catch (error) {
      this.element.lastChild.replaceWith(failure(error));
      return;
    }
    const bases = this.models.filter((model) => model.kind === "base");
    if (!bases.length) {
      this.element.lastChild.replaceWith(nothing("There is no model to talk to yet: start a run first."));
      return;
    }
    this.#build(bases);
    this.#take(bases[0].name);
  }

  /** Talk to a base and the adapters that were trained on it. */
  #take(base) {
    this.base = base;
    const known = this.models.filter((model) => model.base === base || model.name === base);
    const names = known.map((model) => [model.name, label(model)]);
    const adapter = known.find((model) => model.kind === "adapter");
    this.sides = [base, adapter?.name ?? base];
    const show = (i) => {
      this.columns[i].head.textContent = names.find(([name]) => name === this.sides[i])[1];
    };
    const pick = (i) => (name) => {
      this.sides[i] = name;
      show(i);
    };
    this.picks.replaceChildren(
      select("Left", names, this.sides[0], pick(0)),
      select("Right", names, this.sides[1], pick(1)),
    );
    [0, 1].forEach(show);
    this.#clear();
  }

  #build(bases) {
    this.picks = h("span", { class: "picks" });
    this.columns = [0, 1].map((i) => {
      const head = h("h2", {});
      const log = h("div", {
        class: "log",
        role: "log",
        "aria-label": `Answers of side ${i + 1}`,
        tabindex: 0,
      });
      return { head, log, element: h("div", { class: "column" }, head, log) };
    });
    const value = (label, attributes) => {
      const input = h("input", { type: "number", ...attributes });
      return [input, h("label", { class: "field" }, h("span", {}, label), input)];
    };
    const [tokens, tokensField] = value("New tokens", { min: 1, max: 4096, value: 128 });
    const [heat, heatField] = value("Temperature", { min: 0, max: 2, step: 0.1, value: 0 });
    const [seed, seedField] = value("Seed", { min: 0, step: 1, value: 0 });
    this.options = () => ({
      max_new_tokens: Number(tokens.value),
      temperature: Number(heat.value),
      seed: Number(seed.value),
    });
    this.text = h("textarea", {
      rows: 3,
      "aria-label": "Message",
      placeholder: "Write a message; Enter sends it",
      onkeydown: (e) => this.#key(e),
    });
    this.button = h("button", { type: "submit", class: "main" }, "Send");
    this.stop = h("button", { type: "button", disabled: true, onclick: () => this.abort?.abort() }, "Stop");
    const again = h("button", { type: "button", class: "plain", onclick: () => this.#clear() }, "New chat");
    this.problem = h("div", {});
    this.status = h("p", { class: "quiet", role: "status" });
    this.element.replaceChildren(
      h("h1", {}, "Chat"),
      h(
        "div",
        { class: "controls" },
        select(
          "Base",
          bases.map((model) => [model.name, model.label]),
          bases[0].name,
          (name) => this.#take(name),
        ),
        this.picks,
        tokensField,
        heatField,
        seedField,
      ),
      h(
        "div",
        { class: "columns" },
        this.columns.map((column) => column.element),
      ),
      this.problem,
      this.status,
      h(
        "form",
        { class: "message", onsubmit: (event) => this.#send(event) },
        this.text,
        h("p", { class: "buttons" }, this.button, this.stop, again),
      ),
    );
  }

  #key(event) {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) this.#send(event);
  }

  #clear() {
    this.abort?.abort();
    this.turns = [];
    this.columns.forEach((column) => column.log.replaceChildren());
    this.text.focus();
  }

  async #send(event) {
    event.preventDefault();
    const user = this.text.value.trim();
    if (!user || this.button.disabled) return;
    this.text.value = "";
    this.problem.replaceChildren();
    const turn = { user, answers: ["", ""] };
    this.turns.push(turn);
    const places = this.columns.map(({ log }) => {
      const place = h("p", { class: "text answer" });
      log.append(h("p", { class: "text user" }, user), place);
      return place;
    });
    this.abort = new AbortController();
    [this.button.disabled, this.stop.disabled] = [true, false];
    try {
      const body = { base: this.base, sides: this.sides, messages: this.#messages(), ...this.options() };
      for await (const event of this.board.source.stream("api/chat", body, this.abort.signal)) {
        say(this.status, event.loading ? `Loading ${event.loading} …` : "");
        if (event.error && event.side === undefined) throw new Error(event.error);
        if (event.error) {
          places[event.side].textContent = event.error;
          places[event.side].classList.add("failure");
        }
        if (event.text === undefined) continue;
        turn.answers[event.side] += event.text;
        places[event.side].textContent = turn.answers[event.side];
        const { log } = this.columns[event.side];
        log.scrollTop = log.scrollHeight;
      }
    } catch (error) {
      if (error.name !== "AbortError") this.problem.replaceChildren(failure(error));
    }
    say(this.status, "");
    [this.button.disabled, this.stop.disabled] = [false, true];
  }

  /** Return the messages of each side: what the user said, and that side's own answers. */
  #messages() {
    return [0, 1].map((side) =>
      this.turns.flatMap((turn, i) => [
        { role: "user", content: turn.user },
        ...(i + 1 < this.turns.length ? [{ role: "assistant", content: turn.answers[side] }] : []),
      ]),
    );
  }
}

function label(model) {
  return model.kind === "base" ? `${model.label}, the base` : model.label;
}
