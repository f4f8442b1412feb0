"""Every page of the built book, as a reader's browser sees it."""

import re
from urllib.parse import unquote, urldefrag

import pytest
from sight import HTML, Sight, pages

CHAPTERS = [page for page in pages() if re.match(r"book/\d\d_.*\.html", page)]


def test_asks_nothing_of_the_network(look, page):
    assert look(page).foreign == []


def test_loads_everything_without_an_error(look, page):
    assert look(page).failed == []
    assert look(page).complaints == []


def test_renders_every_formula(look, page):
    for formula in look(page).shown["formulas"]:
        assert formula["rendered"] == 1, formula
        assert formula["drawn"] > 0, formula
        assert formula["spoken"] == 1, formula
    assert look(page).shown["raw"] == []


def test_has_no_broken_tex(look, page):
    assert look(page).shown["errors"] == []


def test_numbers_and_links_equations(look, page):
    shown = look(page).shown
    numbers = [equation["number"] for equation in shown["equations"]]
    assert all(re.fullmatch(r"\(\d+(\.\d+)?\)", number) for number in numbers), numbers
    assert len(set(numbers)) == len(numbers), numbers
    for reference in shown["references"]:
        target, anchor = urldefrag(reference["href"])
        there = {e["id"]: e["number"] for e in look(target.split("/", 3)[3]).shown["equations"]}
        assert reference["text"] == there[anchor], reference


def test_describes_every_image(look, page):
    for image in look(page).light:
        assert image["alt"], image
        if image["drawn"]:
            assert len(image["alt"]) >= 20, f"too short to describe a figure: {image}"


def test_shows_figures_in_the_chosen_theme(look, page):
    sight = look(page)
    dark_paper = "rgb(18, 18, 18)"
    assert sight.background["light"] == "rgb(255, 255, 255)"
    if sight.shown["themed"]:
        assert sight.background["dark"] == sight.background["phone"] == dark_paper
    for theme, images, other in (("light", sight.light, "dark"), ("dark", sight.dark, "light")):
        for image in images:
            if f"only-{other}" in image["classes"]:
                assert not image["visible"], (theme, image)
            if f"only-{theme}" in image["classes"]:
                assert image["visible"], (theme, image)
                assert image["loaded"], (theme, image)
            if image["paper"] and image["visible"]:
                assert image["paper"] == {"light": "rgb(254, 254, 254)", "dark": dark_paper}[theme], image
    drawn = [image for image in sight.dark if image["drawn"]]
    assert all(image["themed"] for image in drawn), "a figure has no dark variant"
    variants = [[i["alt"] for i in drawn if f"only-{theme}" in i["classes"]] for theme in ("light", "dark")]
    assert variants[0] == variants[1]


@pytest.mark.parametrize("width", [1280, 375], ids=["desktop", "phone"])
def test_fits_the_screen(look, page, width):
    assert look(page).wide[width] == []


def test_folds_solutions_and_shows_no_error(look, page):
    shown = look(page).shown
    assert all(solution["folded"] and not solution["visible"] for solution in shown["solutions"])
    assert shown["tracebacks"] == []


def test_has_a_language_and_one_title(look, page):
    assert look(page).shown["lang"] == "en"
    assert len(look(page).shown["headings"]) == 1


def test_is_light(page):
    html = (HTML / page).read_text(encoding="utf-8")
    images = {HTML / "_images" / name for name in re.findall(r'src="[./]*_images/([^"]+)"', html)}
    assert len(html.encode()) + sum(image.stat().st_size for image in images) < 3_000_000


def test_every_internal_link_leads_somewhere(site, look, page):
    sight = look(page)
    for link in sight.shown["links"]:
        address, anchor = urldefrag(link)
        if not address.startswith(site):
            continue
        target = unquote(address.removeprefix(site)).split("?")[0] or "index.html"
        assert (HTML / target).is_file(), link
        if anchor and target.endswith(".html") and not target.startswith("_static/"):
            assert unquote(anchor) in look(target).shown["ids"], link


