"""The report in Chromium, at the widths of a phone and of a desk, light and dark: nothing is cut, and markers tell their numbers."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from moe_prism.frontier import DecodeTime, DomainQuality
from moe_prism.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
STANDING = ("top-1", "top-2", "top-3", "int8", "int4")
VIEWS = {"phone": (390, "light"), "wide": (1280, "light"), "dark": (1280, "dark"), "dark phone": (390, "dark")}
BOXES = """() => [...document.querySelectorAll('figure svg')].filter((svg) => svg.getBoundingClientRect().width).map((svg) => {
  const box = (e) => { const r = e.getBoundingClientRect(); return [r.left, r.right, r.top, r.bottom]; };
  return { svg: box(svg), texts: [...svg.querySelectorAll('text')].map((t) => [t.textContent, box(t)]),
           labels: [...svg.querySelectorAll('.role-legend-label text')].map(box),
           bars: [...svg.querySelectorAll('.mark-rule.role-mark line')].map(box),
           symbols: [...svg.querySelectorAll('.role-legend-symbol path')].map(box) };
})"""

WHOLE_TABLES = "[...document.querySelectorAll('.scroll')].every((card) => card.scrollWidth <= card.clientWidth)"


def measured(frontier):
    """The frontier with a time and three domains at every point."""

    def more(point):
        time = DecodeTime(1, 2 + 3 * point.budget, 1.9 + 3 * point.budget, 2.2 + 3 * point.budget, 0.5 + 0.5 * point.budget, 9)
        slices = (("python", 0.8), ("prose", 1.3), ("web", 0.9))
        domains = {name: DomainQuality(point.ppl * s, point.kl * s, point.top1_agreement) for name, s in slices}
        return replace(point, time=time, domains=domains, resident_expert_bytes=19e6)

    return replace(frontier, points=tuple(map(more, frontier.points)), baseline_topk=tuple(map(more, frontier.baseline_topk)))


def overlap(one, two):
    return one[0] < two[1] - 1 and two[0] < one[1] - 1 and one[2] < two[3] - 1 and two[2] < one[3] - 1


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_in_a_browser(frontier, tmp_path):
    browsers = pytest.importorskip("playwright.sync_api")
    write_report(measured(frontier), tmp_path / "report.html")
    with browsers.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name, (width, scheme) in VIEWS.items():
            view = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            view.set_default_timeout(120_000)
            problems: list[str] = []
            view.on("pageerror", lambda e, found=problems: found.append(str(e)))
            view.goto((tmp_path / "report.html").as_uri())
            assert view.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), name
            assert width < 1280 or view.evaluate(WHOLE_TABLES), f"{name}: a table is wider than its card"
            for figure in view.evaluate(BOXES):
                left, right, _, _ = figure["svg"]
                note = [box for text, box in figure["texts"] if text.startswith("full model")]
                assert note and not any(overlap(box, bar) for box in note for bar in figure["bars"]), (
                    f"{name}: a bar runs through it"
                )
                for text, box in figure["texts"]:
                    assert left - 1 <= box[0] and box[1] <= right + 1, f"{name}: '{text}' is cut"
                points = [(text, box) for text, box in figure["texts"] if text in STANDING or text.startswith("K=")]
                for i, (text, box) in enumerate(points):
                    touched = [other for other, place in points[:i] if overlap(box, place)]
                    assert not touched, f"{name}: '{text}' is written over {touched}"
                assert points and figure["labels"] and figure["symbols"]
                for label in figure["labels"]:
                    assert not any(overlap(label, symbol) for symbol in figure["symbols"]), (
                        f"{name}: the legend runs into a marker"
                    )
            view.locator(".mark[aria-label='product-8']").locator("visible=true").first.hover()
            told = view.locator("#tip").text_content()
            assert all(words in told for words in ("product-8", "KL 0.0240", "3.50 ms", "19.0 MB", "worst domain prose")), told
            assert view.locator("tr[data-point='product-8'].on").count() >= 2 and not problems
            tip, frame = (view.locator(s).first.bounding_box() for s in ("#tip", "figure:has(#tip)"))
            assert frame["x"] <= tip["x"] and tip["x"] + tip["width"] <= frame["x"] + frame["width"] + 1
            view.screenshot(path=tmp_path / f"{name}.png", full_page=True)
            view.close()
        plain = browser.new_context(java_script_enabled=False).new_page()
        plain.goto((tmp_path / "report.html").as_uri())
        rows = plain.locator("section[aria-labelledby=points] tbody tr").all_text_contents()
        assert len(rows) == len(frontier.points) and all(any(p.name in row.split() for row in rows) for p in frontier.points)
        browser.close()
