// The difference of two texts, word by word.

const MOST = 400; // words of a text that are compared; the table of lengths grows with its square

/**
 * Return [[kind, text], ...] that turns `before` into `after`: kind is "same", "gone" or "new".
 * The words of a longest common subsequence stay.
 */
export function difference(before, after) {
  const [a, b] = [split(before), split(after)];
  if (a.length > MOST || b.length > MOST) return [["same", after]];
  const lengths = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i -= 1) {
    for (let j = b.length - 1; j >= 0; j -= 1) {
      const skipped = Math.max(lengths[i + 1][j], lengths[i][j + 1]);
      lengths[i][j] = a[i] === b[j] ? lengths[i + 1][j + 1] + 1 : skipped;
    }
  }
  const parts = [];
  const add = (kind, text) => {
    const last = parts[parts.length - 1];
    if (last && last[0] === kind) last[1] += text;
    else parts.push([kind, text]);
  };
  let [i, j] = [0, 0];
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) {
      add("same", a[i]);
      i += 1;
      j += 1;
    } else if (j >= b.length || (i < a.length && lengths[i + 1][j] >= lengths[i][j + 1])) {
      add("gone", a[i]);
      i += 1;
    } else {
      add("new", b[j]);
      j += 1;
    }
  }
  return parts;
}

function split(text) {
  return text.match(/\s+|[\p{L}\p{N}_]+|./gsu) ?? [];
}
