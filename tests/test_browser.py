"""The pages in a real browser: no error, no request, filters, keyboard, phone, and names that are shown as text."""

import shutil

import pytest
from made_runs import ATTACKS, DEFENSES, HOSTILE, finished_run, write_verdict

from lit_purify.evaluation.folder import RunFolder
from lit_purify.report.comparison import Comparison
from lit_purify.report.html import write_report
from lit_purify.report.pictures import OUTCOMES

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A report and a comparison, both with hostile names."""
    folder = tmp_path_factory.mktemp("pages")
    run, other = (
        finished_run(folder / "run"),
        finished_run(folder / "<img onerror=hacked=1 src=x>", seed=1, depth=HOSTILE),
    )
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
        shown.on("dialog", lambda dialog: problems.append(dialog.message))
        shown.on("request", lambda request: request.url.startswith(("file:", "data:")) or problems.append(request.url))
        shown.goto(pages[name].as_uri())
        return shown

    yield opened
    for context in contexts:
        context.close()
    assert not problems


def visible(page):
    return page.locator(".gallery figure:visible")


def test_filters_show_what_is_chosen(show):
    page = show("report")
    total = len(DEFENSES) * len(ATTACKS) * 2
    assert visible(page).count() == total
    page.get_by_label("uniform", exact=True).uncheck()
    assert visible(page).count() == total * 2 // 3
    assert page.locator(".gallery figure[data-defense=uniform]:visible").count() == 0
    for outcome, words in OUTCOMES.items():
        if outcome != "shaken":
            page.get_by_label(words).uncheck()
    shown = visible(page).count()
    assert 0 < shown < total * 2 // 3
    assert page.locator(".gallery figure[data-outcome=shaken]:visible").count() == shown
    assert page.locator("output").inner_text() == f"{shown} of {total} shown"
    for attack in ATTACKS:
        page.get_by_label(attack, exact=True).uncheck()
    assert visible(page).count() == 0
    page.get_by_label("pgd", exact=True).check()
    assert 0 < visible(page).count() == page.locator(".gallery figure[data-attack=pgd]:visible").count()


def test_the_keyboard_reaches_filters_and_slider(show):
    page = show("report")

    def opacity():
        return float(page.locator(".mask").first.evaluate("each => getComputedStyle(each).opacity"))

    page.get_by_label("broken in some runs").focus()
    before = visible(page).count()
    page.keyboard.press("Space")
    assert visible(page).count() < before
    for _ in range(2 + len(DEFENSES) + len(ATTACKS) + 1):
        page.keyboard.press("Tab")
    assert opacity() == pytest.approx(0.45)
    page.keyboard.press("Home")
    assert opacity() == 0.0
    page.keyboard.press("End")
    assert opacity() == 1.0
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "A"


def test_everything_is_shown_without_scripts(show):
    page = show("report", java_script_enabled=False)
    assert visible(page).count() == len(DEFENSES) * len(ATTACKS) * 2
    assert page.locator(".filters").is_hidden()
    assert page.locator("table:visible").count() >= 4


@pytest.mark.parametrize("name", ["report", "compare"])
def test_hostile_names_are_text(show, name):
    page = show(name)
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.evaluate("window.hacked") is None
    assert page.locator("script").count() == 1
    assert page.locator("img:not([src^='data:'])").count() == 0
    # Every text that holds a name holds all of it, also the title, drawings and what is read out.
    assert page.locator("body").text_content().count(HOSTILE) >= 3
    assert page.locator("svg").count() >= 3


@pytest.mark.parametrize("name", ["report", "compare"])
@pytest.mark.parametrize(("scheme", "options"), [("light", {}), ("dark", {"runOnly": ["color-contrast"]})])
def test_axe_finds_nothing(show, name, scheme, options):
    from axe_playwright_python.sync_playwright import Axe

    page = show(name, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    found = Axe().run(page, options=options).response
    assert len(found["passes"]) >= (1 if options else 15)
    assert [(each["id"], each["nodes"][0]["html"]) for each in found["violations"]] == []


@pytest.mark.parametrize("name", ["report", "compare"])
def test_a_phone_scrolls_tables_and_not_the_page(show, name):
    page = show(name, viewport={"width": 360, "height": 780})
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator(".plot").first.bounding_box()["width"] <= 330
    assert page.evaluate("document.querySelector('.scroll').scrollWidth") > 360


def test_dark_ground_has_light_letters(show):
    def brightness(scheme, selector, of):
        color = show("report", color_scheme=scheme).locator(selector).first.evaluate(f"e => getComputedStyle(e).{of}")
        return sum(int(value) for value in color[color.index("(") + 1 : -1].split(",")[:3]) / 765

    for selector, of in ((".plot text", "fill"), ("td", "color")):
        assert brightness("light", selector, of) < 0.3
        assert brightness("dark", selector, of) > 0.7
    assert brightness("dark", "body", "backgroundColor") < 0.2
