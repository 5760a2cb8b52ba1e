"""The page in Chromium: what it shows, that texts stay texts, and that everybody can use it."""

import pytest

from lorakit.board.report import write_report

from .folders import COMPLETION, HOSTILE, write_comparison, write_run

# Opens the page, and waits until its table has rows and its first chart is drawn.
OPEN = """
await page.goto(arg.url);
await page.waitForSelector("tbody tr");
await page.waitForSelector(".u-wrap canvas");
"""
# What axe-core looks at: everything, and in the other theme what it may change.
RULES = {"light": None, "dark": ["color-contrast"]}
VIEWS = ["curves", "settings", "evaluations", "samples", "memory"]


def serious(browser, url, theme, views, ready):
    """What axe-core finds in each view, once an element of the selector `ready` is there."""
    return browser.run(
        """
        const found = {};
        for (const view of arg.views) {
          await page.goto(`${arg.url}#/${view}`);
          await page.waitForSelector(arg.ready);
          await page.waitForTimeout(200);
          const graves = await axe(arg.rules);
          if (graves.length) found[view] = graves;
        }
        return found;""",
        theme=theme,
        rules=RULES[theme],
        url=url,
        views=views,
        ready=ready,
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The address of a report about four runs, one of a hostile name, and a comparison."""
    root = tmp_path_factory.mktemp("report")
    write_run(root / "runs" / "first", started=1.7900e9)
    write_run(root / "runs" / "second", r=16, floor=1.0, started=1.7901e9)
    write_run(root / "runs" / HOSTILE, r=32, started=1.7902e9, state="failed", steps=80)
    write_run(root / "runs" / "100% #1?", started=1.7903e9, state="stopped", steps=8, samples=False)
    write_comparison(root / "runs" / "sizes")
    return write_report(root / "runs", root / "report.html").as_uri()


def test_a_report_opens_from_a_file_and_asks_nobody(browser, report):
    shown = browser.run(
        OPEN
        + """
        return await page.evaluate(() => ({
          names: [...document.querySelectorAll("tbody th .name")].map((e) => e.textContent),
          charts: [...document.querySelectorAll("figcaption")].map((e) => e.textContent),
          fetched: document.querySelectorAll("img, iframe, script[src], link[rel=stylesheet]")
            .length,
        }));""",
        url=report,
    )
    assert browser.said == []
    assert set(browser.asked) <= {""}  # file: and data: have no host
    assert shown["names"] == ["100% #1?", HOSTILE, "second", "first"]  # the newest first
    assert shown["charts"][0] == "loss, nats per label token"
    assert shown["fetched"] == 0


def test_hostile_names_and_texts_stay_texts(browser, report):
    said = []
    for view in [*(f"runs/{view}" for view in VIEWS), "comparisons"]:
        text = browser.run(
            """
            await page.goto(`${arg.url}#/${arg.view}`);
            await page.waitForSelector("main article, main figure, main table");
            await page.waitForTimeout(100);
            return {
              text: await page.evaluate(() => document.querySelector("main").textContent),
              images: await page.evaluate(() => document.querySelectorAll("img").length),
            };""",
            url=report,
            view=view,
        )
        assert HOSTILE in text["text"]
        assert text["images"] == 0
        assert browser.said == []
        said.append(text["text"])
    assert COMPLETION in said[VIEWS.index("samples")]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser, report, theme):
    views = [*(f"runs/{view}" for view in VIEWS), "comparisons"]
    ready = "main article, main figure, main table"
    assert serious(browser, report, theme, views, ready) == {}
