"""The book's one figure style, its slider, and the chapter's clock.

A chapter calls :func:`start` first and :func:`finish` last, draws plain matplotlib figures between them, and takes the
look of every method from :func:`style`. Figures come out as SVG on a light page; :func:`dark` derives the dark variant
from the same drawing, so that no figure is drawn twice.

Colours of the style (and black) change between light and dark; a white or any other colour that a cell chooses itself
stays, except that strokes too dark for the dark page are lightened. The layout is constrained: a figure needs no
``tight_layout()``. Call ``ax.grid(False)`` on heat maps.
"""

from __future__ import annotations

import colorsys
import hashlib
import html
import io
import random
import re
import time

# name: (on the light page, on the dark page). Every pair keeps a contrast of 3 or more against its page and stays
# apart from the others under simulated colour blindness (tests/test_figures.py measures both).
COLOURS = {
    "paper": ("#fefefe", "#121212"),
    "ink": ("#1f2328", "#e3e6ea"),
    "grid": ("#dcdfe3", "#3a3d42"),
    "grey": ("#696e74", "#868e96"),
    "blue": ("#0072b2", "#4ba3e6"),
    "vermilion": ("#d55e00", "#f2703a"),
    "green": ("#12a06c", "#3fdc9b"),
    "violet": ("#5a2ea6", "#9a70f0"),
    "brown": ("#6e3f00", "#f5d04c"),
    "pink": ("#e0559a", "#f3a0c8"),
}
SERIES = ("blue", "vermilion", "green", "violet", "brown", "pink")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")

# One look per method through the whole book. Methods that never meet in one figure share a colour.
_METHODS = {
    # cells and models
    "RNN": ("blue", 0),
    "LSTM": ("vermilion", 1),
    "GRU": ("green", 2),
    "Transformer": ("violet", 3),
    "minGRU": ("brown", 4),
    "minLSTM": ("pink", 5),
    "LSTM with attention": ("brown", 4),
    "Transformer with notes": ("pink", 5),
    # baselines
    "n-gram": ("grey", 1),
    "persistence": ("grey", 3),
    "seasonal naive": ("brown", 2),
    "linear": ("pink", 4),
    "bag of words": ("grey", 1),
    "logistic regression": ("grey", 3),
    "chance": ("grey", 3),
    # activations
    "tanh": ("blue", 0),
    "relu": ("vermilion", 1),
    "sigmoid": ("green", 2),
    "identity": ("violet", 3),
    # implementations of one equation
    "rnnkernels": ("blue", 0),
    "torch.nn": ("vermilion", 1),
    "reference": ("grey", 3),
    "triton": ("green", 2),
    "checkpointing": ("green", 2),
    # ways to get a gradient
    "BPTT": ("blue", 0),
    "autograd": ("vermilion", 1),
    "RTRL": ("green", 2),
    "truncated": ("violet", 3),
    "shortened": ("brown", 4),
    "numerical": ("grey", 3),
    # clipping
    "no clipping": ("grey", 1),
    "clip by norm": ("blue", 0),
    "clip by value": ("vermilion", 1),
    "adaptive clipping": ("green", 2),
    "weight clipping": ("violet", 3),
    # optimizers
    "SGD": ("grey", 1),
    "momentum": ("blue", 0),
    "Nesterov": ("vermilion", 1),
    "AdaGrad": ("green", 2),
    "RMSprop": ("violet", 3),
    "Adam": ("brown", 4),
    "AdamW": ("pink", 5),
    # what is shown
    "data": ("ink", 0),
    "train": ("blue", 0),
    "validation": ("vermilion", 1),
    "test": ("green", 2),
}

_started = None


