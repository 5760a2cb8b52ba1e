"""A hook of mkdocs that turns a link out of docs/, such as ../kernels/simd.h, into the file's name.

On the repository's own pages such a link opens the file. The site does not hold the sources, so it
shows the path instead.
"""

import re

LINK = re.compile(r"\[[^\]]*\]\(((?:\.\./)+)([^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Replace the links that leave docs/ by the path they point at."""
    depth = page.file.src_uri.count("/") + 1

    def shown(link: re.Match[str]) -> str:
        return f"`{link[2]}`" if link[1].count("../") == depth else link[0]

    return LINK.sub(shown, markdown)
