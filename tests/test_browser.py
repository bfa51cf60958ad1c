"""The pages in a real browser: no error, no request, filters, keyboard, phone, and names that are shown as text."""

import shutil

import pytest
from made_runs import ATTACKS, DEFENSES, HOSTILE, finished_run, write_verdict

from lit_purify.evaluation.folder import RunFolder
from lit_purify.report.comparison import Comparison
from lit_purify.report.html import write_report
from lit_purify.report.pictures import OUTCOMES

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A report and a comparison, both with hostile names."""
    folder = tmp_path_factory.mktemp("pages")
    run = finished_run(folder / "run")
    other = finished_run(folder / "<img onerror=hacked=1 src=x>", seed=1, depth=HOSTILE)
    write_verdict(run, "audit", passed=False)
    write_verdict(run, "gradcheck", stale=True)
    write_report(RunFolder(run))
    (folder / "compare.html").write_text(Comparison([run, other]).page())
    return {"report": run / "report.html", "compare": folder / "compare.html"}


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def show(browser, pages):
    """Opens a page; what went wrong in it is looked at in the end."""
    problems, contexts = [], []

    def opened(name, **options):
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options}))
        shown = contexts[-1].new_page()
        shown.on("console", lambda message: problems.append(message.text))
        shown.on("pageerror", lambda error: problems.append(str(error)))
        shown.on("request", lambda request: request.url.startswith(("file:", "data:")) or problems.append(request.url))
        shown.goto(pages[name].as_uri())
        shown.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        return shown

    yield opened
    for context in contexts:
        context.close()
    assert not problems


def test_filters_show_what_is_chosen(show):
    page, total = show("report"), len(DEFENSES) * len(ATTACKS) * 2
    visible = page.locator(".pictures figure:visible")
    assert visible.count() == total
    # By the keyboard.
    page.get_by_label("uniform", exact=True).focus()
    page.keyboard.press("Space")
    assert visible.count() == total * 2 // 3
    assert not any(text.startswith("uniform") for text in page.locator("figcaption strong:visible").all_inner_texts())
    for outcome, words in OUTCOMES.items():
        if outcome != "shaken":
            page.get_by_label(words).uncheck()
    assert 0 < visible.count() == page.locator(".pictures .badge.shaken:visible").count() < total * 2 // 3
    assert page.locator(".mask:visible").count() > 0
    page.get_by_label("strong noise").uncheck()
    assert page.locator(".mask:visible").count() == 0
    for attack in ATTACKS:
        page.get_by_label(attack, exact=True).uncheck()
    assert visible.count() == 0


@pytest.mark.parametrize("name", ["report", "compare"])
def test_hostile_names_are_text(show, name):
    page = show(name)
    assert page.evaluate("window.hacked") is None
    assert page.locator("script").count() == 0
    assert page.locator("img:not([src^='data:'])").count() == 0
    # Every text that holds a name holds all of it.
    assert page.locator("body").text_content().count(HOSTILE) >= 3
    assert page.locator("svg.plot").count() == 3


@pytest.mark.parametrize("name", ["report", "compare"])
@pytest.mark.parametrize(("scheme", "options"), [("light", {}), ("dark", {"runOnly": ["color-contrast"]})])
def test_axe_finds_nothing(show, name, scheme, options):
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(show(name, color_scheme=scheme), options=options).response
    assert len(found["passes"]) >= (1 if options else 15)
    assert [(each["id"], each["nodes"][0]["html"]) for each in found["violations"]] == []


@pytest.mark.parametrize("name", ["report", "compare"])
def test_a_phone_scrolls_tables_and_not_the_page(show, name):
    page = show(name, viewport={"width": 360, "height": 780})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator(".plot").first.bounding_box()["width"] <= 330
    assert page.evaluate("document.querySelector('.scroll').scrollWidth") > 360
