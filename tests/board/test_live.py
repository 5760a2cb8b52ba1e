"""The page of a board that is served: runs that go on, buttons, forms, and many long runs."""

import http.client
import json
import os
import re
import select
import signal
import subprocess
import sys
from contextlib import suppress
from urllib.parse import urlsplit

import pytest
import yaml

from lorakit.board.runs import is_locked
from lorakit.cli.main import main

from ..conftest import ROWS
from .folders import HOSTILE, curve, write_comparison, write_run
from .test_page import OPEN, serious

SECONDS = 60  # until a board answers; torch takes its time on a busy machine


def end_runs(folder):
    """End the runs that go on in a folder, as those of a test that failed do: they hold a lock."""
    for lock, said in ((".started", ".started"), (".lock", "run.json")):
        for path in folder.rglob(lock):
            if is_locked(path):
                with suppress(OSError, ValueError, KeyError):
                    os.killpg(json.loads((path.parent / said).read_text())["pid"], signal.SIGKILL)


@pytest.fixture(scope="module")
def serve():
    """serve(folder) -> the address of a board over it; all of its runs end with the tests."""
    boards, folders = [], []

    def serve(folder):
        command = [sys.executable, "-m", "lorakit", "board", str(folder), "--port", "0"]
        board = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd=folder, start_new_session=True
        )
        boards.append(board)
        folders.append(folder)
        assert select.select([board.stdout], [], [], SECONDS)[0], "the board did not begin"
        return board.stdout.readline().split()[0]

    try:
        yield serve
    finally:
        for board in boards:
            os.killpg(board.pid, signal.SIGKILL)
            board.wait(10)
        for folder in folders:
            end_runs(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of three runs and a comparison."""
    root = tmp_path_factory.mktemp("board")
    write_run(root / "first", started=1.7900e9)
    write_run(root / HOSTILE, r=16, started=1.7902e9)
    write_run(root / "deep" / "100% #1?", r=32, started=1.7901e9, state="stopped", steps=40)
    write_comparison(root / "sizes")
    return root


@pytest.fixture(scope="module")
def board(serve, root):
    """The address of a board over that folder."""
    return serve(root)


def test_a_run_is_started_watched_stopped_and_resumed(browser, serve, tiny_dir, tmp_path):
    """All of it by the page's own buttons, and no reload."""
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    values = {
        "model": str(tiny_dir),
        "dtype": "float32",
        "lora": {"r": 2},
        "data": {"train": "rows.jsonl"},
        "max_steps": 1_000_000,
        "learning_rate": 1e-3,
    }
    told = browser.run(
        """
        const state = (name) => page.waitForSelector(`td[data-state=${name}]`, { timeout: 45_000 });
        const confirm = async (button, answer) => {
          await page.click(`td.action button:has-text("${button}")`);
          await page.click(`dialog button:has-text("${answer}")`);
        };
        const step = async () => {
          const text = await page.textContent("tbody td.step");
          return Number(text.split("/")[0].replaceAll(",", ""));
        };
        const later = async (before) => {
          for (let i = 0; i < 150; i += 1) {
            if ((await step()) > before) return;
            await page.waitForTimeout(200);
          }
          throw new Error(`the page stays at step ${before}`);
        };
        await page.goto(`${arg.url}#/start`);
        await page.fill("#name", "from the page");
        await page.fill("#text", arg.text);
        await page.click("button[type=submit]");
        await state("running");
        await page.waitForSelector(".u-wrap canvas", { timeout: 45_000 });
        const going = await page.textContent("tbody td.state");
        const seen = await step();
        await later(seen);
        await confirm("Stop", "Cancel");
        await confirm("Stop", "Stop it");
        await state("stopped");
        const stopped = await step();
        await confirm("Resume", "Resume it");
        await state("running");
        await later(stopped);
        await confirm("Stop", "Stop it");
        await state("stopped");
        const resumed = await step();
        await page.click('.tabs a:has-text("Rows")');
        await page.waitForSelector(".token.learned", { timeout: 45_000 });
        const row = await page.textContent("article.row");
        return { going, seen, stopped, resumed, row };""",
        url=serve(tmp_path),
        text=yaml.safe_dump(values),
    )
    assert browser.said == []
    assert "running" in told["going"]  # when the first curve appeared
    assert told["seen"] < told["stopped"] < told["resumed"]
    assert "What·is·0·plus·0?·" in told["row"].partition("[learned: ")[0]
    assert "It·is·0." in told["row"].partition("[learned: ")[2]
    run = tmp_path / "from the page"
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()]
    assert steps == list(range(1, len(steps) + 1))
    assert steps[-1] >= told["resumed"]


