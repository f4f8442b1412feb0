"""The built book on a local server, and Chromium to look at it with.

Chromium is what ``tools/find_chromium.sh`` finds (``CHROMIUM`` names one by hand). Where there is none, or where the
book is not built, these tests are skipped with a reason; with ``REQUIRE_CHROMIUM`` in the environment they fail.
"""

import functools
import os
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from sight import HTML, ROOT, Sight, pages

# Chromium asks its maker for this and that unless told not to; the tests count every request.
FLAGS = ["--no-sandbox", "--disable-quic", "--disable-background-networking", "--disable-component-update"]


def missing(reason):
    if os.environ.get("REQUIRE_CHROMIUM"):
        pytest.fail(reason)
    pytest.skip(reason)


def pytest_generate_tests(metafunc):
    if "page" in metafunc.fixturenames:
        metafunc.parametrize("page", pages() or ["index.html"])


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def site():
    """The root address of the built book, on a local server of its own."""
    if not (HTML / "book" / "index.html").exists():
        missing("the book is not built; run make book first")
    handler = functools.partial(QuietHandler, directory=str(HTML))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    found = subprocess.run(["sh", str(ROOT / "tools" / "find_chromium.sh")], capture_output=True, text=True)
    if found.returncode:
        missing(found.stderr.strip())
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found.stdout.strip(), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def look(site, browser):
    """Open a page once, look at it in both themes and at phone width, and remember what was seen."""
    seen = {}

    def look_at(page):
        if page not in seen:
            seen[page] = Sight(site, browser, page)
        return seen[page]

    return look_at
