"""Our pages in a real browser."""

from pathlib import Path

OVERFLOWING = """() => [...document.querySelectorAll('body *')].filter(e => {
    const box = e.getBoundingClientRect();
    return box.right > innerWidth + 0.5 || box.left < -0.5
        || (getComputedStyle(e).display != 'inline' && e.scrollWidth > e.clientWidth + 1);
}).map(e => e.tagName + ' ' + e.textContent.slice(0, 60))"""


def opens_well(page_text: str, folder: Path, chromium: str, width: int) -> None:
    """A page shows everything in a window of so many pixels: no requests, errors, broken pictures or cut-off parts."""
    from playwright.sync_api import sync_playwright

    (folder / "page.html").write_text(page_text)
    asked: list[str] = []
    said: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(f"file://{folder}/page.html")
        for summary in page.locator("summary").all():
            summary.click()
        broken = page.evaluate("[...document.images].filter(i => !i.naturalWidth).length")
        overflowing = page.evaluate(OVERFLOWING)
        browser.close()

    assert [url for url in asked if not url.startswith("data:")] == [f"file://{folder}/page.html"]
    assert said == []
    assert broken == 0
    assert overflowing == []
