// Drives Chromium for pytest: a line of JSON in, {code, arg, theme, width}, and a line of JSON out.
// The code is the body of an async function of `page`, `arg` and `axe`. Each line has a page of its own, and
// its answer also holds what the page has logged, and which hosts it asked.

import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";

const [, , modules, chromium] = process.argv;
const require = createRequire(join(modules, "package.json"));
const playwright = require("playwright-core");
const axeSource = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
const AsyncFunction = (async () => {}).constructor;
const FLAGS = [
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];

const home = mkdtempSync(join(tmpdir(), "lorakit-chromium-"));
const browser = await playwright.chromium.launchPersistentContext(home, {
  executablePath: chromium,
  headless: true,
  args: FLAGS,
  viewport: null,
});
process.on("exit", () => rmSync(home, { recursive: true, force: true }));

/** Return the violations that axe-core calls serious or critical, of some rules or of all. */
async function violations(page, rules) {
  // evaluate, as a script element would break the page's own policy
  await page.evaluate(axeSource);
  const { violations: found } = await page.evaluate(
    (runOnly) => globalThis.axe.run(runOnly ? { runOnly } : {}),
    rules,
  );
  const grave = found.filter((each) => ["serious", "critical"].includes(each.impact));
  return grave.map((each) => `${each.id}: ${each.nodes.map((node) => node.html).join(" | ")}`);
}

for await (const line of createInterface({ input: process.stdin })) {
  const { code, arg, theme = "light", width = 1280, height = 900 } = JSON.parse(line);
  const page = await browser.newPage();
  const said = [];
  const asked = new Set();
  page.on("console", (message) => said.push(message.text()));
  page.on("pageerror", (error) => said.push(String(error.stack ?? error)));
  page.on("dialog", (dialog) => (said.push(`dialog: ${dialog.message()}`), dialog.dismiss()));
  page.on("request", (request) => asked.add(new URL(request.url()).host));
  page.setDefaultTimeout(15_000);
  let answer;
  try {
    await page.setViewportSize({ width, height });
    await page.emulateMedia({ colorScheme: theme });
    const run = new AsyncFunction("page", "arg", "axe", code);
    answer = { value: (await run(page, arg, (rules) => violations(page, rules))) ?? null };
  } catch (error) {
    answer = { error: String(error.stack ?? error) };
  }
  await page.close();
  process.stdout.write(`${JSON.stringify({ ...answer, said, asked: [...asked] })}\n`);
}
await browser.close();
