// The page: where it is, which runs are selected, and when it asks for news.

import { Chat } from "./chat.js";
import { Comparisons } from "./comparisons.js";
import { Curves } from "./curves.js";
import { source } from "./data.js";
import { choice, failure, h, say } from "./dom.js";
import { Evaluations } from "./evaluations.js";
import { Memory } from "./memory.js";
import { paint, place } from "./palette.js";
import { Rows } from "./rows.js";
import { RunsTable } from "./runs.js";
import { Samples } from "./samples.js";
import { Settings } from "./settings.js";
import { Start } from "./start.js";
import { Vote } from "./vote.js";

const EVERY = 2000; // ms between two questions
const AT_FIRST = 4; // runs that are selected when the page opens
const PARTS = {
  curves: ["Curves", Curves],
  settings: ["Settings", Settings],
  evaluations: ["Evaluations", Evaluations],
  samples: ["Samples", Samples],
  rows: ["Rows", Rows],
  memory: ["Memory", Memory],
};

/** What all views share: the runs, the selected ones, and their places among the colours. */
class Board {
  constructor() {
    this.source = source();
    this.runs = [];
    this.selected = new Set();
    this.slots = new Map();
    this.look = { axis: "step", smooth: 0, log: false };
    this.main = document.getElementById("main");
    this.views = [];
    this.wanted = null;
  }

  /** Return the selected runs in the order of their places. */
  chosen() {
    const found = this.runs.filter((run) => this.selected.has(run.id));
    return found.sort((a, b) => this.slots.get(a.id) - this.slots.get(b.id));
  }

  select(ids) {
    this.selected = new Set(ids);
    place(this.slots, this.selected);
    return this.show();
  }

  toggle(id, yes) {
    const ids = new Set(this.selected);
    yes ? ids.add(id) : ids.delete(id);
    return this.select(ids);
  }

  /** Select a run as soon as the board knows it. */
  wish(id) {
    this.wanted = id;
  }

  async refresh() {
    try {
      this.runs = await this.source.get("api/runs");
      this.trouble(null);
    } catch (error) {
      this.trouble(error);
      return;
    }
    const ids = new Set(this.runs.map((run) => run.id));
    const kept = [...this.selected].filter((id) => ids.has(id));
    if (!this.known) {
      this.known = true;
      kept.push(...first(this.runs));
    }
    if (this.wanted !== null && ids.has(this.wanted)) {
      kept.push(this.wanted);
      this.wanted = null;
    }
    await this.select(kept);
  }

  /** Bring what is shown up to date. */
  async show() {
    for (const view of this.views) {
      try {
        await view.update();
      } catch (error) {
        this.trouble(error);
      }
    }
    const running = this.runs.filter((run) => run.state === "running").length;
    say(document.getElementById("pulse"), running ? `${running} running` : "");
  }

  /** Show what went wrong, or nothing. */
  trouble(error) {
    const old = document.getElementById("trouble");
    if (!error || old?.textContent !== error.message) old?.remove();
    if (error && old?.textContent !== error.message) {
      const shown = failure(error);
      shown.id = "trouble";
      this.main.before(shown);
    }
  }

  /** Build the views of the address: #/runs/curves, #/comparisons/ID, #/vote/ID, #/start, #/chat. */
  async open() {
    const [, page = this.source.home, rest = ""] = location.hash.split("/");
    const id = decoded(rest);
    this.views.forEach((view) => view.close?.());
    const live = this.source.live;
    const made = {
      comparisons: () => [new Comparisons(this, id)],
      vote: () => (live ? [new Vote(this, id)] : []),
      start: () => (live ? [new Start(this)] : []),
      chat: () => (live ? [new Chat(this)] : []),
    }[page];
    this.views = made ? made() : this.#runs(Object.hasOwn(PARTS, rest) ? rest : "curves");
    if (made) this.main.replaceChildren(...this.views.map((view) => view.element));
    this.pages ??= this.#pages();
    mark(this.pages, !made ? "#/runs" : page === "vote" ? "#/comparisons" : `#/${page}`);
    await this.show();
  }

  /** Show the table of runs, which is built once and stays as it is, and a part below it. */
  #runs(name) {
    if (!this.table) {
      this.table = new RunsTable(this);
      const parts = Object.entries(PARTS).filter(([key]) => this.source.live || key !== "rows");
      const links = parts.map(([key, [text]]) => h("a", { href: `#/runs/${key}` }, text));
      this.tabs = h("nav", { class: "tabs", "aria-label": "Parts of runs" }, links);
      this.part = h("div", {});
      this.home = h(
        "div",
        {},
        h("h1", { class: "unseen" }, "Runs"),
        this.table.element,
        this.tabs,
        this.part,
      );
    }
    mark(this.tabs, `#/runs/${name}`);
    const part = new PARTS[name][1](this);
    this.part.replaceChildren(part.element);
    if (this.home.parentNode !== this.main) this.main.replaceChildren(this.home);
    return [this.table, part];
  }

  #pages() {
    const started = [
      ["start", "Start a run"],
      ["chat", "Chat"],
    ];
    const pages = [["runs", "Runs"], ["comparisons", "Comparisons"], ...(this.source.live ? started : [])];
    const nav = document.getElementById("pages");
    nav.replaceChildren(...pages.map(([key, text]) => h("a", { href: `#/${key}` }, text)));
    return nav;
  }
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // somebody typed it
  }
}

/** Mark the link of a list that leads to where the page is. */
function mark(nav, here) {
  for (const link of nav.children) {
    if (link.getAttribute("href") === here) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

/** Return the runs to begin with: those that are running, then the newest. */
function first(runs) {
  const age = (run) => run.started ?? run.updated ?? 0;
  const order = [...runs].sort(
    (a, b) => (b.state === "running") - (a.state === "running") || age(b) - age(a),
  );
  return order.slice(0, AT_FIRST).map((run) => run.id);
}

function theme() {
  const set = (name) => {
    document.documentElement.dataset.theme = name;
    try {
      localStorage.setItem("lorakit-theme", name);
    } catch {
      // a page in a file may have no storage
    }
    dispatchEvent(new Event("themechange"));
  };
  let kept = null;
  try {
    kept = localStorage.getItem("lorakit-theme");
  } catch {
    // as above
  }
  const start = ["light", "dark"].includes(kept) ? kept : "auto";
  document.documentElement.dataset.theme = start;
  document.getElementById("theme").append(
    choice(
      "Theme",
      "theme",
      [
        ["auto", "Auto"],
        ["light", "Light"],
        ["dark", "Dark"],
      ],
      start,
      set,
    ),
  );
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
    dispatchEvent(new Event("themechange")),
  );
}

async function begin() {
  paint();
  theme();
  const board = new Board();
  addEventListener("hashchange", () => board.open());
  await board.open();
  await board.refresh();
  if (!board.source.live) {
    say(document.getElementById("place"), board.source.frozen.name ?? "");
    return;
  }
  const named = await board.source.get("api/board").catch(() => ({}));
  say(document.getElementById("place"), named.name ?? "");
  if (named.name) document.title = `${named.name} · lorakit`;
  const loop = async () => {
    if (!document.hidden) await board.refresh();
    setTimeout(loop, EVERY);
  };
  setTimeout(loop, EVERY);
  document.addEventListener("visibilitychange", () => document.hidden || board.refresh());
}

begin();
