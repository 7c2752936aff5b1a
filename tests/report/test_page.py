"""The page of a comparison in a real browser, from disk and without a network."""

import shutil

import pytest
from comparisons import made_up

from sd_atoms.report.comparison import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on the path")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    write_report(made_up(folder / "runs"), folder / "report")
    return folder / "report"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(report, browser):
    """The page opened; at the end nothing may have been said on the console or asked of a network."""
    opened, wrong = browser.new_page(), []
    opened.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("requestfailed", lambda request: wrong.append(f"failed: {request.url}"))
    opened.on(
        "request", lambda request: request.url.startswith(("file:", "data:", "blob:")) or wrong.append(request.url)
    )
    opened.goto((report / "index.html").as_uri())
    yield opened
    opened.close()
    assert wrong == []


def column(page, number):
    return page.locator(f"#table tbody td:nth-child({number})").all_inner_texts()


def source(page, selector):
    """What an image shows, once it is loaded."""
    image = page.locator(selector).first
    image.scroll_into_view_if_needed()
    page.wait_for_function("image => image.complete && image.naturalWidth > 0", arg=image.element_handle())
    return image.get_attribute("src")


def test_the_table_sorts_by_a_click_or_a_key_and_filters(page):
    assert page.locator("h1").inner_text() == "Comparison on pocket"
    assert len(column(page, 2)) == 8
    heading = page.get_by_role("button", name="fidelity (clip)")
    heading.click()
    methods = column(page, 2)
    assert methods == ["lora"] * 2 + ["atoms"] * 2 + ["token"] * 2 + ["pretrained"] * 2
    heading = page.get_by_role("button", name="fidelity (clip)")
    heading.focus()
    page.keyboard.press("Enter")
    assert column(page, 2) == methods[::-1]
    page.get_by_role("button", name="parameters").click()
    assert column(page, 2)[-2:] == ["pretrained"] * 2  # what it lacks comes last, whatever the order
    page.select_option("#table-concept", "canal")
    page.fill("#table-filter", "LO")
    assert list(zip(column(page, 1), column(page, 2), strict=True)) == [("canal", "lora")]


def test_a_point_of_the_plot_shows_its_pictures(page):
    assert page.locator("#plot .point").count() == 4
    page.select_option("#plot-concept", "canal")
    assert page.locator("#plot-point option").all_inner_texts()[0] == "pretrained on canal"
    assert "canal" in source(page, "#plot-images img")
    page.select_option("#plot-concept", "")
    page.wait_for_function("document.querySelectorAll('#plot .point').length == 8")
    page.select_option("#plot-x", "parameters")
    page.wait_for_function("document.querySelectorAll('#plot .point').length == 6")  # the pretrained base has none
    box = page.locator("#plot .point").nth(2).bounding_box()
    page.locator("#plot").scroll_into_view_if_needed()
    box = page.locator("#plot .point").nth(2).bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_function("document.querySelector('#plot-point').value.includes('lora')")
    assert "/lora/" in source(page, "#plot-images img")
    page.select_option("#plot-point", label="token on canal")
    assert source(page, "#plot-images img") == "images/canal/token/seed-0/00-0.webp"


def test_the_grid_follows_its_pickers(page):
    assert page.locator("#grid tbody tr").count() == 2
    page.select_option("#grid-prompts", "all")
    assert page.locator("#grid tbody tr").count() == 3
    assert 'The castle by a <lake> & "sea".' in page.locator("#grid tbody th").all_inner_texts()
    page.select_option("#grid-concept", "canal")
    page.select_option("#grid-seed", "1")
    page.select_option("#grid-drawn", "1")
    found = [image.get_attribute("src") for image in page.locator("#grid tbody tr:nth-child(1) img").all()]
    assert found == ["images/canal/pretrained/00-1.webp"] + [
        f"images/canal/{method}/seed-1/00-1.webp" for method in ("atoms", "lora", "token")
    ]


def test_two_methods_are_zoomed_side_by_side(page):
    page.select_option("#side-left", "pretrained")
    page.select_option("#side-right", "token")
    page.select_option("#side-prompt", "2")
    assert "pretrained" in source(page, "#side figure:nth-child(1) img")
    assert "token/seed-0/02-0" in source(page, "#side figure:nth-child(2) img")
    page.locator("#side-zoom").focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    widths = [image.bounding_box()["width"] for image in page.locator("#side img").all()]
    assert (
        widths[0]
        == widths[1]
        == pytest.approx(3 * page.locator("#side .window").first.bounding_box()["width"], rel=0.02)
    )


def test_the_strength_slider_shows_each_strength(page):
    assert page.locator("#strength-method option").all_inner_texts() == ["atoms", "lora"]  # token has no strength
    page.select_option("#strength-method", "lora")
    assert page.locator("#strength-value").inner_text() == "1"
    assert source(page, "#strength img") == "images/castle/lora/seed-0/00-0.webp"
    page.locator("#strength-scale").focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#strength-value").inner_text() == "0.5"
    assert source(page, "#strength img") == "images/castle/lora/seed-0/scale-0.5-00-0.webp"


def test_differences_in_pairs_and_tried_rates_are_shown(page):
    rows = [row.split("\t") for row in page.locator("#differences tbody").inner_text().split("\n")]
    assert [row[1] for row in rows] == ["lora", "token"] * 2
    assert rows[0][2].startswith("+0.100 +0.100 to +0.100")
    assert page.locator("#rates tbody").inner_text().split("\t") == ["lora", "0.001: 0.450, 0.003: 0.500"]


def test_a_phone_needs_no_sideways_scrolling(page):
    page.set_viewport_size({"width": 390, "height": 800})
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
