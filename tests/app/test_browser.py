"""The page in headless Chromium: upload a picture, see its classes and where they are; a broken one, see a message."""

import pytest


pytest.importorskip("gradio", minversion="6.20", reason="needs gradio: pip install 'hf-poolformer[app]'")

WAIT = 30_000  # milliseconds, on a busy machine


@pytest.fixture(scope="module")
def address(serve, saved_models, pictures):
    models = [saved_models / name for name in ("classifier", "detector")]
    return serve(*models, max_pixels=10**6, max_file_size="1mb", examples=[pictures / "other.jpg"]).local_url


@pytest.fixture
def page(browser, address):
    """The page, opened; in the end it must have asked nobody but its own server and logged no error."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    asked, faults = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(address)
    page.locator("#look").wait_for(timeout=WAIT)
    yield page
    context.close()
    strangers = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert strangers == []
    assert faults == []


def upload(page, path):
    page.locator("#upload input[type=file]").set_input_files(path)


def test_a_picture_its_classes_and_its_places(page, pictures):
    upload(page, pictures / "photo.png")
    heading = page.locator("[data-testid=label-output-value]")
    heading.wait_for(timeout=WAIT)
    best = heading.inner_text().strip()
    assert page.locator("[data-testid$=-confidence-set]").count() == 5
    picture = page.locator("#picture img")
    picture.wait_for(timeout=WAIT)
    assert picture.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [600, 360]
    page.locator("#note").get_by_text(f"Grad-CAM for “{best}”").wait_for(timeout=WAIT)

    # Another class: another picture.
    before = picture.get_attribute("src")
    page.locator("#classes input[type=radio]").nth(2).check()
    changed = "before => document.querySelector('#picture img')?.getAttribute('src') !== before"
    page.wait_for_function(changed, arg=before, timeout=WAIT)

    # Another model: boxes and a table in the place of classes.
    page.locator("#model input").click()
    page.get_by_role("option", name="detector").click()
    page.locator("#note").get_by_text("found with a score of at least").wait_for(timeout=WAIT)
    assert not heading.is_visible()


def test_an_example(page):
    page.locator(".gallery button, [data-testid=dataset] button, .gallery-item").first.click()
    page.locator("[data-testid=label-output-value]").wait_for(timeout=WAIT)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken.png", "not an image in a format that Pillow knows"),
        ("cut.jpg", "truncated"),
        ("bomb.png", "more than the limit of 1000000"),
    ],
)
def test_a_file_that_cannot_be_used_gives_a_message(page, pictures, name, message):
    upload(page, pictures / name)
    toast = page.locator("[data-testid=toast-body]")
    toast.wait_for(timeout=WAIT)
    text = toast.inner_text()
    assert message in text
    assert "Traceback" not in text
    assert 'File "' not in text
    # The page is still of use.
    upload_again = page.get_by_label("Remove Image").or_(page.get_by_label("Clear"))
    if upload_again.count():
        upload_again.first.click()
    upload(page, pictures / "photo.png")
    page.locator("[data-testid=label-output-value]").wait_for(timeout=WAIT)
