"""The pictures of the board in docs/images: `make screenshots` runs this.

The runs are made up as for the tests; the page is the real one, drawn by Chromium.
"""

import sys
import tempfile
from pathlib import Path

import lorakit as lk
from tests.board import chromium
from tests.board.folders import write_comparison, write_run

CURVES = """
await page.goto(arg.url);
await page.waitForSelector(".u-wrap canvas");
await page.fill(".controls input[type=range]", "0.8");
await page.hover(".plot", { position: { x: 130, y: 120 } });
await page.waitForTimeout(300);
await page.screenshot({ path: arg.path });"""

VIEW = """
await page.goto(`${arg.url}#/${arg.view}`);
await page.waitForSelector("main article");
await page.waitForTimeout(300);
await page.screenshot({ path: arg.path });"""


def main(folder: Path) -> None:
    """Write board.png and comparison.png into a folder."""
    with tempfile.TemporaryDirectory() as made, chromium.started() as browser:
        root = Path(made)
        write_run(root / "runs" / "smollm2-r8", steps=240, started=1.79000e9)
        write_run(root / "runs" / "smollm2-r16", steps=240, r=16, floor=1.05, started=1.79003e9)
        write_run(root / "runs" / "smollm2-r32", steps=240, r=32, floor=1.0, started=1.79006e9)
        write_run(
            root / "runs" / "smollm2-fast", steps=120, floor=1.5, started=1.79009e9, state="stopped"
        )
        write_comparison(root / "sizes", name="SmolLM2-135M at two settings")
        runs = lk.write_report(root / "runs", root / "runs.html").as_uri()
        comparison = lk.write_report(root / "sizes", root / "sizes.html").as_uri()
        target = folder.resolve()
        size = {"width": 1280, "height": 860}
        browser.run(CURVES, url=runs, path=str(target / "board.png"), **size)
        path = str(target / "comparison.png")
        browser.run(VIEW, url=comparison, view="comparisons", path=path, width=1280, height=700)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
