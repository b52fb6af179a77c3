"""The page of a report in headless Chromium, on a desk and on a phone, with scripts and without."""

import numpy as np
import pytest
from PIL import Image

from hf_poolformer.reports.page import (
    Bars,
    Chart,
    Commands,
    Facts,
    Gallery,
    Page,
    Section,
    Table,
    Text,
    Tile,
    write_page,
)


# Each would set `window.pwned`, ask for something, or push the page's edge, if it were more than text.
HOSTILE = [
    "<script>window.pwned = 1</script>",
    '"><img src=https://example.com/x onerror="window.pwned = 1">',
    "</style><style>body { width: 4000px; background: url(https://example.com/x) }",
    "</title></svg><svg onload=window.pwned=1>",
    "javascript:window.pwned=1",
    "lone \ud800, nul \0, turned \u202egnp.exe",
    "w" * 10_000,
]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    def draw(axes):
        axes.barh(range(len(HOSTILE)), range(len(HOSTILE)), label=HOSTILE[0])
        axes.set_yticks(range(len(HOSTILE)), [name[:20] for name in HOSTILE])
        axes.legend()

    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (90, 120, 3), dtype=np.uint8)) for _ in range(4)]
    tiles = [Tile(images[: 1 + index % 4], [name, "true a, predicted b"], name) for index, name in enumerate(HOSTILE)]
    rows = [[name, index, None if index == 2 else (index * 7 % 5) / 10] for index, name in enumerate(HOSTILE)]
    rows += [[f"class {index}", index, 0.5] for index in range(10, 50)]
    wide = Table([f"column {index}" for index in range(30)], [list(range(30))])
    sections = [
        Section(name, [Facts([(name, name), ("images", "3")]), Text(name), Commands([name])], name, "bad")
        for name in HOSTILE
    ]
    sections += [
        Section("Tables", [Table(["class", "count", "F1"], rows, caption="Each class"), wide]),
        Section("Pictures", [Gallery(tiles, side=128), Bars([(name, 3, name) for name in HOSTILE])]),
        Section("Charts", [Chart(draw, HOSTILE[0], caption=HOSTILE[1]), Chart(draw, "second")]),
    ]
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_page(path, Page(HOSTILE[1], HOSTILE[2], sections))
    return path


@pytest.fixture
def opened(browser, report):
    """Opens the report; in the end it must have asked for nothing, and no policy was broken."""
    contexts, said = [], []

    def run(width=1280, **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, **options))
        page = contexts[-1].new_page()
        page.on("request", lambda request: said.append(request.url[:100]))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(report.as_uri())
        return page

    yield run
    for context in contexts:
        context.close()
    assert [line for line in said if not line.startswith((report.as_uri(), "data:"))] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_nothing_pushes_the_edge_and_hostile_names_do_nothing(opened, width, scheme):
    page = opened(width, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    beyond = """width => [...document.body.querySelectorAll('*')]
        .filter(one => !one.parentElement.closest('.scroll, dialog, svg'))
        .filter(one => one.getBoundingClientRect().right > width + 0.5)
        .map(one => one.outerHTML.slice(0, 80))"""
    assert page.evaluate(beyond, width) == []
    assert page.evaluate("window.pwned") is None
    assert page.title().startswith('"><img src=')
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(254, 254, 254)", "dark": "rgb(20, 23, 29)"}[scheme]
    # The table that is too wide scrolls by itself.
    assert page.locator(".scroll").nth(1).evaluate("box => box.scrollWidth > box.clientWidth")
    # What the policy keeps off: the widths of bars and the colours of charts are no style attributes.
    widths = page.locator(".bar rect").evaluate_all("bars => bars.map(bar => bar.getBoundingClientRect().width)")
    assert min(widths) > 30
    ink = page.evaluate("getComputedStyle(document.body).color")
    assert page.locator(".chart text").first.evaluate("text => getComputedStyle(text).fill") == ink


def test_everything_can_be_read_without_scripts(opened):
    page = opened(375, java_script_enabled=False)
    assert page.locator("button").count() == 0
    assert page.locator("table.sortable").first.locator("tbody tr").count() == 47
    for image in page.locator("img").all():
        assert image.bounding_box()["width"] > 50
    page.get_by_role("link", name="Charts").click()
    assert page.get_by_role("heading", name="Charts").bounding_box()["y"] < 800
    assert page.get_by_role("img", name="second").is_visible()


def test_tables_sort_by_click_and_by_key(opened):
    page = opened()
    table = page.locator("table.sortable").first
    heading = table.locator("th").nth(2)

    def column(index):
        return table.locator("tbody tr").evaluate_all(
            "(rows, index) => rows.map(row => row.cells[index].textContent)", index
        )

    assert table.locator("[aria-sort]").count() == 0
    heading.get_by_role("button", name="F1").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert column(2) == [*sorted(column(2)[:-1], key=float), "—"]
    # 0.5 of many classes: what is equal stays in its order.
    assert column(0)[-3:-1] == ["class 48", "class 49"]
    page.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "descending"
    assert column(2) == [*sorted(column(2)[:-1], key=float, reverse=True), "—"], "what is missing stays last"
    table.locator("th").nth(0).get_by_role("button").focus()
    page.keyboard.press("Space")
    assert heading.get_attribute("aria-sort") is None
    names = [name for name in column(0) if name.startswith("class")]
    assert names == [f"class {index}" for index in range(10, 50)]


@pytest.mark.parametrize("width", [375, 1280])
def test_images_enlarge(opened, width):
    page = opened(width)
    dialog = page.get_by_role("dialog")
    assert not dialog.is_visible()
    buttons = page.locator(".tile button")
    buttons.nth(2).focus()
    page.keyboard.press("Enter")
    assert dialog.locator("img").count() == 3
    small = buttons.nth(2).locator("img").first.bounding_box()
    large = dialog.locator("img").first.bounding_box()
    assert large["width"] > small["width"] or width == 375
    box = dialog.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["height"] <= 800
    assert "style><style>" in dialog.inner_text()
    page.keyboard.press("ArrowRight")
    assert dialog.locator("img").count() == 4
    dialog.get_by_role("button", name="Previous").click()
    assert dialog.locator("img").count() == 3
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert buttons.nth(2).evaluate("button => button === document.activeElement")
    buttons.first.click()
    assert dialog.get_by_role("button", name="Previous").is_disabled()
    dialog.get_by_role("button", name="Close").click()
    assert not dialog.is_visible()


def test_commands_can_be_copied(opened):
    page = opened(permissions=["clipboard-read", "clipboard-write"])
    commands = page.locator(".commands").nth(4)
    commands.get_by_role("button", name="Copy").click()
    commands.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "javascript:window.pwned=1\n"


def test_on_paper_it_is_light(opened):
    page = opened(color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(254, 254, 254)"
    assert not page.locator("nav").is_visible()
    assert page.locator(".long").evaluate("box => box.scrollHeight === box.clientHeight")
