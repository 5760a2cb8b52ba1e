// Curves of several runs over one axis, drawn by uPlot, with a read-out and a table beside them.

import { h, say, unseen, wide } from "./dom.js";
import { digits, number, tick } from "./format.js";
import { colour, dash } from "./palette.js";

const HEIGHT = 230;
const SHOWN = 12; // runs in a read-out; more would hide the chart
const TABLE = 12; // rows of the table of values
const ZOOM = 0.7; // what the keys + and - leave of the range

/** Return the index of the value of sorted `x` that is nearest to `at`. */
export function nearest(x, at) {
  let low = 0;
  let high = x.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (x[middle] < at) low = middle + 1;
    else high = middle;
  }
  return low > 0 && at - x[low - 1] <= x[low] - at ? low - 1 : low;
}

/**
 * Return the exponential moving average of values, divided by the sum of its weights, so that it
 * begins at the first value. Null stays null.
 */
export function smoothed(values, weight) {
  let sum = 0;
  let weights = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    weights = weight * weights + (1 - weight);
    return sum / weights;
  });
}

/**
 * A chart. A series is {id, name, slot, x, y, faint, points, dashed}: a faint one is the raw curve
 * behind a smooth one and has no part in the read-out.
 */
export class Chart {
  constructor(title, group) {
    this.title = title;
    this.group = group;
    this.series = [];
    this.tip = h("div", { class: "tip", "aria-hidden": "true", hidden: true });
    this.plot = h("div", {
      class: "plot",
      tabindex: 0,
      role: "group",
      "aria-label": `${title}. Arrow keys read values, plus and minus zoom, escape resets.`,
      onkeydown: (event) => this.#key(event),
      onblur: () => this.#leave(),
    });
    this.spoken = h("p", { class: "unseen", "aria-live": "polite" });
    this.table = h("div", {});
    this.details = h(
      "details",
      { class: "values", ontoggle: () => this.#fill() },
      h("summary", {}, "Values", unseen(` of ${title} as a table`)),
      this.table,
    );
    this.element = h(
      "figure",
      { class: "chart" },
      h("figcaption", {}, title),
      this.plot,
      this.spoken,
      this.details,
    );
    this.watch = new ResizeObserver(() => this.#resize());
    this.watch.observe(this.plot);
  }

  /** Draw these series. A zoom stays as it is unless the kind of axis has changed. */
  draw(series, { log, label }) {
    const key = JSON.stringify([log, label, series.map((s) => [s.id, s.slot, !!s.faint, !!s.dashed])]);
    this.series = series;
    this.label = label;
    const data = aligned(series, log);
    if (this.u && key === this.key) {
      const zoomed = this.zoomed;
      this.u.setData(data, !zoomed);
      if (zoomed) this.u.redraw();
    } else {
      this.key = key;
      this.#build(data, log);
    }
    this.#fill();
  }

  /** Draw everything anew, in the colours of the theme. */
  repaint() {
    if (this.u) this.#build(this.u.data, this.log);
  }

  close() {
    this.watch.disconnect();
    this.u?.destroy();
    this.u = null;
  }

  #build(data, log) {
    this.u?.destroy();
    this.log = log;
    this.zoomed = false;
    const style = getComputedStyle(this.plot);
    const [ink, line] = [style.getPropertyValue("color"), style.getPropertyValue("border-color")];
    const font = `12px ${style.fontFamily}`;
    const axis = { stroke: ink, font, grid: { stroke: line, width: 1 }, ticks: { show: false } };
    this.u = new uPlot(
      {
        width: this.plot.clientWidth || 400,
        height: HEIGHT,
        legend: { show: false },
        padding: [8, 14, 0, 0],
        scales: { x: { time: false }, y: { distr: log ? 3 : 1 } },
        axes: [
          { ...axis, size: 30, values: (_, ticks) => ticks.map(tick) },
          { ...axis, size: 54, values: (_, ticks) => ticks.map(tick) },
        ],
        cursor: {
          drag: { x: true, y: false },
          y: false,
          points: { show: false },
          sync: { key: this.group, scales: ["x", null] },
        },
        hooks: {
          setCursor: [(u) => this.#point(u)],
          setScale: [(u, scale) => scale === "x" && this.#scaled(u)],
          ready: [(u) => u.over.append(this.tip)],
        },
        series: [{}, ...this.series.map((s) => this.#line(s))],
      },
      data,
      this.plot,
    );
    this.u.over.addEventListener("mouseleave", () => this.#leave());
  }

  #line(series) {
    const lone = series.x.length < 2;
    return {
      stroke: colour(series.slot),
      width: series.faint ? 1 : 2,
      alpha: series.faint ? 0.3 : 1,
      dash: series.dashed ? [2, 5] : dash(series.slot),
      spanGaps: true,
      points: { show: !series.faint && (series.points || lone), size: 6, fill: colour(series.slot) },
    };
  }

  #scaled(u) {
    const x = u.data[0];
    const { min, max } = u.scales.x;
    this.zoomed = x.length > 1 && (min > x[0] || max < x[x.length - 1]);
  }

  #point(u) {
    const { left, top, idx } = u.cursor;
    const mine = u.over.matches(":hover") || this.plot.matches(":focus-visible");
    this.tip.hidden = !mine || left < 0 || idx === null || idx === undefined;
    if (this.tip.hidden) return;
    const at = u.posToVal(left, "x");
    const rows = this.values(at);
    this.tip.replaceChildren(
      h("strong", {}, `${this.label} ${number(Math.round(at))}`),
      ...rows
        .slice(0, SHOWN)
        .map((row) =>
          h(
            "span",
            {},
            h("i", { class: "dot", style: { background: colour(row.slot) } }),
            h("b", {}, digits(row.value)),
            h("span", { class: "name" }, row.name),
          ),
        ),
      rows.length > SHOWN ? h("em", {}, `and ${rows.length - SHOWN} more`) : "",
    );
    const right = left > u.over.clientWidth / 2;
    this.tip.style.left = right ? "auto" : `${left + 14}px`;
    this.tip.style.right = right ? `${u.over.clientWidth - left + 14}px` : "auto";
    this.tip.style.top = `${Math.max(0, Math.min(top - 20, HEIGHT - this.tip.offsetHeight - 40))}px`;
  }

  /** Return {name, slot, value} of each run near `at`, the highest first. */
  values(at) {
    return this.series
      .filter((s) => !s.faint && s.x.length && at >= s.x[0] && at <= s.x[s.x.length - 1])
      .map((s) => ({ name: s.name, slot: s.slot, value: s.y[nearest(s.x, at)] }))
      .filter((row) => row.value !== null)
      .sort((a, b) => b.value - a.value);
  }

  #leave() {
    this.tip.hidden = true;
  }

  #key(event) {
    const u = this.u;
    const steps = { ArrowLeft: -1, ArrowRight: 1, PageDown: 20, PageUp: -20 };
    if (!u || event.target !== this.plot || event.ctrlKey || event.metaKey || event.altKey) return;
    const x = u.data[0];
    if (event.key in steps || event.key === "Home" || event.key === "End") {
      const wanted = (u.cursor.idx ?? 0) + (steps[event.key] ?? (event.key === "End" ? 1e9 : -1e9));
      const index = Math.max(0, Math.min(x.length - 1, wanted));
      u.setCursor({ left: u.valToPos(x[index], "x"), top: 20 });
      const rows = this.values(x[index]).slice(0, SHOWN);
      const told = rows.map((row) => `${row.name} ${number(row.value)}`).join(", ");
      say(this.spoken, `${this.label} ${number(x[index])}: ${told}`);
    } else if (event.key === "+" || event.key === "-") {
      const { min, max } = u.scales.x;
      const at = u.cursor.left >= 0 ? u.posToVal(u.cursor.left, "x") : (min + max) / 2;
      const factor = event.key === "+" ? ZOOM : 1 / ZOOM;
      const [low, high] = [at - (at - min) * factor, at + (max - at) * factor];
      this.#zoom(low, high);
    } else if (event.key === "Escape") {
      this.#zoom(-Infinity, Infinity);
      u.setCursor({ left: -10, top: -10 });
    } else return;
    event.preventDefault();
  }

  /** Show a part of the axis in all charts of the group, as a drag of the mouse does. */
  #zoom(low, high) {
    for (const u of uPlot.sync(this.group).plots) {
      const x = u.data[0];
      if (x.length) u.setScale("x", { min: Math.max(low, x[0]), max: Math.min(high, x[x.length - 1]) });
    }
  }

