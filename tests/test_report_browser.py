"""The report in a real browser: offline, silent, accessible and alive."""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import synthetic

from resnext_ablate.evidence.report import write_report
from resnext_ablate.records.config import load_study

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


def test_all_is_drawn_in_seconds(visit: Visit) -> None:
    """Eleven charts stand within the time that a busy test machine may take."""
    start = time.monotonic()
    visit.page.reload()
    visit.page.wait_for_selector("body[data-ready]", timeout=60_000)
    assert time.monotonic() - start < 12


def test_point_leads_to_its_net(browser: sync_api.Browser, html: Path) -> None:
    """A click on a seed's dot opens its net with facts, curves, runs and command."""
    visit = Visit(browser, html, scheme="light")
    page = visit.page
    plot = page.locator("[data-figure=error-macs]")
    plot.scroll_into_view_if_needed()
    # The first trace holds the seeds; its fourth point is the first seed of 2x10d.
    plot.locator(".scatterlayer .trace").first.locator(".point").nth(3).hover(
        force=True
    )
    page.mouse.down()
    page.mouse.up()
    page.wait_for_selector("dialog[open]")
    assert page.locator("#net-title").inner_text() == "2x10d, seed 0"
    assert "undecided" in page.locator("#net-verdict").inner_text()
    assert page.locator("#net-facts").inner_text().count("47,423,000") == 1
    assert page.locator("#net-runs tbody tr").count() == 3
    assert page.locator("#net-runs tr.chosen th").inner_text() == "0"
    traces = page.evaluate("document.getElementById('net-plot').data.length")
    assert traces == 6  # Validation and training of three seeds.
    found = axe_api.Axe().run(page)
    assert [(v["id"], v["nodes"][0]["target"]) for v in found["violations"]] == []
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0
    assert "#net" not in page.url
    assert visit.complaints == []


def test_keyboard_walks_through_points(browser: sync_api.Browser, html: Path) -> None:
    """On a focused chart arrow keys go from point to point, and Enter opens the net."""
    visit = Visit(browser, html, scheme="dark")
    page = visit.page
    page.locator("[data-figure=pareto]").focus()
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    assert page.locator("#said").text_content() == "1x16d, seed 1"
    assert page.locator("[data-figure=pareto] .hovertext").count() == 1
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open]")
    assert page.locator("#net-title").inner_text() == "1x16d, seed 1"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.dataset.figure") == "pareto"


def test_name_in_a_table_is_a_link(browser: sync_api.Browser, html: Path) -> None:
    """A link leads to the net, can be kept, and opens the same net again."""
    visit = Visit(browser, html, scheme="light")
    visit.page.get_by_role("link", name="8x3d").first.click()
    visit.page.wait_for_selector("dialog[open]")
    assert visit.page.url.endswith("#net=8x3d")
    kept = visit.page.url
    other = Visit(browser, html, scheme="light")
    other.page.goto("about:blank")
    other.page.goto(kept)
    other.page.wait_for_selector("dialog[open]")
    assert other.page.locator("#net-title").inner_text() == "8x3d"


def test_command_of_a_point_trains_that_net(
    browser: sync_api.Browser, html: Path, tmp_path: Path
) -> None:
    """The command shown is a study of that net and seed, as the shell reads it."""
    page = Visit(browser, html, scheme="light").page
    page.evaluate("location.hash = '#net=4x6d&seed=2'")
    page.wait_for_selector("dialog[open]")
    describe, run = page.locator("#net-commands").inner_text().splitlines()
    name = "resnext29-4x6d-t16"
    assert describe == f"resnext-ablate describe {name} --image-size 32"
    study = tmp_path / "study.toml"
    study.write_text(synthetic.study().config.to_toml())
    words = shlex.split(run)
    assert words[:3] == ["resnext-ablate", "run", "study.toml"]
    config = load_study(study, overrides=words[3:])
    assert [spec.name for spec in config.net.variant_specs()] == [name]
    assert config.run.seed_list() == (2,)
    assert config.name == "synthetic-again"


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
        names=[HOSTILE, "b", "c", "d", "e"],
        failed={(1, 1): HOSTILE},
        question=HOSTILE,
    )
    files = write_report(tables, folder=tmp_path)
    visit = Visit(browser, files.html, scheme="light")
    assert visit.complaints == []
    assert visit.page.locator("img").count() == 0
    assert visit.texts("[data-table=results] tbody th")[0] == HOSTILE
    page = visit.page
    page.get_by_role("link", name=HOSTILE).first.click()
    page.wait_for_selector("dialog[open]")
    assert page.locator("#net-title").inner_text() == HOSTILE
    _, run = page.locator("#net-commands").inner_text().splitlines()
    assert shlex.split(run)[-1] == f"net.variants={json.dumps([HOSTILE])}"
    assert visit.complaints == []
    assert page.locator("img").count() == 0


@pytest.mark.parametrize(
    "label", ["<i>a</i>&lt;", "<i>a</i>&lt;, twice as long as ticks hold"]
)
def test_hostile_names_are_drawn_as_typed(
    browser: sync_api.Browser, tmp_path: Path, label: str
) -> None:
    """In a chart too, below the ticks or beside the points: no tag, no entity."""
    tables = synthetic.study(
        labels=[label, "b", "c", "d", "e"], names=[label, "b", "c", "d", "e"]
    )
    files = write_report(tables, folder=tmp_path)
    visit = Visit(browser, files.html, scheme="light")
    drawn = visit.page.locator("[data-figure=error-cardinality] text")
    words = [text.replace("\u00a0", " ").strip() for text in drawn.all_text_contents()]
    assert any(word.endswith(label) for word in words)
    assert visit.complaints == []


def test_download_holds_no_formula(browser: sync_api.Browser, tmp_path: Path) -> None:
    """Text that a spreadsheet would run is quoted, numbers below zero are not."""
    tables = synthetic.study(labels=["=1+1", "b", "c", "d", "e"])
    files = write_report(tables, folder=tmp_path)
    page = Visit(browser, files.html, scheme="light").page
    with page.expect_download() as waiting:
        page.locator("[data-table=certificate] [data-save]").click()
    text = Path(waiting.value.path()).read_text(encoding="utf-8")
    first, _, _, _, last = text.splitlines()[1:]
    assert first.startswith("'=1+1,")
    assert ",-1.4," in last
