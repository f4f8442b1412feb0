r"""Sphinx extension: docstrings that read well in ``help()`` and on a page.

``$x_t$`` becomes the role ``:math:`x_t```. Footnotes, which every docstring numbers from 1, become a plain list, so
that many docstrings can stand on one page.
"""

import re

# What stands in double backticks is left alone; so is a doctest, whose lines start with a prompt.
_MATH = re.compile(r"``.*?``|\$([^$\n]+)\$")


def process_docstring(app, what, name, obj, options, lines):
    for number, line in enumerate(lines):
        if line.lstrip().startswith((">>>", "...")):
            continue
        line = _MATH.sub(lambda match: rf":math:`{match[1]}`" if match[1] else match[0], line)
        line = re.sub(r"^(\s*)\.\. \[(\d+)\] ", r"\1\2. ", line)
        lines[number] = re.sub(r"(?<!\w)(\[\d+\])_(?!\w)", r"\1", line)


def setup(app):
    # After napoleon, whose lines are flush left
    app.connect("autodoc-process-docstring", process_docstring, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