  #resize() {
    const width = this.plot.clientWidth;
    if (this.u && width && width !== this.u.width) this.u.setSize({ width, height: HEIGHT });
  }

  #fill() {
    if (!this.details.open) return;
    const shown = this.series.filter((s) => !s.faint && s.x.length);
    const last = Math.max(...shown.map((s) => s.x[s.x.length - 1]));
    const first = Math.min(...shown.map((s) => s.x[0]));
    const places = Array.from({ length: TABLE }, (_, i) =>
      Math.round(first + ((last - first) * i) / (TABLE - 1)),
    );
    const rows = [...new Set(places)].map((at) => {
      const near = shown.map((s) => {
        const outside = at < s.x[0] || at > s.x[s.x.length - 1];
        return outside ? "–" : number(s.y[nearest(s.x, at)]);
      });
      return h(
        "tr",
        {},
        h("th", { scope: "row" }, number(at)),
        near.map((text) => h("td", {}, text)),
      );
    });
    const names = shown.map((s) => h("th", { scope: "col" }, s.name));
    const head = h("tr", {}, h("th", { scope: "col" }, this.label), names);
    const table = h("table", {}, h("thead", {}, head), h("tbody", {}, rows));
    this.table.replaceChildren(shown.length ? wide(`${this.title}: values`, table) : "");
  }
}

function aligned(series, log) {
  if (!series.length) return [[]];
  const cleaned = series.map((s) => [s.x, log ? s.y.map((y) => (y > 0 ? y : null)) : s.y]);
  return uPlot.join(cleaned);
}
