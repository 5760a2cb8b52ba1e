// Colours of runs. A run keeps its place while it is selected, so it looks the same in every chart.

import { h, svg } from "./dom.js";

const COLOURS = 6; // --run-0 to --run-5 in style.css; a test holds how far they are apart
const DASHES = [[], [9, 5], [3, 4], [14, 4, 3, 4]]; // further runs take the colours again, dashed

/** Return the colour of a place, in the theme that is on. */
export function colour(slot) {
  const style = getComputedStyle(document.getElementById(`colour-${slot % COLOURS}`));
  return style.color;
}

/** Return the class of what has the colour of a place. */
export function runClass(slot) {
  return `run-${slot % COLOURS}`;
}

/** Return the dashes of a place: none for the first six. */
export function dash(slot) {
  return DASHES[Math.floor(slot / COLOURS) % DASHES.length];
}

/** Make the elements that `colour` reads, since only an element knows what a theme makes of it. */
export function paint() {
  const samples = Array.from({ length: COLOURS }, (_, i) => h("i", { id: `colour-${i}`, class: runClass(i) }));
  document.body.append(h("div", { hidden: true }, samples));
}

/** Give places to the selected runs; those that have one keep it. */
export function place(slots, selected) {
  for (const id of slots.keys()) if (!selected.has(id)) slots.delete(id);
  const taken = new Set(slots.values());
  let next = 0;
  for (const id of selected) {
    if (slots.has(id)) continue;
    while (taken.has(next)) next += 1;
    slots.set(id, next);
    taken.add(next);
  }
}

/** Make a sample of the line of a place. */
export function swatch(slot) {
  const line = svg("line", {
    x1: 1,
    y1: 4,
    x2: 21,
    y2: 4,
    "stroke-width": 3,
    "stroke-dasharray": dash(slot)
      .map((d) => d / 2)
      .join(" "),
  });
  return svg(
    "svg",
    { class: `swatch ${runClass(slot)}`, viewBox: "0 0 22 8", "aria-hidden": "true" },
    line,
  );
}
