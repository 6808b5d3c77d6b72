"""The page at `/`, in a real Chromium: what a person does there, by mouse and by keyboard."""

import base64
import json
import shutil

import pytest
from PIL import Image

from examples import exhaustive

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")

FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync"
)
PATIENCE = 240_000  # milliseconds; the tests' machine may be busy
PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """Open the page of a server; nothing may go wrong in its console, nor be asked elsewhere."""
    contexts, said = [], []

    def open_page(url, width=1200, height=900, quiet=True, ready="html[data-ready]", **more):
        context = browser.new_context(viewport={"width": width, "height": height}, **more)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        if quiet:
            page.on("console", lambda m: m.type == "error" and said.append(m.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on(
            "request", lambda r: r.url.startswith((url, "data:", "blob:")) or said.append(r.url)
        )
        page.goto(url)
        page.wait_for_selector(ready)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not said


def fill(page, prompt=PROMPT, steps=4, seed=7):
    page.fill("#prompt", prompt)
    page.select_option("#size", "256")
    page.fill("#steps", str(steps))
    page.fill("#seed", str(seed))


def done(page):
    page.wait_for_selector("#go:not([disabled])")
    return page.inner_text("#status")


def test_an_image_forms_and_joins_the_gallery(served, opened, tmp_path):
    page = opened(served.url)
    estimates = page.evaluate_handle(
        """() => {
          const seen = [];
          new MutationObserver(() => {
            const image = document.querySelector("#view img");
            if (image) seen.push(image.dataset.kind);
          }).observe(document.getElementById("view"), { childList: true });
          return seen;
        }"""
    )
    fill(page)
    page.keyboard.press("Control+Enter")
    assert done(page) == "Done, seed 7."
    page.wait_for_selector("#view img[data-kind=image]")
    assert "estimate" in estimates.json_value()
    image = page.get_attribute("#view img", "src").partition("base64,")[2]
    told = served.draw(prompt=PROMPT, steps=4).json()["data"][0]
    assert image == told["b64_json"]
    first = page.locator("#gallery li").first
    assert PROMPT in first.inner_text()
    with page.expect_download() as download:
        first.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == "a-red-circle-on-a-blue-background-7.png"
    assert download.value.path().read_bytes() == base64.b64decode(told["b64_json"])


def test_a_recipe_is_reused_copied_and_forgotten(served, opened):
    served.draw(prompt="a blue star", negative_prompt="red", steps=2, seed=5)
    page = opened(served.url, permissions=["clipboard-read", "clipboard-write"])
    card = page.locator("#gallery li", has_text="a blue star").first
    card.get_by_role("button", name="Reuse").click()
    names = ("prompt", "negative", "steps", "guidance", "seed", "size")
    values = {name: page.input_value(f"#{name}") for name in names}
    assert values == {
        "prompt": "a blue star",
        "negative": "red",
        "steps": "2",
        "guidance": "4.5",
        "seed": "5",
        "size": "256",
    }
    card.get_by_role("button", name="Command").click()
    page.wait_for_selector("text=Copied")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith("sana generate 'a blue star' --negative red --model demo")
    before = page.locator("#gallery li").count()
    card.get_by_role("button", name="Forget").click()
    served.until(lambda: page.locator("#gallery li").count() < before)
    assert not any(
        one["recipe"]["prompt"] == "a blue star" and one["recipe"]["seed"] == 5
        for one in served.client.get("/v1/images").json()["data"]
    )


def test_cancel_stops_the_job(served, opened):
    page = opened(served.url)
    fill(page, steps=1000)
    page.click("#go")
    served.until(lambda: page.evaluate("document.getElementById('progress').value") > 0)
    page.keyboard.press("Escape")
    assert done(page) == "Cancelled."
    served.until(lambda: not served.jobs())


@pytest.mark.parametrize("by", ["mouse", *exhaustive("keyboard")])
def test_a_mask_is_painted_on_an_image(served, opened, tmp_path, by):
    Image.new("RGB", (256, 256), (30, 60, 200)).save(tmp_path / "in.png")
    page = opened(served.url)
    page.set_input_files("#file", tmp_path / "in.png")
    page.wait_for_selector("#edit:not([hidden])")
    page.fill("#brush", "64")
    if by == "mouse":
        box = page.locator("#paint").bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 4)
        page.mouse.down()
        page.mouse.up()
    else:
        page.focus("#paint")
        page.keyboard.press("ArrowUp")
        page.keyboard.press("ArrowUp")
        page.keyboard.press("Space")
    page.fill("#prompt", PROMPT)
    page.fill("#steps", "2")
    page.fill("#seed", "7")
    page.click("#go")
    assert done(page) == "Done, seed 7."
    data = page.get_attribute("#view img", "src").partition("base64,")[2]
    (tmp_path / "out.png").write_bytes(base64.b64decode(data))
    with Image.open(tmp_path / "out.png") as image:
        recipe = json.loads(image.text["sana"])["recipe"]
        assert recipe["mask"]
        assert recipe["strength"] == 1
        assert image.getpixel((128, 64)) != (30, 60, 200)
        assert image.getpixel((128, 240)) == (30, 60, 200)
        assert image.getpixel((10, 10)) == (30, 60, 200)


def test_the_token_is_asked_for_until_it_is_right(serving, opened):
    token = "correct-horse-battery-staple"
    with serving("-m", "demo", token=token) as served:
        page = opened(served.url, quiet=False, ready="#ask[open]")
        page.fill("#token", "something else")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=That is not the token")
        page.fill("#token", token)
        page.keyboard.press("Enter")
        page.wait_for_selector("html[data-ready]")
        assert page.input_value("#model") == "demo"
        fill(page, steps=1)
        page.click("#go")
        assert done(page) == "Done, seed 7."


def test_a_server_that_is_gone_is_said(serving, opened):
    with serving("-m", "demo") as served:
        page = opened(served.url, quiet=False)
        fill(page)
        assert served.stop() == 0
        page.click("#go")
        assert done(page).startswith("The server does not answer.")
        assert page.input_value("#prompt") == PROMPT


def test_an_error_of_the_server_is_shown(served, opened):
    page = opened(served.url, quiet=False)
    fill(page)
    page.fill("#negative", "green")
    page.fill("#guidance", "1")
    page.click("#go")
    assert "negative has no effect at guidance 1" in done(page)


@pytest.mark.parametrize("scheme", ["light", *exhaustive("dark")])
@pytest.mark.parametrize("width", [390, *exhaustive(1024, 1600)])
def test_nothing_is_wider_than_the_screen(served, opened, width, scheme):
    served.draw(prompt="word" * 80)
    page = opened(served.url, width=width, color_scheme=scheme)
    page.wait_for_selector("#gallery li")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Everything that is operated has a name, and can be reached by the keyboard.
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea, a, canvas")]
          .filter((one) => one.checkVisibility() && !one.hidden)
          .filter((one) => !one.textContent.trim() && !one.labels?.length
                           && !one.getAttribute("aria-label"))
          .map((one) => one.outerHTML)"""
    )
    assert unnamed == []
    seen = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id"))
    assert {"prompt", "negative", "model", "size", "steps", "guidance", "seed", "go"} <= seen