def start(seed=0):
    """Set the figure style and every seed, start the chapter's clock, and return the device to use.

    Parameters
    ----------
    seed : int
        Seed of ``random``, NumPy and torch.

    Returns
    -------
    torch.device
        ``cuda`` where there is a GPU, else ``cpu``.
    """
    global _started
    import matplotlib
    import numpy
    import torch
    from cycler import cycler

    _started = time.perf_counter()
    random.seed(seed)
    numpy.random.seed(seed)  # noqa: NPY002  # statsmodels and scikit-learn draw from it
    torch.manual_seed(seed)

    light = {name: pair[0] for name, pair in COLOURS.items()}
    matplotlib.rcParams.update(matplotlib.rcParamsDefault | {"backend": matplotlib.rcParams["backend"]})
    matplotlib.rcParams.update(
        {
            "figure.figsize": (6.4, 3.8),
            "figure.constrained_layout.use": True,
            "figure.facecolor": light["paper"],
            "savefig.facecolor": light["paper"],
            "font.size": 11,
            "axes.titlesize": 11,
            "axes.facecolor": light["paper"],
            "axes.edgecolor": light["grey"],
            "axes.labelcolor": light["ink"],
            "axes.titlecolor": light["ink"],
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": light["grid"],
            "grid.linewidth": 0.6,
            "text.color": light["ink"],
            "xtick.color": light["grey"],
            "ytick.color": light["grey"],
            "xtick.labelcolor": light["ink"],
            "ytick.labelcolor": light["ink"],
            "hatch.color": light["ink"],
            "lines.linewidth": 1.8,
            "lines.markersize": 4.5,
            "legend.frameon": False,
            "legend.handlelength": 3,
            "image.cmap": "viridis",
            # markevery spreads a dozen markers over a line of any length
            "axes.prop_cycle": cycler(color=[light[name] for name in SERIES])
            + cycler(linestyle=LINES)
            + cycler(markevery=[0.09] * len(SERIES)),
            # the same drawing gives the same bytes, build after build
            "svg.hashsalt": "rnnkernels",
        }
    )
    try:
        from IPython import get_ipython
        from matplotlib_inline.backend_inline import set_matplotlib_formats
    except ImportError:
        get_ipython = None
    if get_ipython is not None and get_ipython() is not None:
        set_matplotlib_formats("svg", metadata={"Date": None})
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def style(method):
    """Give the colour, line style and marker that a method has through the whole book.

    Parameters
    ----------
    method : str or int
        A name such as ``"RNN"``, ``"n-gram"`` or ``"tanh"``; or a number, for series that are no method (layers, sizes,
        seeds).

    Returns
    -------
    dict
        ``color``, ``linestyle`` and ``marker``, as ``ax.plot(x, y, **style("RNN"))`` takes them. For a bar or a filled
        area take ``style("RNN")["color"]``; drop the marker with ``style("RNN") | {"marker": ""}``.

    Raises
    ------
    ValueError
        For a name that the book has no look for.

    Examples
    --------
    >>> style("RNN")
    {'color': '#0072b2', 'linestyle': '-', 'marker': 'o'}
    """
    if isinstance(method, int):
        colour, line = SERIES[method % len(SERIES)], method % len(LINES)
    elif method in _METHODS:
        colour, line = _METHODS[method]
    else:
        raise ValueError(f"method must be a number or one of {', '.join(map(repr, _METHODS))}; got {method!r}")
    return {"color": COLOURS[colour][0], "linestyle": LINES[line], "marker": MARKERS[line]}


def band(ax, x, runs, label, look):
    """Draw the median over seeds in a band from the smallest to the largest.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
        Where to draw.
    x : sequence
        What the curves are drawn against.
    runs : torch.Tensor or nested sequence, shape (seeds, len(x))
        One curve per seed.
    label : str
        Name of the curve in a legend.
    look : dict
        As from :func:`style`.
    """
    import torch

    runs = torch.as_tensor(runs).double()
    ax.plot(x, runs.quantile(0.5, dim=0), label=label, **look)
    ax.fill_between(x, *runs.aminmax(dim=0), color=look["color"], alpha=0.15, lw=0)


def slider(figs, labels, title, alt):
    """Put precomputed figures behind a slider that works without a server, in the book and in Jupyter.

    Parameters
    ----------
    figs : list of matplotlib.figure.Figure
        One figure per position, all of one size. They are closed, so that they do not also appear on their own.
    labels : list of str
        What each position is called: ``"k = 8"``.
    title : str
        What the slider chooses: ``"lag"``.
    alt : list of str
        A description of each figure for a reader who cannot see it.

    Returns
    -------
    IPython.display.HTML
        The first figure shown, the others hidden until the slider moves. Nothing is loaded from anywhere.
    """
    import matplotlib.pyplot as plt
    from IPython.display import HTML

    if not figs or not len(figs) == len(labels) == len(alt) or isinstance(alt, str):
        raise ValueError(
            "figs, labels and alt must be lists of one length, not empty; "
            f"got {len(figs)} figures, {len(labels)} labels and {len(alt)} texts in alt"
        )
    states, variables = [], {}
    for position, (fig, description) in enumerate(zip(figs, alt, strict=True)):
        stream = io.StringIO()
        fig.savefig(stream, format="svg", metadata={"Date": None})
        plt.close(fig)
        drawing = _inline(stream.getvalue(), description, variables)
        states.append(f'<div class="state"{" hidden" if position else ""}>{drawing}</div>')
    dark_values = "".join(f"{name}:{value};" for name, value in sorted(variables.items()))
    listed = html.escape("|".join(label.replace("|", "/") for label in labels))
    first, name = html.escape(labels[0]), html.escape(title)
    move = (
        "const f=this.closest('.figure-slider'),l=this.dataset.labels.split('|')[this.value];"
        "f.querySelectorAll('.state').forEach((s,i)=>{s.hidden=i!=this.value});"
        "f.querySelector('output').value=l;this.setAttribute('aria-valuetext',l)"
    )
    return HTML(
        f'<div class="figure-slider" role="group" aria-label="{name}">'
        f"<style>html[data-theme=dark] .figure-slider,body[data-jp-theme-light=false] .figure-slider{{{dark_values}}}"
        ".figure-slider svg{width:100%;height:auto;display:block}.figure-slider .state[hidden]{display:none}"
        ".figure-slider label{display:flex;flex-wrap:wrap;gap:.3em .8em;align-items:center}"
        ".figure-slider input{flex:1 1 12em;min-width:0;max-width:24em}</style>"
        f'{"".join(states)}<label>{name} <input type="range" min="0" max="{len(figs) - 1}" step="1" value="0" '
        f'autocomplete="off" data-labels="{listed}" aria-valuetext="{first}" oninput="{html.escape(move)}" '
        # JupyterLab takes the arrow keys for itself unless they stop here
        'onkeydown="event.stopPropagation()">'
        f"<output>{first}</output></label></div>"
    )