def test_search_finds_words_without_a_network(site, browser):
    context = browser.new_context()
    tab = context.new_page()
    foreign = []
    tab.on("request", lambda request: request.url.startswith(site) or foreign.append(request.url))

    def search(words):
        tab.goto(f"{site}search.html?q={words}")
        tab.wait_for_function("/found|did not match/.test(document.querySelector('#search-results')?.innerText)")
        tab.wait_for_load_state("networkidle")
        return [link.get_attribute("href") for link in tab.locator("#search-results ul.search li a").all()]

    assert any(link.startswith("book/glossary.html") for link in search("saturation"))
    assert any(link.startswith("book/api.html") for link in search("use_backend"))
    assert search("xylophone") == []
    assert foreign == []
    context.close()


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_slider_moves_one_figure_at_a_time(site, browser, chapter):
    context = browser.new_context(viewport={"width": 375, "height": 800})
    tab = context.new_page()
    tab.goto(site + chapter)
    sliders = tab.locator(".figure-slider")
    assert sliders.count() >= 1, "a chapter has a figure to play with"

    def states():
        return tab.evaluate(
            "() => [...document.querySelectorAll('.figure-slider')].map(f => ({"
            "  shown: [...f.querySelectorAll('.state')].flatMap((s, i) => s.getClientRects().length ? [i] : []),"
            "  label: f.querySelector('output').value,"
            "  spoken: f.querySelector('input').getAttribute('aria-valuetext')}))"
        )

    for number in range(sliders.count()):
        handle = sliders.nth(number).locator("input[type=range]")
        labels = handle.get_attribute("data-labels").split("|")
        before = states()
        handle.focus()
        for position in range(1, len(labels)):
            tab.keyboard.press("ArrowRight")
            now = states()
            assert now[number] == {"shown": [position], "label": labels[position], "spoken": labels[position]}
            assert now[:number] + now[number + 1 :] == before[:number] + before[number + 1 :]
        tab.keyboard.press("Home")
        assert states() == before
    context.close()


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_without_javascript_a_slider_shows_its_first_figure(site, browser, chapter):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(site + chapter)
    for slider in tab.locator(".figure-slider").all():
        assert slider.locator(".state").first.is_visible()
        assert slider.locator(".state:visible").count() == 1
    context.close()


BROKEN = """<!doctype html><html lang="en"><body><main>
<h1>Broken</h1><h1>Twice</h1><article>
<div class="math" id="equation-a">\\[\\frac{a}\\]</div>
<span class="math">\\(\\undefinedcommand x\\)</span>
<span class="math">x_t</span>
<p>The state $h_t$ was not rendered.</p>
<div style="width: 900px">wide</div>
<img src="_static/missing.png">
<script src="http://cdn.example/library.js"></script>
<script>throw new Error("broken")</script>
<script defer src="_static/mathjax/tex-svg-full.js"></script>
</article></main></body></html>"""


def test_the_checks_see_a_broken_page(site, browser):
    sight = Sight(site, browser, "broken.html", body=BROKEN)
    assert set(sight.foreign) == {"http://cdn.example/library.js"}
    assert any("missing.png: 404" in failure for failure in sight.failed)
    assert "broken" in sight.complaints
    assert [formula["rendered"] for formula in sight.shown["formulas"]] == [1, 1, 0]
    assert any("Missing argument" in error for error in sight.shown["errors"])
    assert any("undefinedcommand" in error for error in sight.shown["errors"])
    assert sight.shown["raw"] == ["The state $h_t$ was not rendered."]
    assert sight.shown["equations"] == [{"id": "equation-a", "number": ""}]
    assert len(sight.shown["headings"]) == 2
    assert not sight.light[0]["alt"]
    assert sight.wide[1280] == []
    assert any("wide" in element for element in sight.wide[375])
