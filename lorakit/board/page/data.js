// Where answers come from: the server, or the file that this page is in.

/** Answers of a server, by its paths relative to the page. */
class LiveSource {
  live = true;
  home = "runs";

  async get(path) {
    return answer(await reached(path, { headers: { Accept: "application/json" } }));
  }

  async post(path, body = {}) {
    return answer(await reached(path, sent(body)));
  }

  /** Yield the events of a stream as they come; `signal` ends it. */
  async *stream(path, body, signal) {
    const response = await reached(path, { ...sent(body), signal });
    if (!response.ok) await answer(response);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      text += value;
      const events = text.split(/\r?\n\r?\n/);
      text = events.pop();
      for (const event of events) {
        const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield JSON.parse(lines.map((line) => line.slice(5)).join("\n"));
      }
    }
  }
}

/** Answers that were written into this file when it was made. */
class FrozenSource {
  live = false;

  constructor(frozen) {
    this.frozen = frozen;
    this.home = frozen.home;
  }

  async get(path) {
    const plain = path.split("?")[0].split("/").map(decodeURIComponent).join("/");
    const { answers } = this.frozen;
    const found = Object.hasOwn(answers, plain) ? answers[plain] : undefined;
    if (found === undefined) throw new Error("This file does not hold that; the board has it.");
    return found;
  }
}

/** Return the source of this page. */
export function source() {
  const element = document.getElementById("frozen");
  return element ? new FrozenSource(JSON.parse(element.textContent)) : new LiveSource();
}

/** Return the path of a part of a run: its id is one segment, whatever it holds. */
export function runPath(id, part) {
  return `api/runs/${encodeURIComponent(id)}/${part}`;
}

/** Return whether a run has written anything yet. */
export function begun(run) {
  return run.metrics.length > 0;
}

function sent(body) {
  const headers = { "Content-Type": "application/json" };
  return { method: "POST", headers, body: JSON.stringify(body) };
}

async function reached(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The board does not answer; is it still running?");
  }
}

async function answer(response) {
  const value = await response.json().catch(() => null);
  if (response.ok && value !== null) return value;
  throw new Error(value?.error ?? `The board answered ${response.status}.`);
}
