"""Make the pages of the reference: the command line from its parsers, Python from the docstrings.

mkdocs runs this file while it builds the site (see mkdocs.yml).
"""

import argparse
import inspect
import types
from collections.abc import Iterator

import mkdocs_gen_files

import lorakit as lk
from lorakit.cli.main import build_parser

ROOMS = {
    "training": "Training",
    "models": "Models",
    "adapters": "Adapters",
    "data": "Data",
    "inference": "Generation",
    "serving": "Serving",
    "evaluation": "Evaluation",
    "comparison": "Comparisons",
    "board": "The board",
    "export": "Export",
    "files": "The Hub",
    "config": "Settings and errors",
}


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield the parser, and those of its verbs and of their verbs."""
    yield parser
    for action in parser._subparsers._group_actions if parser._subparsers else []:
        for verb in action.choices.values():
            yield from parsers(verb)


def command_line() -> str:
    """Return the page of the command line: the help of every verb."""
    parts = [
        "# The command line\n",
        "This is what `lorakit --help` and the help of its verbs print.\n",
    ]
    for parser in parsers(build_parser()):
        parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=100)
        parts.append(f"## `{parser.prog}`\n\n```text\n{parser.format_help()}```\n")
    return "\n".join(parts)


def entry(name: str, thing: object, level: int = 3) -> str:
    """Return what mkdocstrings turns into the text of one public name."""
    module = thing.__module__
    return (
        f"::: {module}.{thing.__qualname__}\n    options:\n"
        f"      heading: {name}\n      toc_label: {name}\n      heading_level: {level}\n"
    )


def python() -> str:
    """Return the page of the public names of `lorakit`, room by room."""
    named = {name: getattr(lk, name) for name in lk.__all__}
    modules = {name: thing for name, thing in named.items() if isinstance(thing, types.ModuleType)}
    parts = ["# Python\n", "The public names of `import lorakit as lk`; others may change.\n"]
    for room, title in ROOMS.items():
        parts.append(f"## {title}\n")
        for name, thing in named.items():
            if name not in modules and thing.__module__.split(".")[1] == room:
                parts.append(entry(f"lk.{name}", thing))
    for name, module in modules.items():
        if name != "kernels":
            parts.append(f"## `lk.{name}`\n\n{inspect.getdoc(module).partition(chr(10))[0]}\n")
            parts += [entry(f"lk.{name}.{each}", getattr(module, each)) for each in module.__all__]
    return "\n".join(parts)


def kernels() -> str:
    """Return the page of the public names of `lorakit.kernels`."""
    parts = [
        "# Kernels\n",
        "The names of `lk.kernels`; [kernels](../kernels.md) says how they work.\n",
    ]
    for name in lk.kernels.__all__:
        thing = getattr(lk.kernels, name)
        if isinstance(thing, types.UnionType):
            either = " | ".join(each.__name__ for each in thing.__args__)
            parts.append(f"## lk.kernels.{name}\n\nThe type `{either}`.\n")
        else:
            parts.append(entry(f"lk.kernels.{name}", thing, 2))
    return "\n".join(parts)


for page, text in (("command-line", command_line()), ("python", python()), ("kernels", kernels())):
    with mkdocs_gen_files.open(f"reference/{page}.md", "w") as file:
        file.write(text)
