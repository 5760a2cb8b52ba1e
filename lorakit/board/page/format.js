// Writes numbers as people read them.

const GROUPED = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });

/** Return a number with four digits that count, or "–" if there is none. */
export function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  if (Number.isInteger(value) || size >= 1e4)
    return size < 1e15 ? GROUPED.format(value) : value.toExponential(3);
  if (size !== 0 && size < 1e-3) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

/** Return a number with all of its four digits, for columns of them. */
export function digits(value) {
  return typeof value === "number" && Math.abs(value) >= 1e-3 && Math.abs(value) < 1e4
    ? value.toPrecision(4)
    : number(value);
}

/** Return a score with three decimals, or one if it is a large one. */
export function score(value) {
  return typeof value === "number" ? value.toFixed(Math.abs(value) < 10 ? 3 : 1) : "–";
}

/** Return a number for the tick of an axis: 1.5k, 20M, 2e-5. */
export function tick(value) {
  if (value === null || value === undefined) return "";
  const size = Math.abs(value);
  for (const [unit, letter] of [
    [1e9, "G"],
    [1e6, "M"],
    [1e4, "k"],
  ]) {
    if (size >= unit) return `${Number((value / (letter === "k" ? 1e3 : unit)).toPrecision(4))}${letter}`;
  }
  return size !== 0 && size < 1e-3 ? value.toExponential() : String(Number(value.toPrecision(6)));
}

/** Return seconds as "3 min 20 s". */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const s = Math.round(seconds);
  if (s < 60) return `${seconds < 10 ? Number(seconds.toPrecision(2)) : s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

/** Return bytes in MB or GB, of 1,000 each. */
export function bytes(value) {
  if (value === null || value === undefined) return "–";
  return value >= 1e9 ? `${(value / 1e9).toFixed(2)} GB` : `${number(Math.round(value / 1e5) / 10)} MB`;
}

/** Return a time in seconds since 1970 or an ISO text as a local date with minutes. */
export function date(value) {
  if (value === null || value === undefined) return "–";
  const time = new Date(typeof value === "number" ? value * 1000 : value);
  if (Number.isNaN(time.getTime())) return String(value);
  const two = (n) => String(n).padStart(2, "0");
  const day = `${time.getFullYear()}-${two(time.getMonth() + 1)}-${two(time.getDate())}`;
  return `${day} ${two(time.getHours())}:${two(time.getMinutes())}`;
}

/** Return the name of a quantity as a person says it: eval_loss is "validation loss". */
export function spoken(name) {
  const known = {
    loss: "loss, nats per label token",
    eval_loss: "validation loss",
    rouge_l: "ROUGE-L",
    macro_f1: "macro F1",
    weighted_f1: "weighted F1",
    bert_score: "BERTScore",
    bits_per_byte: "bits per byte",
    grad_norm: "gradient norm",
    peak_memory_mb: "peak memory, MB",
    tokens_per_second: "tokens per second",
    mean_token_accuracy: "token accuracy",
  };
  const plain = name.replace(/^eval_/, "");
  return known[name] ?? known[plain] ?? plain.replaceAll("_", " ");
}

/** Return the text of a prompt, which may be the messages of a chat. */
export function promptText(prompt) {
  if (typeof prompt === "string") return prompt;
  return prompt.map((message) => `${message.role}: ${message.content}`).join("\n\n");
}
