"""The status page: its numbers, its headers, and the page itself in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import httpx2
import pytest

from moe_prism.point import FULL
from moe_prism.schedule import Ladder, Level
from moe_prism.serve.backend import Tally
from moe_prism.serve.engine.scheduler import PackedStep, StepPart
from moe_prism.serve.http.metrics import Metrics
from moe_prism.serve.http.status import SECONDS, History, page
from tests.serve.house import open_house

LADDER = Ladder((Level("low", FULL.with_budget(0.5), 4.0, 0.8), Level("full", FULL, 8.0, 1.0)))
GAPS = """() => {
  const cards = [...document.querySelectorAll("body > section, body > .grid")].map((e) => e.getBoundingClientRect());
  const shown = cards.filter((box) => box.height);
  return shown.slice(1).map((box, i) => box.top - shown[i].bottom);
}"""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def step(seconds: float, *parts: tuple[int, int, bool]) -> Tally:
    """Parts of (tokens, level, yields)."""
    return PackedStep([StepPart(None, None, 0, tokens, level, not yields, yields) for tokens, level, yields in parts]).tally(
        seconds
    )


def test_a_second_adds_its_steps_up():
    now = [0.0]
    history = History(LADDER, lambda: now[0])
    history.observe(step(0.1, (3, 0, False)))
    history.observe(step(0.2, (1, 1, True)))
    now[0] = 2.5
    history.observe(step(0.1, (1, 1, True), (1, 0, True)))
    first, second = history.recent()
    assert (first["at"], first["steps"], first["tokens"], first["generated"]) == (0, 2, 4, 1)
    assert first["quality"] == pytest.approx((3 * 0.8 + 1) / 4) and first["slots"] == pytest.approx((3 * 4 + 8) / 4)
    assert first["busy"] == pytest.approx(0.3)
    assert (second["at"], second["tokens"], second["quality"]) == (2, 2, pytest.approx(0.9))


def test_history_is_bounded_and_forgets():
    now = [0.0]
    history = History(LADDER, lambda: now[0])
    for second in range(2 * SECONDS):
        now[0] = float(second)
        history.observe(step(0.01, (1, 0, True)))
    assert len(history.recent()) == SECONDS
    now[0] = 10.0 * SECONDS
    assert history.recent() == []


def test_scripts_run_by_their_hash_only():
    text, headers = page()
    policy = headers["content-security-policy"]
    assert "unsafe" not in policy and policy.count("'sha256-") == 2
    assert (
        len(re.findall("<script", text)) == 1
        and "innerHTML" not in text
        and "http://" not in text.replace("http://www.w3.org", "")
    )


def test_snapshot(house):
    with httpx2.Client(base_url=house.root, timeout=30) as web:
        web.post("/v1/completions", json={"prompt": "def f", "max_tokens": 3, "quality": "low", "ttft_ms": 60_000})
        found = web.get("/status.json").json()
    assert [level["name"] for level in found["levels"]] == ["low", "half", "full"]
    assert found["seconds"][-1]["tokens"] > 0 and 2.0 <= found["seconds"][-1]["slots"] <= 8.0
    assert found["queues"]["standard"] == {"waiting": 0, "running": 0}
    assert found["targets"]["standard"]["ttft"] == {"met": 1, "missed": 0} and found["chat"] is False
    for what in ("ttft", "tpot"):
        latency = found["latency"]["standard"][what]
        assert 0 < latency["p50"] <= latency["p95"]
    assert found["latency"]["batch"] == {"ttft": None, "tpot": None}


def test_percentiles_are_of_the_last_requests_of_a_class():
    metrics = Metrics("m", ["standard"], LADDER)
    assert metrics.percentiles("ttft", "standard") is None
    for i in range(1, 1001):
        metrics.remember("ttft", "standard", i / 1000)
    assert metrics.percentiles("ttft", "standard") == {"p50": 744.0, "p95": 975.0}
    metrics.remember("tpot", "standard", 0.25)
    assert metrics.percentiles("tpot", "standard") == {"p50": 250.0, "p95": 250.0}


def test_every_metric_of_the_dashboard_exists():
    board = json.loads((Path(__file__).parents[2] / "docs" / "grafana.json").read_text())
    metrics = Metrics("m", ["standard"], LADDER)
    metrics.target("standard", "ttft", True)
    text = metrics.text().decode()
    asked = {name for panel in board["panels"] for t in panel["targets"] for name in re.findall(r"moe_prism:\w+", t["expr"])}
    assert len(asked) > 10 and all(re.search(rf"^{name}\b", text, re.MULTILINE) for name in asked)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_in_a_browser(tiny_levels, tmp_path):
    """Key asked for, charts drawn, one prompt answered at three qualities, nothing on the console."""
    browsers = pytest.importorskip("playwright.sync_api")
    with open_house(tiny_levels, api_key="secret") as house, browsers.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": 1100, "height": 1300})
        problems: list[str] = []
        view.on("console", lambda m: problems.append(m.text) if m.type == "error" and "401" not in m.text else None)
        view.on("pageerror", lambda e: problems.append(str(e)))
        view.goto(house.root + "/status")
        view.wait_for_selector("#ask-key", state="visible")
        view.fill("#key", "secret")
        view.locator("#state", has_text="3 operating points").wait_for()
        view.fill("#prompt", "def main():")
        view.fill("#count", "12")
        view.click("#compare")
        view.locator("#answers p", has_text="12 tokens").nth(2).wait_for()
        view.locator("#slider").fill("0")
        view.click("#send")
        view.locator(".answered p", has_text="low, quality 0.800: 12 tokens").wait_for()
        assert view.locator(".asked pre").text_content() == "def main():" and view.input_value("#prompt") == ""
        view.click("#send")  # an empty prompt goes on with what was said
        view.locator(".answered p", has_text="12 tokens").nth(1).wait_for()
        assert view.locator("h1").text_content().startswith("moe-prism ") and view.title().endswith(" - moe-prism")
        view.locator("#latency td", has_text=re.compile(r"^[0-9.]+, [0-9.]+$")).nth(1).wait_for()
        for chart, line in (("quality", "first"), ("slots", "other"), ("rate", "first")):
            view.locator(f"#{chart}-chart .{line}[d*=h1]").wait_for(state="attached")
        assert view.locator("#quality-scale span").all_text_contents() == ["1", "0.9", "0.8"]
        assert view.locator("#slots-scale span").all_text_contents() == ["8", "4", "0"]
        assert view.locator(".time").all_text_contents() == ["5 min ago2.5 minnow"] * 3
        assert view.locator("#answers h2").all_text_contents() == [
            "low, quality 0.800",
            "half, quality 0.900",
            "full, quality 1.000",
        ]
        assert view.locator("#queues tr").count() == len(house.built.service.config.classes)
        assert view.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        view.set_viewport_size({"width": 380, "height": 800})
        assert view.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        heights = "[...document.querySelectorAll('#targets td')].map((cell) => cell.offsetHeight)"
        shown = "met({ met: 5, missed: 0 })"
        view.evaluate(f"table('targets', [['interactive', {shown}, {shown}], ['batch', '-', '-']])")
        assert len(set(view.evaluate(heights))) == 1, "a share is broken into two lines"
        view.set_viewport_size({"width": 1100, "height": 1300})
        view.screenshot(path=tmp_path / "status.png")
        assert (tmp_path / "status.png").stat().st_size > 20_000 and problems == []
        for name, width, scheme in (("phone", 390, "light"), ("wide", 1280, "light"), ("dark", 1280, "dark")):
            view.set_viewport_size({"width": width, "height": 900})
            view.emulate_media(color_scheme=scheme)
            assert view.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), name
            assert min(view.evaluate(GAPS)) >= 8, f"{name}: two cards touch"
            view.screenshot(path=tmp_path / f"{name}.png", full_page=True)
        view.click("#clear")
        assert view.locator(".turn").count() == 0
        browser.close()
