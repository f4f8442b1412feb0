"""Sphinx extension: a dark variant of every figure that a chapter draws.

Beside each SVG image that a cell put out, a second one in the dark colours of ``figures.dark`` is added, with the same
alternative text; the theme shows the one or the other by their classes ``only-light`` and ``only-dark``.
"""

import sys
from pathlib import Path

from docutils import nodes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from figures import dark


def add_dark_variants(app, doctree):
    for image in list(doctree.findall(nodes.image)):
        _, path = app.env.relfn2path(image["uri"], app.env.docname)
        path = Path(path)
        if path.suffix != ".svg" or "jupyter_execute" not in path.parts:
            continue
        variant = path.with_name(f"{path.stem}-dark.svg")
        variant.write_text(dark(path.read_text(encoding="utf-8")), encoding="utf-8")
        light, other = image.deepcopy(), image.deepcopy()
        light["classes"] = [*image["classes"], "only-light"]
        other["classes"] = [*image["classes"], "only-dark"]
        other["uri"] = image["uri"].removesuffix(path.name) + variant.name
        # Within one container, since the theme hides a caption that stands beside an image of the other theme.
        image.replace_self(nodes.container("", light, other, classes=["figure-variants"]))


def setup(app):
    # Before Sphinx collects the images of the page, in the same event
    app.connect("doctree-read", add_dark_variants, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
