"""Puts the page into one file: its style, its modules, uPlot, and the answers that it shows.

A module becomes a function that is called at once and returns what the module exports. The file
is `const $dom = (() => {...})();`, the modules in the order in which they need each other. So there
is no build tool, and names of one module do not meet those of another. In return a module may only
import named things from files beside it, each in one line, and export functions, classes and
constants where it declares them.

The answers are JSON in a script element that no browser runs, with every "<" escaped, so that no
text of a run ends the element. The page allows the scripts and styles whose digests it names, and
nothing else: whatever a text of a run may hold, it does not run, and nothing is fetched.
"""

import re
from base64 import b64encode
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from lorakit.board.as_json import to_json

PAGE = Path(__file__).parent / "page"
UPLOT = "vendor/uplot/uPlot"
IMPORT = re.compile(r'^import \{ ([\w, ]+) \} from "\./(\w+)\.js";\n', re.MULTILINE)
EXPORT = re.compile(r"^export ((?:async )?(?:function\*?|class|const) (\w+))", re.MULTILINE)
LEFT = re.compile(r"^(?:import|export)\b.*", re.MULTILINE)


def single_page(answers: Mapping[str, Any], name: str, home: str = "runs") -> str:
    """Return the page as one HTML file.

    Args:
        answers: What the server would answer, by its path without a query.
        name: What the page is called at its top.
        home: The view that opens first, "runs" or "comparisons".

    Returns:
        The text of the file. It needs no other file and no network.
    """
    style = read(f"{UPLOT}.min.css") + read("style.css")
    chart, code = read(f"{UPLOT}.iife.min.js"), joined("app")
    frozen = to_json({"name": name, "home": home, "answers": answers}).decode()
    policy = (
        f"default-src 'none'; script-src {_digest(chart)} {_digest(code)}; "
        f"style-src {_digest(style)}; img-src data:; base-uri 'none'; form-action 'none'"
    )
    text = read("index.html")
    for line, put in {
        '<meta charset="utf-8">': '<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        f'<link rel="stylesheet" href="static/{UPLOT}.min.css">\n': "",
        '<link rel="stylesheet" href="static/style.css">': f"<style>{style}</style>",
        f'<script src="static/{UPLOT}.iife.min.js" defer></script>': f"<script>{chart}</script>",
        '<script type="module" src="static/app.js"></script>': _data(frozen)
        + f'\n<script type="module">{code}</script>',
    }.items():
        before, found, after = text.partition(line)
        assert found, f"index.html has no {line}"
        text = before + put + after
    return text


def read(name: str) -> str:
    """Return the text of a file of the page."""
    return (PAGE / name).read_text(encoding="utf-8")


def joined(name: str) -> str:
    """Return a module and all that it needs as one script, each module once."""
    done = dict[str, str]()
    _join(name, done, ())
    return "\n".join(done.values())


def _join(name: str, done: dict[str, str], above: tuple[str, ...]) -> None:
    assert name not in above, f"modules import each other in a circle: {above}"
    text = read(f"{name}.js")
    for needed in (match[2] for match in IMPORT.finditer(text)):
        if needed not in done:
            _join(needed, done, (*above, name))
    text = IMPORT.sub(r"const { \1 } = $\2;\n", text)
    exports = ", ".join(match[2] for match in EXPORT.finditer(text))
    text = EXPORT.sub(r"\1", text)
    left = LEFT.search(text)
    assert left is None, f"{name}.js has a line that cannot be joined: {left}"
    assert "</script" not in text, f"{name}.js would end its script element"
    done[name] = f"const ${name} = (() => {{\n{text}return {{ {exports} }};\n}})();\n"


def _data(frozen: str) -> str:
    escaped = frozen
    for letter in "<\u2028\u2029":  # JSON has them in texts alone, where an escape means the same
        escaped = escaped.replace(letter, f"\\u{ord(letter):04x}")
    return f'<script type="application/json" id="frozen">{escaped}</script>'


def _digest(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
