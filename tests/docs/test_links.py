"""What README and the guides point at: links, files and public names exist."""

import re
from pathlib import Path

import pytest

import lorakit as lk

ROOT = Path(__file__).parents[2]
TOP = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"]
PAGES = [*TOP, *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
# The log tells of files that were, and of names that were tried.
LIVING = [page for page in PAGES if page not in ("docs/dev/LOG.md", "CHANGELOG.md")]
# Paths that a run makes, or that belong to somebody else.
MADE = re.compile(r"^(runs|build|plots)/")
ROOMS = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"runs", "build"}


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def anchors(page):
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", read(page), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


def broken(page, text):
    """The links of `text`, a page's, that lead nowhere."""
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        if path.startswith("reference/"):  # made by docs/generate.py
            continue
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        if not file.exists() or (anchor and anchor not in anchors(file.relative_to(ROOT))):
            lost.append(target)
    return lost


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    assert not broken(page, read(page))


def test_a_planted_link_is_found():
    planted = "[a](nothing.md) [b](docs/data.md#nothing) [c](docs/data.md) [d](https://x.y)"
    assert broken("README.md", planted) == ["nothing.md", "docs/data.md#nothing"]


@pytest.mark.parametrize("page", LIVING)
def test_files_that_a_page_names_exist(page):
    for path in re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|cpp|h|md|csv))`", read(page)):
        if path.split("/")[0] in ROOMS and not MADE.match(path):
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", LIVING)
def test_public_names_on_a_page_exist(page):
    for name in set(re.findall(r"\blk\.(\w+)", read(page))):
        assert name in lk.__all__, name
    for module, name in re.findall(r"\blk\.(kernels|memory|metrics|optim)\.(\w+)", read(page)):
        assert hasattr(getattr(lk, module), name), f"{module}.{name}"


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES:
        if page.startswith("docs/"):
            assert page.removeprefix("docs/") in navigation, page