@pytest.mark.parametrize("steps", [1_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_hundred_runs_load_at_once(browser, serve, tmp_path, steps):
    """The table has all runs at once, and curves come downsampled. Times are not asserted: other
    programs share the machine."""
    text = "".join(json.dumps(line) + "\n" for line in curve(steps))
    for i in range(100):
        run = tmp_path / f"run-{i:03}"
        run.mkdir()
        if i < 4:
            (run / "metrics.jsonl").write_text(text)
        else:  # a link to the same bytes, as 2 GB of files would take their time
            os.link(tmp_path / "run-000" / "metrics.jsonl", run / "metrics.jsonl")
    url = serve(tmp_path)
    told = browser.run(
        """
        const bodies = [];
        page.on("response", (response) => {
          if (response.url().includes("/api/runs")) bodies.push(response);
        });
        const begin = Date.now();
        await page.goto(arg.url);
        await page.waitForSelector("tbody tr");
        const rows = await page.locator("tbody tr").count();
        const first = Date.now() - begin;
        await page.waitForSelector(".u-wrap canvas", { timeout: 45_000 });
        const charts = Date.now() - begin;
        const sizes = [];
        for (const response of bodies) {
          const ofMetrics = new URL(response.url()).pathname.endsWith("metrics");
          sizes.push([ofMetrics, (await response.body()).length]);
        }
        return { rows, first, charts, sizes };""",
        url=url,
    )
    print(f"100 runs of {steps:,} steps: table {told['first']} ms, curves {told['charts']} ms")
    assert told["rows"] == 100
    lists = [size for of_metrics, size in told["sizes"] if not of_metrics]
    curves = [size for of_metrics, size in told["sizes"] if of_metrics]
    assert max(lists) < 100_000  # the list of 100 runs
    assert 1 <= len(curves) <= 4  # of the runs that are selected at first, not of all
    assert max(curves) < 1_000_000  # of 20 MB, if the runs are long


def test_a_damaged_comparison_says_so_and_the_others_can_be_reached(browser, board, root):
    """It is the first of the list here, which the page shows if it is asked for none."""
    bad = root / "a damaged one"
    bad.mkdir()
    (bad / "comparison.json").write_text('{"runs": [')
    try:
        told = browser.run(
            """
            await page.goto(`${arg.url}#/comparisons`);
            await page.waitForSelector("p.failure");
            const said = await page.textContent("p.failure");
            await page.click('nav.tabs a:has-text("sizes")');
            await page.waitForSelector("article.task");
            return said;""",
            url=board,
        )
    finally:
        (bad / "comparison.json").unlink()
        bad.rmdir()
    assert "is damaged" in told


def test_votes_by_keys(browser, board, root):
    """Two pairs of answers, judged by the keys 1 and 0; whose they are stays unsaid."""
    told = browser.run(
        """
        await page.goto(`${arg.url}#/comparisons/sizes`);
        await page.click('a:has-text("Vote")');
        await page.waitForSelector(".vote .sides");
        const pair = await page.textContent(".vote .sides");
        await page.keyboard.press("1");
        await page.waitForSelector('p[role=status]:has-text("1 to go")');
        await page.keyboard.press("0");
        await page.waitForSelector('h1:has-text("All pairs are judged")');
        return { pair, end: await page.textContent(".vote") };""",
        url=board,
    )
    assert browser.said == []
    assert told["pair"].count(HOSTILE) == 2
    assert "r8" not in told["pair"]
    assert "1 for neither" in told["end"]
    assert "ties as half" in told["end"]
    votes = [json.loads(line) for line in (root / "sizes" / "votes.jsonl").open()]
    assert [vote["winner"] == "tie" for vote in votes] == [False, True]


def test_a_chat_with_base_and_adapter(browser, serve, tiny_dir, tmp_path):
    """Two turns: each side is asked with its own answers, and both answer."""
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    values = {"model": str(tiny_dir), "dtype": "float32", "lora": {"r": 2}, "max_steps": 1}
    values |= {"data": str(tmp_path / "rows.jsonl"), "output_dir": str(tmp_path / "tuned")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    told = browser.run(
        """
        const bodies = [];
        page.on("request", (request) => {
          if (request.url().endsWith("/api/chat")) bodies.push(request.postDataJSON());
        });
        await page.goto(`${arg.url}#/chat`);
        await page.fill('label:has-text("New tokens") input', "4");
        for (const [turn, text] of [arg.text, "and again"].entries()) {
          await page.fill("textarea", text);
          await page.keyboard.press("Enter");
          await page.locator(".log .user").nth(2 * turn + 1).waitFor();
          const free = ".chat button[type=submit]:not(:disabled)";
          await page.waitForSelector(free, { timeout: 60_000 });
        }
        const heads = await page.locator(".column h2").allTextContents();
        const users = await page.locator(".log .user").allTextContents();
        const answers = await page.locator(".log .answer").allTextContents();
        return { bodies, heads, users, answers, graves: await axe() };""",
        url=serve(tmp_path),
        text=HOSTILE,
    )
    assert browser.said == []
    assert told["heads"] == [f"{tiny_dir.name}, the base", "tuned"]
    assert told["users"] == [HOSTILE, "and again"] * 2
    left, left_again, right, right_again = told["answers"]
    assert all([left, left_again, right, right_again])
    asked = [
        [
            {"role": "user", "content": HOSTILE},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "and again"},
        ]
        for answer in (left, right)
    ]
    assert told["bodies"][1]["messages"] == asked
    assert told["graves"] == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious_in_what_takes_a_server(browser, board, theme):
    views = ["runs/rows", "start", "comparisons", "vote/sizes", "chat"]
    assert serious(browser, board, theme, views, "main section") == {}


def test_axe_finds_what_is_planted(browser, board):
    found = browser.run(
        """
        await page.goto(arg.url);
        await page.waitForSelector("tbody tr");
        await page.evaluate(() => {
          document.querySelector("main").append(document.createElement("img"));
        });
        return axe();""",
        url=board,
    )
    assert [each.partition(":")[0] for each in found] == ["image-alt"]


def test_names_stay_texts_and_nobody_else_is_asked(browser, board):
    """The page's policy lets nothing else run, and it logs nothing."""
    names = browser.run(
        OPEN
        + """
        await page.hover(".plot");
        await page.waitForSelector(".tip:not([hidden])");
        return await page.locator("tbody th .name").allTextContents();""",
        url=board,
    )
    assert names == [HOSTILE, "100% #1?", "first"]
    assert browser.said == []
    assert browser.asked == [re.search("//([^/]+)/", board)[1]]


@pytest.mark.parametrize(
    ("path", "host", "status"),
    [
        ("", None, 200),
        ("", "evil.example", 403),  # a name of another host that leads here
        ("api/runs", "127.0.0.1.evil.example", 403),
        ("static/../../../etc/passwd", None, 404),
        ("static/..%2f..%2fapp.py", None, 404),
        ("api/runs/..%2F..%2Fetc/metrics", None, 404),
        ("../wrong-token/api/runs", None, 403),
    ],
)
def test_others_and_paths_outside_are_refused(board, path, host, status):
    """The bytes of a request as they are, since a browser would tidy up the path first."""
    url = urlsplit(board)
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=10)
    place = path.removeprefix("../") if path.startswith("..") else url.path.removeprefix("/") + path
    connection.request("GET", f"/{place}", headers={"Host": host or url.netloc})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    assert answer.status == status
    assert (b"error" in body) == (status != 200)
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]


