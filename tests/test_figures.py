"""The book's figure module: its palette, its dark variants, its slider and its clock."""

import itertools
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

matplotlib = pytest.importorskip("matplotlib")
np = pytest.importorskip("numpy")
matplotlib.use("agg")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "book"))
import figures  # noqa: E402

plt = pytest.importorskip("matplotlib.pyplot")

PAGES = {"light": 0, "dark": 1}
# Machado, Oliveira and Fernandes, "A physiologically-based model for simulation of color vision deficiency", IEEE TVCG
# 15 (2009), 1291-1298: the matrices of severity 1, on linear RGB.
VISION = {
    "full": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
# CIE 1931 XYZ of linear sRGB, white D65 (IEC 61966-2-1)
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


@pytest.fixture(autouse=True)
def fresh():
    figures.start(seed=0)
    yield
    plt.close("all")
    matplotlib.rcdefaults()


def drawing(**kwargs):
    fig, ax = plt.subplots(**kwargs)
    x = np.linspace(0, 3, 50)
    for method in ("RNN", "LSTM", "n-gram", "data"):
        ax.plot(x, np.sin(x + len(method)), label=method, **figures.style(method))
    ax.axhline(0, color="black")
    ax.legend()
    return fig


def svg_of(fig, tmp_path, name="figure.svg"):
    fig.savefig(tmp_path / name, metadata={"Date": None})
    return (tmp_path / name).read_text(encoding="utf-8")


def linear(colour):
    c = np.array(matplotlib.colors.to_rgb(colour))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIE L*a*b* of linear RGB."""
    ratio = np.clip(XYZ @ rgb / XYZ.sum(1), 0, None)
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("page", PAGES)
def test_every_colour_stands_out_from_its_page(page):
    colours = {name: pair[PAGES[page]] for name, pair in figures.COLOURS.items()}
    for name in {*colours} - {"paper", "grid"}:
        assert figures.contrast(colours[name], colours["paper"]) >= 3, name
    assert figures.contrast(colours["ink"], colours["paper"]) >= 7


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("vision", VISION)
def test_colours_stay_apart_under_colour_blindness(page, vision):
    names = [*figures.SERIES, "grey", "ink"]
    seen = {n: lab(np.clip(VISION[vision] @ linear(figures.COLOURS[n][PAGES[page]]), 0, 1)) for n in names}
    for one, other in itertools.combinations(names, 2):
        assert np.linalg.norm(seen[one] - seen[other]) >= 12, (one, other)


def test_contrast_of_published_pairs():
    assert figures.contrast("#000000", "#ffffff") == pytest.approx(21)
    assert figures.contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.005)


def test_methods_of_one_figure_differ_in_colour_and_line():
    groups = [
        ["RNN", "LSTM", "GRU", "Transformer", "minGRU", "minLSTM"],
        ["LSTM", "LSTM with attention", "Transformer", "chance"],
        ["LSTM", "Transformer", "Transformer with notes", "chance"],
        ["tanh", "relu", "sigmoid", "identity"],
        ["rnnkernels", "torch.nn", "reference", "triton"],
        ["RNN", "n-gram", "chance"],
        ["data", "RNN", "persistence", "seasonal naive"],
        ["train", "validation", "test"],
        list(range(6)),
    ]
    for group in groups:
        looks = [figures.style(method) for method in group]
        assert len({look["color"] for look in looks}) >= len(group) - ("chance" in group)
        assert len({(look["color"], str(look["linestyle"])) for look in looks}) == len(group)


def test_an_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'RNN', .*got 'Elman'"):
        figures.style("Elman")


def test_start_seeds_everything_and_returns_the_device():
    import random

    import torch

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    device = figures.start(seed=7)
    first = draw()
    figures.start(seed=7)
    assert draw() == first
    figures.start(seed=8)
    assert draw() != first
    assert device == torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_plain_plots_vary_the_line_and_spread_their_markers():
    fig, ax = plt.subplots()
    lines = [ax.plot(range(500))[0] for _ in range(6)]
    assert len({str(line.get_linestyle()) + str(line.get_color()) for line in lines}) == 6
    (line,) = ax.plot(range(500), **figures.style("LSTM"))
    assert line.get_markevery() < 1
    ax.bar([1, 2], [3, 4], color=figures.style("RNN")["color"])
    ax.errorbar([1, 2], [3, 4], yerr=1, **figures.style("GRU"))
    ax.scatter([1, 2], [3, 4], **figures.style("GRU"))
    ax.set_yscale("log")
    fig.canvas.draw()


def test_the_same_drawing_gives_the_same_bytes(tmp_path):
    assert svg_of(drawing(), tmp_path) == svg_of(drawing(), tmp_path)


def test_dark_exchanges_the_styles_colours_and_nothing_else(tmp_path):
    light = svg_of(drawing(), tmp_path)
    dark = figures.dark(light)
    ElementTree.fromstring(dark)
    for name, (on_light, on_dark) in figures.COLOURS.items():
        assert light.count(on_light) == dark.count(on_dark) - (name == "ink") - light.count("#000000") * (name == "ink")
        assert on_light not in dark
    assert "#000000" not in dark
    without_colours = [re.sub(r"#[0-9a-f]{6}", "", text) for text in (light, dark)]
    assert without_colours[0] == without_colours[1].replace('<svg fill="" ', "<svg ", 1)


def test_dark_keeps_white_and_pixels_and_lightens_dark_lines(tmp_path):
    fig, ax = plt.subplots()
    ax.imshow(np.arange(16).reshape(4, 4))
    ax.text(1, 1, "on a dark cell", color="white")
    ax.plot([0, 3], color="#440154")
    light = svg_of(fig, tmp_path)
    dark = figures.dark(light)
    assert light.count("#ffffff") == dark.count("#ffffff") > 0
    assert re.findall(r"data:image[^\"]+", light) == re.findall(r"data:image[^\"]+", dark)
    (stroke,) = (
        set(re.findall(r"stroke: (#\w+)", dark))
        - set(re.findall(r"stroke: (#\w+)", light))
        - {pair[1] for pair in figures.COLOURS.values()}
    )
    assert figures.contrast(stroke, figures.COLOURS["paper"][1]) >= 3


class Outline(HTMLParser):
    """Collect a fragment's tags with their attributes, and check that it closes what it opens."""

    VOID = frozenset({"input", "br", "img"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag, attribute):
        return [attrs[attribute] for name, attrs in self.tags if name == tag and attribute in attrs]


def states(count=3):
    return [drawing(figsize=(4, 2 + position / 10)) for position in range(count)]


def test_slider_has_one_described_state_per_figure():
    labels, alt = ["a < b", 'the "second"', "c | d"], ["first & only", 'the "second" <one>', "third"]
    html = figures.slider(states(), labels, "size", alt).data
    page = Outline(html)
    shown = [attrs for tag, attrs in page.tags if tag == "div" and attrs.get("class") == "state"]
    assert ["hidden" in attrs for attrs in shown] == [False, True, True]
    assert page.all("svg", "aria-label") == alt
    (handle,) = [attrs for tag, attrs in page.tags if tag == "input"]
    assert (handle["type"], handle["min"], handle["max"], handle["value"]) == ("range", "0", "2", "0")
    assert handle["data-labels"].split("|") == ["a < b", 'the "second"', "c / d"]
    assert handle["aria-valuetext"] == "a < b"
    assert plt.get_fignums() == []


def test_slider_loads_nothing():
    html = figures.slider(states(), list("abc"), "size", list("abc")).data
    addresses = set(re.findall(r"https?://[^\"' )]+", html))
    assert addresses <= {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}
    assert "<script" not in html
    assert re.findall(r"(?:src|href)=\"(?!#|data:)", html) == []


def test_two_sliders_share_no_id():
    pages = [Outline(figures.slider(states(), list("abc"), title, list("abc")).data) for title in ("one", "two")]
    ids = [[attrs["id"] for _, attrs in page.tags if "id" in attrs] for page in pages]
    assert all(len(found) == len(set(found)) > 0 for found in ids)
    # The same figure twice has the same ids and the same content: whichever is found is right.
    other = Outline(figures.slider(states(), list("abc"), "three", list("xyz")).data)
    assert not set(ids[0]) & {attrs["id"] for _, attrs in other.tags if "id" in attrs}
    for page, found in zip(pages, ids, strict=True):
        used = [v for _, attrs in page.tags for v in attrs.values() if v and re.match(r"(url\()?#f", v)]
        assert {re.sub(r"url\(|[#)]", "", v) for v in used} == set(found)


def test_band_goes_from_the_smallest_to_the_largest_around_the_median():
    figures.start()
    fig, ax = plt.subplots()
    figures.band(ax, [1, 2], [[0, 5], [1, 9], [4, 7], [3, 6]], "LSTM", figures.style("LSTM"))
    (line,), (area,) = ax.lines, ax.collections
    assert line.get_ydata().tolist() == [2, 6.5]
    assert line.get_label() == "LSTM"
    corners = area.get_paths()[0].vertices
    assert [set(corners[corners[:, 0] == x, 1]) for x in (1, 2)] == [{0, 4}, {5, 9}]
    plt.close(fig)


def test_slider_has_a_dark_value_for_every_colour_of_the_style():
    html = figures.slider(states(1), ["a"], "size", ["a"]).data
    used = set(re.findall(r"var\((--[\w-]+),", html))
    values = dict(re.findall(r"(--[\w-]+):(#\w+);", html))
    assert used <= set(values)
    assert values["--fill-" + figures.COLOURS["paper"][0][1:]] == figures.COLOURS["paper"][1]
    assert values["--stroke-" + figures.style("RNN")["color"][1:]] == figures.COLOURS["blue"][1]
    assert re.findall(r"(?:fill|stroke): ?#(?!ffffff)", html) == []


def test_slider_is_the_same_each_time():
    one, other = (figures.slider(states(), list("abc"), "size", list("abc")).data for _ in range(2))
    assert one == other


@pytest.mark.parametrize(
    ("labels", "alt"), [(["a"], ["a", "b", "c"]), (list("abc"), ["a"]), (list("abc"), "abc"), ([], [])]
)
def test_slider_refuses_lists_of_different_lengths(labels, alt):
    with pytest.raises(ValueError, match="lists of one length"):
        figures.slider(states() if labels else [], labels, "size", alt)


def test_finish_glues_run_time_and_device(monkeypatch):
    glued = {}
    glue = pytest.importorskip("myst_nb")
    monkeypatch.setattr(glue, "glue", lambda name, value, display: glued.update({name: value}))
    figures.start()
    figures.finish()
    assert glued["run-time"] == 0
    assert re.fullmatch(r"a CPU with \d+ threads?|one .+", glued["device"])


def test_finish_without_start_says_so(monkeypatch):
    monkeypatch.setattr(figures, "_started", None)
    with pytest.raises(RuntimeError, match=r"figures\.start\(\)"):
        figures.finish()
