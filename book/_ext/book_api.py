r"""Sphinx extension: docstrings that read well in ``help()`` and on a page.

``$x_t$`` becomes the role ``:math:`x_t```, and footnotes, which every docstring numbers from 1, get names of their own,
so that many docstrings can stand on one page.
"""

import re

# A literal in double backticks is left alone; so is a doctest, whose lines start with a prompt.
_MATH = re.compile(r"``.*?``|\$([^$\n]+)\$")
_FOOTNOTE = re.compile(r"(?<!\w)\[(\d+)\](?=_)|(?<=^\.\. )\[(\d+)\]")


def process_docstring(app, what, name, obj, options, lines):
    label = name.replace(".", "-").lower()
    for number, line in enumerate(lines):
        if line.lstrip().startswith((">>>", "...")):
            continue
        line = _MATH.sub(lambda match: rf":math:`{match[1]}`" if match[1] else match[0], line)
        lines[number] = _FOOTNOTE.sub(lambda match: f"[#{label}-{match[1] or match[2]}]", line)


def setup(app):
    # After napoleon, whose lines are flush left
    app.connect("autodoc-process-docstring", process_docstring, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