def test_sorting_filtering_and_selecting(browser, board):
    told = browser.run(
        """
        await page.goto(arg.url);
        await page.waitForSelector("tbody tr");
        const names = () => page.locator("tbody th .name").allTextContents();
        const checked = () => page.locator("tbody input:checked").count();
        const all = await checked();
        await page.click('th button:has-text("Run")');
        const up = await names();
        const order = await page.getAttribute("th.name", "aria-sort");
        await page.click('th button:has-text("Run")');
        const down = await names();
        await page.fill("input[type=search]", "#1? stopped");
        const found = await names();
        await page.fill("input[type=search]", "no such run");
        const none = await page.textContent(".runs .nothing");
        await page.fill("input[type=search]", "");
        await page.click('button:has-text("Clear selection")');
        return { all, up, order, down, found, none, cleared: await checked() };""",
        url=board,
    )
    assert told["up"] == [HOSTILE, "100% #1?", "first"]
    assert told["down"] == told["up"][::-1]
    assert told["order"] == "ascending"
    assert told["found"] == ["100% #1?"]
    assert told["none"] == "No run has these words."
    assert (told["all"], told["cleared"]) == (3, 0)


def test_the_keyboard_reaches_everything(browser, board):
    """Tab comes by every control; a chart reads its values, zooms and resets by keys alone."""
    told = browser.run(
        OPEN
        + """
        const reached = await page.evaluate(() => document.querySelectorAll(
          "a, button:not(:disabled), input, select, textarea, summary, [tabindex='0']").length);
        const seen = new Set();
        for (let i = 0; i < reached + 5; i += 1) {
          await page.keyboard.press("Tab");
          const focus = await page.evaluate(() => {
            const { tagName, className, textContent, type } = document.activeElement;
            const outline = getComputedStyle(document.activeElement).outlineStyle;
            const text = [tagName, className, type, textContent.slice(0, 20)].join("/");
            return { text, outline };
          });
          seen.add(focus.text);
          const marked = focus.outline !== "none" || /radio|BODY/.test(focus.text);
          if (!marked) throw new Error(`no outline: ${focus.text}`);
        }
        await page.focus(".plot");
        for (const key of ["Home", "ArrowRight", "ArrowRight"]) await page.keyboard.press(key);
        const said = await page.textContent("figure .unseen[aria-live]");
        await page.keyboard.press("End");
        const last = await page.textContent("figure .unseen[aria-live]");
        const scales = () => page.evaluate(() =>
          uPlot.sync("curves").plots.map((u) => [u.scales.x.min, u.scales.x.max]));
        await page.keyboard.press("+");
        await page.waitForTimeout(50);
        const zoomed = await scales();
        await page.keyboard.press("Escape");
        await page.waitForTimeout(50);
        return { seen: [...seen], said, last, zoomed, whole: await scales() };""",
        url=board,
    )
    text = "\n".join(told["seen"])
    controls = ["Runs", "checkbox", "search", "radio", "range", "plot", "Values", "Resume"]
    assert [control for control in controls if control not in text] == []
    assert told["said"].startswith("step 3: ")
    assert told["last"].startswith("step 120: ")
    assert HOSTILE in told["last"]
    assert len(told["zoomed"]) > 3
    assert {tuple(scale) for scale in told["whole"][:3]} == {(1, 120)}
    for low, high in told["zoomed"]:  # all charts, towards the end, where the cursor is
        assert (low > 30, high) == (True, 120)


