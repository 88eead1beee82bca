"""The report in a real browser: offline, silent, accessible and alive."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import synthetic

from resnext_ablate.report import write_report

sync_api = pytest.importorskip("playwright.sync_api")
axe_api = pytest.importorskip("axe_core_python.sync_playwright")

DARK_INK, LIGHT_INK = "rgb(28, 36, 48)", "rgb(230, 233, 238)"
HOSTILE = "</script><img src=x onerror=alert(1)>\"'=1"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine's PATH"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        yield launched
        launched.close()


class Visit:
    """One visit to a report, with all it asked for and complained about."""

    def __init__(
        self, browser: sync_api.Browser, html: Path, *, scheme: str, width: int = 1280
    ) -> None:
        context = browser.new_context(
            offline=True,
            color_scheme=scheme,
            viewport={"width": width, "height": 900},
        )
        self.page = context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append("a dialog"))
        self.page.goto(html.as_uri())
        self.page.wait_for_selector("body[data-ready]", timeout=60_000)

    def tick_colour(self, *, becomes: str) -> str:
        """Colour of the axis labels, once it is the expected one or time is up."""
        tick = "getComputedStyle(document.querySelector('.xtick text')).fill"
        # The page's policy forbids the evaluation that playwright's own wait needs.
        for _ in range(50):
            if self.page.evaluate(tick) == becomes:
                break
            self.page.wait_for_timeout(100)
        return str(self.page.evaluate(tick))

    def texts(self, selector: str) -> list[str]:
        return [str(text) for text in self.page.locator(selector).all_inner_texts()]


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tables = synthetic.study(failed={(2, 1): "non-finite loss at epoch 3, step 17"})
    return write_report(tables, folder=tmp_path_factory.mktemp("report")).html


@pytest.fixture(scope="module")
def visit(browser: sync_api.Browser, html: Path) -> Visit:
    return Visit(browser, html, scheme="light")


@pytest.fixture(scope="module")
def dark(browser: sync_api.Browser, html: Path) -> Visit:
    return Visit(browser, html, scheme="dark")


def test_all_charts_are_drawn_offline(visit: Visit) -> None:
    """Eleven charts, nothing fetched, nothing on the console, no way to share."""
    page = visit.page
    assert page.locator(".plot .main-svg").count() >= 11
    assert page.locator(".js-plotly-plot").count() == 11
    foreign = [url for url in visit.requests if not url.startswith(("file:", "blob:"))]
    assert foreign == []
    assert visit.complaints == []
    assert page.locator("[data-title*='Share'], [data-title*='loud']").count() == 0
    assert page.locator("[data-title*='ownload']").count() == 11


def test_page_fits_a_phone(browser: sync_api.Browser, html: Path) -> None:
    """On a narrow screen only tables scroll sideways, never the page."""
    phone = Visit(browser, html, scheme="light", width=390)
    assert phone.page.evaluate("document.documentElement.scrollWidth") <= 390
    widths = phone.page.eval_on_selector_all(
        ".plot .main-svg", "nodes => nodes.map(n => n.getBoundingClientRect().width)"
    )
    assert max(widths) <= 390


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_accessibility_violations(visit: Visit, dark: Visit, scheme: str) -> None:
    """axe finds nothing, with all details open."""
    page = (dark if scheme == "dark" else visit).page
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = axe_api.Axe().run(page)
    assert [(v["id"], v["nodes"][0]["target"]) for v in found["violations"]] == []


def test_charts_follow_the_colour_scheme(browser: sync_api.Browser, html: Path) -> None:
    """Text of the charts is dark on light, light on dark, also after a change."""
    visit = Visit(browser, html, scheme="light")
    assert visit.tick_colour(becomes=DARK_INK) == DARK_INK
    visit.page.emulate_media(color_scheme="dark")
    assert visit.tick_colour(becomes=LIGHT_INK) == LIGHT_INK
    assert visit.complaints == []


def test_printing_opens_details_in_light(dark: Visit) -> None:
    """Paper gets light charts and every detail, whatever the screen shows."""
    assert dark.tick_colour(becomes=LIGHT_INK) == LIGHT_INK
    dark.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = 0)")
    dark.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert dark.tick_colour(becomes=DARK_INK) == DARK_INK
    assert dark.page.locator("details:not([open])").count() == 0
    assert len(dark.page.pdf()) > 20_000
    assert dark.complaints == []


def test_table_sorts(visit: Visit) -> None:
    """A click on a heading sorts by value, a second one the other way."""
    first = "[data-table=certificate] tbody th"
    heading = visit.page.locator("[data-table=certificate] thead button").nth(6)
    plan = visit.texts(first)
    heading.click()
    rising = visit.texts(first)
    heading.click()
    assert visit.texts(first) == rising[::-1]
    # By parameters, which fall from 32x1d (+1.2 %) to 8x3d (-2.2 %).
    assert rising == ["8x3d", "4x6d", "2x10d", "1x16d", "32x1d"]
    assert plan == ["1x16d", "2x10d", "4x6d", "8x3d", "32x1d"]


def test_unknown_values_sort_last(visit: Visit) -> None:
    """The reference, which has no difference, stays below in both directions."""
    heading = visit.page.locator("[data-table=results] thead button").nth(4)
    for _ in range(2):
        heading.click()
        assert visit.texts("[data-table=results] tbody th")[-1] == "1x16d"


def test_table_filters_and_downloads(visit: Visit) -> None:
    """Every word must match; the download holds all columns of the rows left."""
    page = visit.page
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    section = page.locator("[data-table=runs]")
    section.locator("input").fill("4x6d DIVERGED")
    assert section.locator("tbody tr").count() == 1
    assert section.locator("output").inner_text() == "1 of 15 rows"
    with page.expect_download() as waiting:
        section.locator("[data-save]").click()
    lines = Path(waiting.value.path()).read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("study,variant,name,cardinality")
    assert '"non-finite loss at epoch 3, step 17"' in lines[1]


def test_hover_names_the_variant(visit: Visit) -> None:
    """The text at a point gives its variant, mean and number of runs."""
    found = visit.page.evaluate(
        "document.querySelector('[data-figure=error-macs]').data.at(-1).hovertext[0]"
    )
    assert found.startswith("<b>1x16d</b><br>mean ")
    assert found.endswith("3 runs")


def test_rows_are_the_same_with_and_without_scripts(
    browser: sync_api.Browser, html: Path
) -> None:
    """What the server wrote is what the script shows."""
    context = browser.new_context(java_script_enabled=False)
    plain = context.new_page()
    plain.goto(html.as_uri())
    alive = Visit(browser, html, scheme="light").page
    for table in ("results", "certificate", "failed", "runs", "epochs"):
        cells = f"[data-table={table}] tbody :is(td, th)"
        expected = plain.locator(cells).all_text_contents()
        assert expected
        assert alive.locator(cells).all_text_contents() == expected


def test_hostile_text_does_nothing(browser: sync_api.Browser, tmp_path: Path) -> None:
    """Markup in names is shown as typed, runs nothing and loads nothing."""
    tables = synthetic.study(
        labels=[HOSTILE, "b", "c", "d", "e"],
        failed={(1, 1): HOSTILE},
        question=HOSTILE,
    )
    files = write_report(tables, folder=tmp_path)
    visit = Visit(browser, files.html, scheme="light")
    assert visit.complaints == []
    assert visit.page.locator("img").count() == 0
    assert visit.texts("[data-table=results] tbody th")[0] == HOSTILE
    ticks = visit.page.locator("[data-figure=error-cardinality] .xtick text")
    assert HOSTILE in ticks.first.text_content()
