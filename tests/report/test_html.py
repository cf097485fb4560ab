from __future__ import annotations

import builtins
import json
import re
import subprocess
import sys
import zlib
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from moe_prism.errors import UsageError
from moe_prism.frontier import DecodeTime, Frontier
from moe_prism.report import chart, write_png, write_report
from moe_prism.report.html import render
from moe_prism.report.summary import duels, full_bytes, main_rule, sentences

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>&"
LINES = "\u2028\u2029"  # no name may hold them; a text may
SAMPLE = {"budget": 0.5, "prompt": "def f(", "text": "x):\n    return x", "tokens_per_s": 41.26}


class Page(HTMLParser):
    """Tags, headings, table rows and scripts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.rows, self.scripts, self._script = [], [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *a) for a in attrs]
        self._script = tag == "script"
        if self._script:
            self.scripts.append("")
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        self._script = False

    def handle_data(self, data):
        if self._script:
            self.scripts[-1] += data
        elif self.rows and data.strip():
            self.rows[-1].append(data.strip())


@pytest.fixture(scope="module")
def text(frontier) -> str:
    return render(frontier, {"samples": [SAMPLE], "notes": ["a note"]})


def test_page_is_one_offline_file(text, frontier, tmp_path):
    addresses = set(re.findall(r"[a-z]+://[^\s\"'<)]+", text))
    assert all(a.startswith("http://www.w3.org/") for a in addresses)
    page = Page(text)
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    assert not [a for a in page.attributes if a[1] in ("src", "href") or a[1].startswith("on")]
    assert "url(" not in text and "@import" not in text
    write_report(frontier, tmp_path / "report.html")
    assert "Generated text" not in (tmp_path / "report.html").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").stat().st_size < 2_000_000


def test_tables_hold_every_point_and_fact(text, frontier):
    rows = {row[0]: row for row in Page(text).rows if row}
    for point in frontier.points:
        row = rows[point.name]
        assert row[1:4] == [point.rule, f"{point.budget:.3f}", f"{point.k_slots:g}"]
        assert float(row[4]) == pytest.approx(point.kl, abs=5e-5)
        assert float(row[5]) == pytest.approx(point.ppl, abs=5e-4)
        assert float(row[7]) == pytest.approx(100 * point.active_expert_bytes / full_bytes(frontier), abs=0.0501)
        assert float(row[8]) == pytest.approx(point.active_expert_bytes / 1e6, abs=5e-4)
    assert rows["top-2"][1:4] == ["0.0395", "0.0240", "product-8"]
    assert rows["evaluation.tokens"][1] == "65536"
    assert text.count('<tr class="kept"') == sum(p.pareto for p in (*frontier.points, *frontier.baseline_topk))


def test_page_is_accessible(text):
    page = Page(text)
    levels = [int(tag[1]) for tag in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))  # noqa: RUF007 - plain to read
    labels = [value for tag, key, value in page.attributes if tag == "figure" and key == "aria-label"]
    assert len(labels) == 2 and all("0.0240" in label for label in labels)
    assert page.tags.count("table") == page.tags.count("caption") == 3


def test_the_same_frontier_gives_the_same_bytes(text, frontier):
    assert render(frontier, {"samples": [SAMPLE], "notes": ["a note"]}) == text


def test_hostile_names_stay_text(frontier):
    evil = [replace(p, name=EVIL + p.name, rule=EVIL) for p in frontier.points]
    plain = tuple(replace(p, name=EVIL + p.name) for p in frontier.baseline_topk)
    hostile = Frontier(EVIL, EVIL, 4, tuple(evil), plain, {EVIL: EVIL})
    text = render(hostile, {"samples": [dict(SAMPLE, prompt=EVIL, text=EVIL + LINES)], "notes": [EVIL + LINES]})
    page = Page(text)
    assert page.tags.count("script") == 2 and "img" not in page.tags
    assert Frontier.from_json(json.loads(page.scripts[0])) == hostile


def test_json_block_parses_back_equal(text, frontier):
    assert Frontier.from_json(json.loads(Page(text).scripts[0])) == frontier


def test_samples_and_notes(text, frontier):
    assert "41.3 tokens/s" in text and "a note" in text
    with pytest.raises(UsageError, match=r"samples\[0\] has no 'text'"):
        render(frontier, {"samples": [{"budget": 1.0, "prompt": ""}]})
    with pytest.raises(UsageError, match="no section 'note'"):
        render(frontier, {"note": []})


def test_every_cost_has_its_unit(frontier):
    held = replace(frontier, points=tuple(replace(p, resident_expert_bytes=2e9) for p in frontier.points))
    heads = dict(re.findall(r"<th scope=\"col\">([\w ]+) <small>([^<]+)</small>", render(held)))
    assert heads["Expert bytes"] == "MB per token" and heads["FLOPs"] == "M per token"
    assert heads["Resident experts"] == "GB"  # of the model, not of a token


def test_sentences_say_what_was_measured(frontier):
    said = " ".join(sentences(frontier)).replace("\u00a0", " ")
    assert "At half the expert bytes KL is 0.0240, plain top-2 costs 0.0395." in said
    assert "at 3 of 3 plain top-k prices" in said
    worse = replace(frontier, points=tuple(replace(p, kl=p.kl * 10) for p in frontier.points))
    assert "at 0 of 3 plain top-k prices" in " ".join(sentences(worse))
    dear = replace(worse, points=worse.points[-1:])
    assert [d.best for d in duels(dear)] == [None] * 3
    page = render(replace(worse, points=worse.points[12:13] + worse.points[8:9]))  # product-16 and product-12
    assert 'class="lose"' in page and "none at this price" in page
    assert main_rule(frontier) == "product"


def test_kl_chart_specification(frontier):
    spec = chart.kl_chart(frontier).to_dict()
    points = next(layer for layer in spec["layer"] if layer["mark"]["type"] == "point")
    encoding = points["encoding"]
    assert encoding["y"]["scale"]["type"] == "log" and encoding["y"]["field"] == "kl"
    assert encoding["x"]["title"] == "Expert weights read per token, % of the full model"
    assert encoding["color"]["scale"]["domain"] == ["sub-experts, product", "plain top-k", "sub-experts, pattern"]
    assert encoding["shape"]["scale"]["range"] == ["circle", "triangle-up", "square"]
    rows = chart.rows(frontier)
    low, high = encoding["y"]["scale"]["domain"]
    assert len(rows) == len(frontier.points) + len(frontier.baseline_topk)
    assert all(low < row["kl"] < high for row in rows)
    assert [row["below"] for row in rows if row["below"]] == ["K=4", "K=8", "K=12"]


def test_charts_of_odd_frontiers(frontier):
    lone = replace(frontier, points=frontier.points[-1:], baseline_topk=())
    steep = replace(frontier, baseline_topk=(replace(frontier.baseline_topk[0], kl=9.0, ppl=4e4),))
    for odd in (lone, steep):
        assert "top-1" not in chart.svg(chart.kl_chart(odd))
        assert "<svg" in chart.svg(chart.ppl_chart(odd))
    assert chart.ppl_chart(steep).to_dict()["layer"][0]["encoding"]["y"]["scale"]["type"] == "log"


def timed(frontier):
    """The frontier with times that follow the price, and none for the last point."""

    def at(point):
        share = point.budget
        return replace(point, time=DecodeTime(8, 10 + 5 * share, 9 + 5 * share, 12 + 5 * share, 0.4 + 0.6 * share, 9))

    points = (*map(at, frontier.points[:-1]), frontier.points[-1])
    facts = {"device": "CPU, AVX2", "stock": {"ms_per_token": 15.0}}
    return replace(
        frontier,
        points=points,
        baseline_topk=tuple(map(at, frontier.baseline_topk)),
        provenance={**frontier.provenance, "time": facts},
    )


def test_times_have_a_chart_columns_and_a_sentence_and_only_where_they_are(frontier):
    with_times, without = render(timed(frontier)), render(frontier)
    assert without.count("<figure") == 2 and with_times.count("<figure") == 3
    assert "Milliseconds per token while 8 sequences" in with_times and "Milliseconds" not in without
    assert "Decoding took 15 ms per token with the full stock model" in with_times and "plain top-2 0.70" in with_times
    rows = [row for row in Page(with_times).rows if row and row[0] == "top-2"]
    assert rows and all(row[row.index("50.0") + 1 :][:3] == ["12.50", "11.50 to 14.50", "0.70"] for row in rows)
    last = frontier.points[-1].name
    assert next(row for row in Page(with_times).rows if row and row[0] == last).count("-") == 2
    drawn = json.dumps(chart.time_chart(timed(frontier)).to_dict())
    assert f'"name": "{last}"' not in drawn and '"name": "top-2"' in drawn and '"name": "product-4"' in drawn


def test_png_is_small_and_whole(frontier, tmp_path):
    write_png(frontier, tmp_path / "frontier.png")
    data = (tmp_path / "frontier.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) <= 200_000
    at = data.index(b"IDAT")
    size = int.from_bytes(data[at - 4 : at], "big")
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert len(zlib.decompress(data[at + 4 : at + 4 + size])) == height * (4 * width + 1)


def test_an_empty_frontier_is_refused(frontier, tmp_path):
    for write in (write_report, write_png):
        with pytest.raises(UsageError, match="no operating points"):
            write(replace(frontier, points=()), tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["altair", "vl_convert", "jinja2"])
def test_without_the_extra(missing, frontier, tmp_path, monkeypatch):
    real = builtins.__import__

    def blocked(name, *args, **kwargs):
        if name == missing:
            raise ImportError(name, name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(UsageError, match=rf"{missing}.*pip install 'moe-prism\[report\]'"):
        write_report(frontier, tmp_path / "report.html")


def test_importing_the_package_is_cheap():
    heavy = ("altair", "jinja2", "vl_convert", "torch", "markupsafe")
    code = f"import sys, moe_prism.report; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_tasks_stand_in_the_report_with_their_errors(frontier, tmp_path):
    from moe_prism.frontier.evaluation import Evaluated, Evaluation, Score
    from moe_prism.jobs.frontier_files import add_tasks, write_frontier
    from moe_prism.point import FULL

    scores = (Score("arc", "acc", 0.62, 0.0485, True, 100), Score("<b>own</b>", "f1", 0.5, None, True, 3))
    found = Evaluation("m", (Evaluated("full", FULL, scores),), {})
    assert not add_tasks(tmp_path)
    write_frontier(frontier, tmp_path)
    assert "lm-eval" not in (tmp_path / "report.html").read_text()
    (tmp_path / "eval.json").write_bytes(found.encoded())
    assert add_tasks(tmp_path)
    rows = [row[:3] for row in Page((tmp_path / "report.html").read_text()).rows]
    assert ["arc", "acc", "0.6200 ± 0.0485"] in rows and ["<b>own</b>", "f1", "0.5000"] in rows