def test_axis_smoothing_and_values(browser, board):
    """The axis is tokens, the table has the values of the file, smoothing moves the end."""
    told = browser.run(
        OPEN
        + """
        await page.click('label:has-text("tokens")');
        await page.click("figure summary");
        const rows = () => page.locator("figure tbody").first().locator("tr").allTextContents();
        const head = await page.textContent("figure thead");
        const raw = await rows();
        await page.fill(".controls input[type=range]", "0.9");
        return { head, raw, smooth: await rows() };""",
        url=board,
    )
    assert told["head"].startswith("tokens")
    assert told["raw"][-1].startswith(f"{2048 * 120:,}")
    assert told["raw"][0] == told["smooth"][0]  # an average begins at the first value
    assert told["raw"][-1] != told["smooth"][-1]


def test_a_narrow_window_has_no_sideways_scroll(browser, board):
    wide = browser.run(
        OPEN
        + """
        return page.evaluate(() => {
          const { scrollWidth, clientWidth } = document.documentElement;
          return [scrollWidth, clientWidth];
        });""",
        width=360,
        height=740,
        url=board,
    )
    assert wide[0] <= wide[1]


def test_a_board_that_ends_is_said(browser, board):
    said = browser.run(
        """
        await page.goto(arg.url);
        await page.waitForSelector("tbody tr");
        await page.route("**/api/runs", (route) => route.abort());
        await page.waitForSelector("#trouble");
        const said = await page.textContent("#trouble");
        await page.unroute("**/api/runs");
        await page.waitForSelector("#trouble", { state: "detached" });
        return said;""",
        url=board,
    )
    assert said == "The board does not answer; is it still running?"
