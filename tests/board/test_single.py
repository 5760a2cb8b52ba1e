"""The page as one file: modules that are joined run as they do apart, and no text ends a script."""

import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.board import single
from lorakit.board.single import PAGE, joined, single_page

node = pytest.mark.skipif(shutil.which("node") is None, reason="needs node")


class Scripts(HTMLParser):
    """The script elements of a page as an HTML parser finds them: attributes and texts."""

    def __init__(self, text):
        super().__init__()
        self.found, self.inside, self.tags = [], False, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "script":
            self.found.append((dict(attrs), ""))
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "script"

    def handle_data(self, data):
        if self.inside:
            attrs, text = self.found[-1]
            self.found[-1] = (attrs, text + data)


texts = st.text() | st.sampled_from(["</script>", "<!--<script>", "]]>", "\u2028", "\ud800"])


@settings(max_examples=30)  # each makes a page of 150 kB
@given(st.dictionaries(texts, st.lists(texts) | st.floats() | st.none(), max_size=4))
def test_any_answers_come_back_from_the_page(answers):
    page = single_page(answers, "runs")
    parsed = Scripts(page)
    assert len(parsed.found) == 3  # uPlot, the answers, the modules
    [(_, frozen)] = [each for each in parsed.found if each[0].get("type") == "application/json"]
    # lone halves of surrogate pairs survive as escapes, and what is not finite is null
    finite = {k: None if v in (np.inf, -np.inf) or v != v else v for k, v in answers.items()}
    assert json.loads(frozen) == {"name": "runs", "home": "runs", "answers": finite}
    assert "\u2028" not in frozen
    page.encode()


def test_the_page_names_all_that_may_run():
    text = single_page({}, "<runs>")
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    rest = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.findall(r"src=", rest)
    assert set(re.findall(r'href="([^"]*)"', rest)) == {"#main", "data:,"}


def test_every_module_is_in_the_one_file():
    text = joined("app")
    names = {path.stem for path in PAGE.glob("*.js")}
    assert set(re.findall(r"^const \$(\w+) = \(\(\) => \{$", text, re.MULTILINE)) == names


@pytest.mark.parametrize("path", sorted(PAGE.glob("*.js")), ids=lambda path: path.stem)
def test_modules_are_short_and_make_no_markup_of_texts(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert word not in text
    assert not re.search(r"alert\(|prompt\(|new Function|setAttribute\(.style", text)
    assert text.startswith("// ")  # what the module is for


def test_the_charts_library_names_its_version_and_its_licence():
    folder = PAGE / "vendor" / "uplot"
    assert "uPlot (v1.6.32) */" in (folder / "uPlot.iife.min.js").read_text(encoding="utf-8")[:80]
    assert "The MIT License" in (folder / "LICENSE").read_text(encoding="utf-8")


@node
def test_joined_modules_are_javascript(tmp_path):
    (tmp_path / "joined.mjs").write_text(joined("app"))
    command = ["node", "--check", tmp_path / "joined.mjs"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        ({"a": 'import { b } from "./b.js";\n', "b": 'import { a } from "./a.js";\n'}, "circle"),
        ({"a": 'import b from "./b.js";\n'}, "cannot be joined"),
        ({"a": 'import {\n  b,\n} from "./b.js";\n'}, "cannot be joined"),
        ({"a": "export default 1;\n"}, "cannot be joined"),
        ({"a": "export let b = 1;\n"}, "cannot be joined"),
        ({"a": "const b = '</script>';\n"}, "end its script"),
    ],
)
def test_a_module_that_cannot_be_joined_is_found(modules, said, monkeypatch):
    monkeypatch.setattr(single, "read", lambda name: modules[name.removesuffix(".js")])
    with pytest.raises(AssertionError, match=said):
        joined("a")


@node
def test_joining_keeps_what_modules_do(tmp_path, monkeypatch):
    """Names of one module do not meet those of another, and a shared one is made once."""
    modules = {
        "a": 'import { one } from "./b.js";\nimport { count } from "./c.js";\n'
        "const same = 1;\nconsole.log(same, one(), count());\n",
        "b": 'import { count } from "./c.js";\nconst same = 2;\n'
        "export function one() {\n  count();\n  return same;\n}\n",
        "c": "const same = { n: 0 };\nexport const count = () => (same.n += 1);\n"
        "export class Never {}\nexport async function* never() {}\n",
    }
    for name, text in modules.items():
        (tmp_path / f"{name}.js").write_text(text)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    monkeypatch.setattr(single, "read", lambda name: modules[name.removesuffix(".js")])
    (tmp_path / "joined.js").write_text(joined("a"))
    outputs = [
        subprocess.run(["node", tmp_path / name], capture_output=True, text=True, timeout=30).stdout
        for name in ("a.js", "joined.js")
    ]
    assert outputs == ["1 2 2\n"] * 2


# ---- colours ----

# What people with dichromatic vision see of linear RGB: Machado, Oliveira and Fernandes (2009), at
# severity 1.
VISIONS = {
    "normal": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def linear(colour):
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIE L*a*b* of linear sRGB under D65."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(to_xyz) @ np.clip(rgb, 0, 1) / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(one, two):
    """Contrast of WCAG 2.2."""
    low, high = sorted(linear(each) @ [0.2126, 0.7152, 0.0722] for each in (one, two))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_runs_are_told_apart_by_all_eyes(theme):
    """Any two colours of runs are 15 apart in L*a*b* (2 are seen side by side), and stand out."""
    css = single.read("style.css")
    pairs = re.findall(r"--(run-\d|card): light-dark\((#\w{6}), (#\w{6})\)", css)
    colours = {name: both[theme] for name, *both in pairs}
    card = colours.pop("card")
    assert len(colours) == 6
    assert all(contrast(each, card) >= 3 for each in colours.values())  # WCAG 1.4.11
    for vision in VISIONS.values():
        seen = [lab(np.array(vision) @ linear(each)) for each in colours.values()]
        apart = [np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)]
        assert min(apart) > 15