def finish():
    """Glue what the top of the page tells: ``run-time`` (whole seconds since :func:`start`) and ``device``."""
    import torch
    from myst_nb import glue

    if _started is None:
        raise RuntimeError("figures.finish() needs figures.start() in the chapter's first cell")
    if torch.cuda.is_available():
        device = f"one {torch.cuda.get_device_name()}"
    else:
        threads = torch.get_num_threads()
        device = f"a CPU with {threads} thread{'s' if threads > 1 else ''}"
    glue("run-time", round(time.perf_counter() - _started), display=False)
    glue("device", device, display=False)


def dark(svg):
    """Turn a light SVG drawing of matplotlib into its dark variant.

    Parameters
    ----------
    svg : str
        The drawing, in the style that :func:`start` sets.

    Returns
    -------
    str
        The same drawing with the style's colours exchanged for their dark partners.
    """
    svg = _COLOUR.sub(lambda match: f"{match[1]}: {_dark_colour(match[1], match[2])}", svg)
    # matplotlib leaves black fills unsaid, so the root has to say what unsaid means
    return svg.replace("<svg ", f'<svg fill="{COLOURS["ink"][1]}" ', 1)


_COLOUR = re.compile(r"\b(fill|stroke): ?(#[0-9a-f]{6})\b")
_DARK = dict(COLOURS.values()) | {"#000000": COLOURS["ink"][1]}


def _dark_colour(where, colour):
    """Return the dark page's colour for a light one, used to fill or to stroke."""
    if colour in _DARK:
        return _DARK[colour]
    if where == "fill":
        return colour
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    while contrast(colour, COLOURS["paper"][1]) < 3:
        lightness += 0.02
        channels = colorsys.hls_to_rgb(hue, lightness, saturation)
        colour = "#" + "".join(f"{round(255 * channel):02x}" for channel in channels)
    return colour


def contrast(one, other):
    """Return the contrast ratio of two ``#rrggbb`` colours, from 1 to 21 (WCAG 2.2, "contrast ratio")."""
    luminance = []
    for colour in (one, other):
        channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        luminance.append(0.2126 * red + 0.7152 * green + 0.0722 * blue)
    return (max(luminance) + 0.05) / (min(luminance) + 0.05)


def _inline(svg, description, variables):
    """Make a drawing fit to stand inside a page: unique ids, colours as CSS variables, a description."""
    width, height = re.search(r'<svg [^>]*?viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups()
    body = svg[svg.index(">", svg.index("<svg ")) + 1 : svg.rindex("</svg>")]
    body = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", body, flags=re.S)
    unique = "f" + hashlib.sha256((body + description).encode()).hexdigest()[:10]
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{unique}{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{unique}", body)

    def variable(match):
        where, colour = match[1], match[2]
        replacement = _dark_colour(where, colour)
        if replacement == colour:
            return match[0]
        name = f"--{where}-{colour[1:]}"
        variables[name] = replacement
        return f"{where}:var({name},{colour})"

    variables["--fill-000000"] = COLOURS["ink"][1]
    body = _COLOUR.sub(variable, body)
    body = re.sub(r">\s+<", "><", body)
    # matplotlib's unit is the point, 4/3 of a CSS pixel
    size = f"max-width:{float(width) * 4 / 3:.0f}px;fill:var(--fill-000000,#000)"
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(description)}" style="{size}" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink">{body.strip()}</svg>'
    )
