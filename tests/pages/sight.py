"""What the tests of the pages look at: the built book, and one page of it as a browser shows it."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HTML = ROOT / "_build" / "html"


def pages():
    """Return the address of every page of the built book, relative to its root."""
    found = (path.relative_to(HTML).as_posix() for path in sorted(HTML.rglob("*.html")))
    return [page for page in found if not page.startswith("_static/")]


class Sight:
    """What one page asks for, shows and complains about.

    Attributes
    ----------
    foreign, failed, complaints : list of str
        Requests to anywhere but the local server; requests that failed; errors in the page's console.
    shown : dict
        What ``LOOK`` returns.
    light, dark : list of dict
        Every image and every drawing in the respective theme, as ``IMAGES`` returns them.
    background : dict
        The page's background colour in each theme.
    wide : dict
        Viewport width -> elements that stick out of the page.
    """

    def __init__(self, site, browser, page, body=None):
        self.foreign, self.failed, self.complaints = [], [], []
        self.wide, self.background = {}, {}
        context, tab = self._open(browser, site, page, body, width=1280, color_scheme="light")
        self.url, self.shown = tab.url, tab.evaluate(LOOK)
        self.light, self.background["light"] = tab.evaluate(IMAGES), tab.evaluate(BACKGROUND)
        for _ in range(3):  # the button goes round automatic, light and dark
            if tab.locator("html").get_attribute("data-theme") != "dark" and self.shown["themed"]:
                tab.locator("button.theme-switch-button:visible").first.click()
        self.dark, self.background["dark"] = tab.evaluate(IMAGES), tab.evaluate(BACKGROUND)
        context.close()
        # A phone whose owner has chosen dark pages everywhere
        context, tab = self._open(browser, site, page, body, width=375, color_scheme="dark")
        self.background["phone"] = tab.evaluate(BACKGROUND)
        context.close()

    def _open(self, browser, site, page, body, width, color_scheme):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=color_scheme)
        context.set_default_timeout(60_000)
        tab = context.new_page()

        def local_only(route):
            if route.request.url.startswith((site, "data:", "blob:")):
                route.continue_()
            else:
                self.foreign.append(route.request.url)
                route.abort()

        tab.route("**/*", local_only)
        if body is not None:
            tab.route(site + page, lambda route: route.fulfill(body=body, content_type="text/html"))
        tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        tab.on("console", lambda message: message.type == "error" and self.complaints.append(message.text))
        tab.on("requestfailed", lambda request: self.failed.append(f"{request.url}: {request.failure}"))
        tab.on("response", lambda answer: answer.status >= 400 and self.failed.append(f"{answer.url}: {answer.status}"))
        tab.goto(site + page, wait_until="load")
        # A page that only redirects is looked at where it leads.
        tab.wait_for_function("!document.querySelector('meta[http-equiv=Refresh]')")
        tab.wait_for_load_state("networkidle")
        tab.evaluate("window.MathJax?.startup?.promise")
        self.wide[width] = tab.evaluate(STICKING_OUT)
        return context, tab


LOOK = r"""() => {
  const all = (css, root = document) => [...root.querySelectorAll(css)];
  // TeX that nobody rendered: text outside of code and formulas that still has its commands or dollar signs
  const raw = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, text = node.textContent;
    if (node.parentElement.closest('script,style,noscript,pre,code,svg,textarea,mjx-container')) continue;
    if (/\\[()[\]]|\\(begin|frac|text|math|operatorname|boldsymbol|partial|sum)|\$[^$\s][^$]*\$/.test(text))
      raw.push(text.trim().slice(0, 80));
  }
  return {
    lang: document.documentElement.lang,
    themed: !!document.querySelector('button.theme-switch-button'),
    headings: all('h1').filter(h => h.offsetHeight).map(h => h.textContent.replace(/#$/, '')),
    formulas: all('.math').map(m => ({
      source: m.textContent.trim().slice(0, 60), rendered: all('mjx-container', m).length,
      drawn: all('mjx-container svg path, mjx-container svg use, mjx-container svg rect', m).length,
      spoken: all('mjx-assistive-mml', m).length})),
    errors: all('mjx-merror, [data-mml-node="merror"], [data-mjx-error], mjx-container [fill="red"], ' +
                'mjx-container [stroke="red"], mjx-container [mathcolor="red"]').map(e => e.textContent.slice(0, 80)),
    raw,
    equations: all('div.math[id]').map(d => ({
      id: d.id, number: all('.eqno', d).map(e => e.textContent.replace(/#$/, '').trim()).join()})),
    references: all('a.reference[href*="#equation-"]').map(a => ({
      href: a.href, text: a.textContent.trim()})),
    ids: all('[id]').map(e => e.id).concat(all('a[name]').map(a => a.name)),
    links: all('a[href]').map(a => a.href),
    solutions: all('.solution.dropdown').map(s => ({
      folded: s.classList.contains('toggle-hidden'),
      visible: all(':scope > :not(.admonition-title)', s).some(
        e => e.checkVisibility({opacityProperty: true, visibilityProperty: true}))})),
    tracebacks: all('.cell_output .traceback, .output.stderr').map(e => e.textContent.slice(0, 80)),
  };
}"""

IMAGES = """() => [...document.querySelectorAll('img, .figure-slider svg[role=img]')].map(e => ({
  source: e.currentSrc || e.getAttribute('aria-label'),
  alt: e.tagName == 'IMG' ? e.getAttribute('alt') : e.getAttribute('aria-label'),
  classes: [...e.classList],
  drawn: !!e.closest('.cell_output'),
  themed: !!e.closest('.figure-variants, .figure-slider'),
  visible: e.getClientRects().length > 0,
  loaded: e.tagName != 'IMG' || (e.complete && e.naturalWidth > 0),
  paper: e.tagName == 'IMG' ? null : getComputedStyle(e.querySelector('path')).fill,
}))"""

BACKGROUND = "() => getComputedStyle(document.body).backgroundColor"

# An element may be wider than the page only within something that scrolls.
STICKING_OUT = """() => {
  const page = document.documentElement, width = page.clientWidth, out = [];
  if (page.scrollWidth > width) out.push(`the page itself: ${page.scrollWidth}`);
  for (const e of document.querySelectorAll('article *')) {
    const box = e.getBoundingClientRect();
    if (!box.width || box.right <= width + 1 || e.ownerSVGElement || e.closest('mjx-assistive-mml')) continue;
    let within = e.parentElement, scrolls = false;
    for (; within && within !== document.body; within = within.parentElement)
      if (/auto|scroll/.test(getComputedStyle(within).overflowX) && within.getBoundingClientRect().right <= width + 1)
        { scrolls = true; break; }
    if (!scrolls) out.push(`${e.tagName}.${e.className}, ${box.right}: ${e.textContent.trim().slice(0, 40)}`);
  }
  return out.slice(0, 5);
}"""
