"""Sphinx extension: pages that ask nothing of the network.

MathJax comes from the installed package ``sphinx-mathjax-offline``, of which one file is enough. sphinx-thebe, which
Jupyter Book always loads, is taken off the pages: it names a CDN, and declares its constants twice, which the browser
reports as an error.
"""

import importlib.util
import shutil
from pathlib import Path


def copy_mathjax(app):
    if app.builder.format != "html":
        return
    name = app.config.mathjax_path
    # The package's name is no identifier, so that it cannot be imported the usual way.
    package = importlib.util.find_spec("sphinx-mathjax-offline")
    if package is None:
        raise ImportError("the book's formulas need the package sphinx-mathjax-offline, which is not installed")
    target = Path(app.outdir) / "_static" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(package.origin).parent / "static" / name, target)


def drop_thebe(app, pagename, templatename, context, doctree):
    def wanted(asset):
        text = f"{getattr(asset, 'filename', asset)} {getattr(asset, 'attributes', '')}"
        return "thebe" not in text.lower()

    for key in ("script_files", "css_files"):
        context[key] = [asset for asset in context.get(key, []) if wanted(asset)]


def setup(app):
    app.connect("builder-inited", copy_mathjax)
    # After sphinx-thebe, which adds its scripts in the same event
    app.connect("html-page-context", drop_thebe, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
