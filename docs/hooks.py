"""What mkdocs does not do by itself: links to files outside docs/, and formulas without scripts."""

import posixpath
import re

from latex2mathml.converter import convert

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:]+)\)")


def on_config(config):
    """Renders ```math blocks, LaTeX as GitHub shows it, as MathML, which browsers know."""
    fence = {"name": "math", "class": "math", "format": _mathml}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}
    return config


def on_page_markdown(markdown, page, **_):
    """Takes links that leave docs/ for their text: they work in the repository, not on the site."""
    folder = posixpath.dirname(page.file.src_uri)

    def text(link):
        target = posixpath.normpath(posixpath.join(folder, link[2]))
        return link[1] if target.startswith("..") else link[0]

    return _LINK.sub(text, markdown)


def _mathml(source, *_, **__):
    return convert(source, display="block")
