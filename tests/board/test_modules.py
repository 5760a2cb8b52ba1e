"""What the page computes by itself, held to numpy and to Python: in node, without a browser."""

import difflib
import json
import shutil
import subprocess

import numpy as np
import pytest

from lorakit.board.single import joined

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="needs node")


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """node(modules, code, **values) -> what the body of a function returns, with the modules."""
    folder = tmp_path_factory.mktemp("modules")

    def run(module, code, **values):
        program = f"const arg = {json.dumps(values)};\n{joined(module)}\n"
        program += f"const m = ${module};\nconsole.log(JSON.stringify((() => {{{code}}})()));"
        (folder / "run.mjs").write_text(program)
        command = ["node", folder / "run.mjs"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_smoothing_is_the_average_without_a_bias(node):
    """The weighted mean of all values so far, with weights that fall by w a step."""
    values = np.sin(np.arange(30)) + 2
    found = node("charts", "return m.smoothed(arg.values, arg.w);", values=values.tolist(), w=0.9)
    for i in range(30):
        weights = 0.9 ** np.arange(i, -1, -1)
        assert found[i] == pytest.approx(np.average(values[: i + 1], weights=weights), rel=1e-12)
    assert node("charts", "return m.smoothed([3, null, 5], 0.5);") == [
        3,
        None,
        pytest.approx(13 / 3),
    ]


def test_the_nearest_place(node):
    x = [1, 2, 4, 8, 16, 32.5]
    wanted = np.linspace(-3, 40, 200).tolist()
    found = node("charts", "return arg.at.map((at) => m.nearest(arg.x, at));", x=x, at=wanted)
    distances = np.abs(np.subtract.outer(wanted, x))
    assert np.array_equal(distances[range(200), found], distances.min(1))


def test_another_axis_is_interpolated(node):
    steps, axis, tokens = [1, 2, 3, 5, 9], [1, 3, 5, 9], [10, 100, 1000, 5000]
    found = node(
        "curves",
        "return m.onAxis(arg.steps, arg.axis);",
        steps=steps,
        axis={"step": axis, "value": tokens},
    )
    assert found == pytest.approx(np.interp(steps, axis, tokens).tolist())


def test_charts_come_in_order(node):
    curves = [
        {"loss": 0, "eval_loss": 0, "step": 0},
        {"grad_norm": 0, "tokens": 0, "eval_accuracy": 0},
    ]
    found = node("curves", "return m.chartNames(arg.curves);", curves=curves)
    assert found == ["loss", "grad_norm", "eval_accuracy"]
    assert node("curves", "return m.chartNames([{eval_loss: 0}]);") == ["eval_loss"]


@pytest.mark.parametrize("down", [False, True])
def test_sorting_puts_what_has_no_value_last(node, down):
    runs = [{"loss": v, "name": f"run{i}"} for i, v in enumerate([3, None, -1.5, 20])]
    order = {"key": "loss", "down": down}
    found = node("runs", "return m.sorted(arg.runs, arg.order);", runs=runs, order=order)
    values = sorted([3, -1.5, 20], reverse=down)
    assert [run["loss"] for run in found] == [*values, None]
    code = "return m.sorted(arg.runs, {key: 'name', down: false}).map((r) => r.name);"
    names = [{"name": name} for name in ("run10", "run9", "Run1")]
    assert node("runs", code, runs=names) == ["Run1", "run9", "run10"]


def test_places_of_colours_stay(node):
    code = """
    const slots = new Map();
    const after = [];
    for (const ids of arg.turns) {
      m.place(slots, new Set(ids));
      after.push(Object.fromEntries(slots));
    }
    return after;"""
    after = node("palette", code, turns=[["a", "b", "c"], ["a", "c"], ["a", "c", "d", "e"]])
    assert after == [{"a": 0, "b": 1, "c": 2}, {"a": 0, "c": 2}, {"a": 0, "c": 2, "d": 1, "e": 3}]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("the cat sat", "the dog sat down"),
        ("", "new words"),
        ("gone", ""),
        ("a b c d e f", "a x c y e z"),
        ("Größe 10 %", "Größe 12 %"),
    ],
)
def test_a_difference_turns_one_text_into_the_other(node, before, after):
    """It keeps as much as a longest common subsequence, which difflib finds in texts so short."""
    parts = node("words", "return m.difference(arg.before, arg.after);", before=before, after=after)
    assert "".join(text for kind, text in parts if kind != "new") == before
    assert "".join(text for kind, text in parts if kind != "gone") == after
    matcher = difflib.SequenceMatcher(None, before.split(), after.split(), autojunk=False)
    kept = sum(len("".join(text.split())) for kind, text in parts if kind == "same")
    words = [before.split()[b.a : b.a + b.size] for b in matcher.get_matching_blocks()]
    assert kept >= sum(len(word) for block in words for word in block)


def test_settings_say_what_differs(node):
    settings = [
        {"lora.r": 8, "seed": 0, "betas": [0.9, 0.99]},
        {"lora.r": 16, "betas": [0.9, 0.99]},
    ]
    found = node("settings", "return m.compared(arg.settings);", settings=settings)
    assert found == [
        ["betas", ["[0.9,0.99]", "[0.9,0.99]"], False],
        ["lora.r", ["8", "16"], True],
        ["seed", ["0", "not set"], True],
    ]


def test_a_forecast_has_its_parts(node):
    kinds = {f"kind {i}": 10 * i for i in range(10)}
    found = node("memory", "return m.parts({plan: {at_peak: arg.kinds}});", kinds=kinds)
    assert found[:2] == [["kind 9", 90], ["kind 8", 80]]
    assert found[-1][0] == "other"
    assert sum(size for _, size in found) == sum(kinds.values())


def test_what_is_within_noise_is_said(node):
    pair = {
        "first": {"model": "a", "settings": None},
        "second": {"model": "b", "settings": "r8"},
        "metric": "macro_f1",
        "difference": {"value": -0.05, "low": -0.1, "high": 0.02},
        "p_value": 0.2,
        "within_noise": True,
    }
    told = node(
        "comparisons",
        "return arg.pairs.map(m.verdict);",
        pairs=[pair, {**pair, "within_noise": False}],
    )
    interval = "(-0.100 to 0.020, p = 0.200)"
    assert told == [
        f"a and b, r8: the difference of 0.050 in macro F1 is within noise {interval}.",
        f"b, r8 is 0.050 in macro F1 below a {interval}.",
    ]


def test_tokens_show_what_is_not_seen(node):
    text = "a b\n\tc\x00\u200b"
    assert node("rows", "return m.visible(arg.text);", text=text) == "a·b↵→c\\x0\\x200b"
