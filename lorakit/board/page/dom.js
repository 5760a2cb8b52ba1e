// Builds what the page shows. Data becomes text here, never markup: nothing parses it.

const SVG = "http://www.w3.org/2000/svg";

/**
 * Make an element. Properties that begin with "on" are listeners, `style` holds custom properties,
 * `data` the dataset; other ones are attributes, left out if false, null or undefined. Children
 * that are no nodes become text.
 */
export function h(tag, properties = {}, ...children) {
  return filled(document.createElement(tag), properties, children);
}

/** Make an SVG element, as `h` does. */
export function svg(tag, properties = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), properties, children);
}

function filled(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") {
      for (const [key, each] of Object.entries(value)) element.style.setProperty(key, each);
    } else if (name === "data") Object.assign(element.dataset, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** Let a node have this text. A node that has it stays as it is, so that readers stay quiet. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Tell screen readers something that happened. */
export function announce(text) {
  say(document.getElementById("announcer"), text);
}

/** Make a text that screen readers read and nobody sees. */
export function unseen(text) {
  return h("span", { class: "unseen" }, text);
}

/** Make a paragraph that says that there is nothing to show, and why. */
export function nothing(text) {
  return h("p", { class: "quiet nothing" }, text);
}

/** Make a paragraph that tells of an error. */
export function failure(error) {
  return h("p", { class: "failure", role: "alert" }, error.message);
}

/** Make a box that scrolls sideways when its table is too wide; the keyboard reaches it. */
export function wide(label, table) {
  return h("div", { class: "wide", role: "region", "aria-label": label, tabindex: 0 }, table);
}

/** Make a choice of one of several values, as radio buttons that look like one bar. */
export function choice(label, name, options, chosen, pick) {
  const buttons = options.map(([value, text]) =>
    h(
      "label",
      {},
      h("input", {
        type: "radio",
        name,
        value,
        checked: value === chosen,
        onchange: () => pick(value),
      }),
      h("span", {}, text),
    ),
  );
  return h("fieldset", { class: "choice" }, h("legend", {}, label), ...buttons);
}

/** Make a select with a label: options are [value, text] pairs. */
export function select(label, options, chosen, pick) {
  const box = h(
    "select",
    { onchange: () => pick(box.value) },
    options.map(([value, text]) => h("option", { value, selected: value === chosen }, text)),
  );
  return h("label", { class: "field" }, h("span", {}, label), box);
}

/** Ask whether to go on, in the page. The promise holds true or false. */
export function confirmed(question, yes) {
  return new Promise((resolve) => {
    const close = (value) => () => dialog.close(value);
    const dialog = h(
      "dialog",
      { class: "ask", "aria-labelledby": "ask" },
      h("p", { id: "ask" }, question),
      h(
        "p",
        { class: "buttons" },
        h("button", { type: "button", onclick: close(""), autofocus: true }, "Cancel"),
        h("button", { type: "button", class: "main", onclick: close("yes") }, yes),
      ),
    );
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue === "yes");
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}
