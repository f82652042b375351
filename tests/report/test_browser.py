"""The report in a real browser: draws, reads, zooms, answers keys, fits a phone, and asks for nothing."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from orpo_lite.report import command
from tests.report.browser import CHROMIUM, Browser
from tests.report.conftest import evaluation, facts, log_lines, pairs

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium (.ci/run does)")
LONG = "a-very-long-name-without-any-place-to-break-" * 6


@pytest.fixture(scope="module")
def browser() -> Any:
    one = Browser()
    yield one
    one.close()


@pytest.fixture(scope="module")
def pages(written, tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("pages")
    plan = {"recipe": "mine", "model": "org/base-7B", "peak_bytes": 8_000_000_000, "needed_bytes": 9_000_000_000, "fullest_phase": "backward",
            "phases": {"forward": {"base weights": 5_000_000_000, "total": 5_000_000_000}, "backward": {"base weights": 8_000_000_000, "total": 8_000_000_000}},
            "assumed": {"margin": 1_000_000_000}, "measured": {"allocated_bytes": 7_900_000_000, "reserved_bytes": 8_100_000_000}}  # fmt: skip
    known = facts(plan=plan)
    known["data"]["sources"][LONG] = known["data"]["sources"]["org/pairs"] | {"path": LONG}
    known["samples"]["after"][0]["answer"] = f"Four. {LONG}"
    one, two = written(place / "one", known), written(place / "two", beta=0.2, name=LONG)
    broken = log_lines(300)
    broken[50]["loss"] = float("nan")
    three = written(place / "three", None, broken, None)
    few = facts(eval={"before": evaluation(0.75, 0.0, pairs=8), "after": evaluation(1.0, 0.2, pairs=8)}, plan=plan)
    few["base_model"] |= {
        "name_or_path": "builtin:some-folder/Meta-Llama-3.1-Instruct_v0.3",
        "facts": ["base: loaded so", "precision: some"],
    }
    three_pairs = {
        when: {side: values[:3] for side, values in logps.items()} for when, logps in pairs().items() if when != "beta"
    }
    four = written(place / "four", few, held=three_pairs)
    found = {"one": [one], "two": [one, two, three], "three": [three], "few": [four], "pair": [four, one]}
    for name, runs in found.items():
        command([str(run) for run in runs], output=place / f"{name}.html")
    return {name: place / f"{name}.html" for name in found}


SVG = "#chart-loss .plot > svg"


def legend(browser: Browser, chart: str = "loss") -> list[str]:
    return browser.run(f"[...document.querySelectorAll('#chart-{chart} .legend b')].map(e => e.textContent)")


def axis(browser: Browser, chart: str = "loss") -> list[float]:
    return [float(text.replace(",", "")) for text in browser.run(f"[...document.querySelectorAll('#chart-{chart} .plot > .x')].map(e => e.textContent)")]  # fmt: skip


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("name", ["one", "two", "three", "few", "pair"])
def test_draws_fits_and_asks_for_nothing(name, width, dark, pages, browser):
    browser.open(pages[name], width, dark=dark, touch=width < 500)
    assert not browser.complaints() and not browser.asked()
    inner, all_of_it = browser.run("[innerWidth, document.documentElement.scrollWidth]")
    assert inner == width and all_of_it <= width
    if name == "one" and width == 1280:
        # text on its ground, WCAG 2: every color that is written with
        worst = browser.run(CONTRAST)
        assert worst["ratio"] >= 4.5, worst
        ground = browser.run("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 150) is dark


CONTRAST = """(() => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => { const f = (v) => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; return .2126 * f(r) + .7152 * f(g) + .0722 * f(b); };
  let worst = {ratio: 99};
  for (const e of document.querySelectorAll('body *')) {
    if (e.closest('svg,button:disabled,style,script,.tip') || ![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
    let at = e, ground = [0, 0, 0, 0];
    while (at && !(ground.length < 4 || ground[3] > 0)) { ground = parse(getComputedStyle(at).backgroundColor); at = at.parentElement; }
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(ground)].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < worst.ratio) worst = {ratio, text: e.textContent.slice(0, 60), color: getComputedStyle(e).color, ground};
  }
  return worst;
})()"""


WORDS = """(() => {
  const broken = [], wide = document.documentElement.clientWidth, over = [];
  for (const tile of document.querySelectorAll('.tiles li, nav, h1, h2, h3, thead th, .legend, .option')) {
    const room = tile.clientWidth || tile.getBoundingClientRect().width;
    const walk = document.createTreeWalker(tile, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) for (const word of walk.currentNode.data.matchAll(/[\\p{L}\\p{N}%]+/gu)) {
      const range = document.createRange();
      range.setStart(walk.currentNode, word.index);
      range.setEnd(walk.currentNode, word.index + word[0].length);
      const lines = [...range.getClientRects()];
      if (new Set(lines.map((r) => Math.round(r.top))).size > 1 && lines.reduce((sum, r) => sum + r.width, 0) < room - 30) broken.push(word[0]);
    }
  }
  for (const e of document.querySelectorAll('body *:not(.sr)')) {
    if (e.closest('svg, details:not([open]) > :not(summary), .wide, .tip') || !e.getClientRects().length) continue;
    const box = e.getBoundingClientRect();
    if (box.right > wide + 1 || box.left < -1) over.push(e.tagName + '.' + e.className);
    if (!e.matches('.plot') && !['hidden', 'auto'].includes(getComputedStyle(e).overflowX) && e.scrollWidth > e.clientWidth + 1 && e.clientWidth) over.push('in ' + e.tagName + '.' + e.className);
  }
  return {broken, over};
})()"""
UNDER = """(() => {
  const found = [];
  const texts = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const inside = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || inside.closest('button, script, style, .sr, nav, details:not([open])')) continue;
    const range = document.createRange();
    range.selectNodeContents(walk.currentNode);
    for (const r of range.getClientRects()) texts.push([r, walk.currentNode.data]);
  }
  for (const button of document.querySelectorAll('button')) {
    const b = button.getBoundingClientRect();
    for (const [r, text] of texts) if (r.left < b.right - 1 && r.right > b.left + 1 && r.top < b.bottom - 1 && r.bottom > b.top + 1) found.push(text);
  }
  return found;
})()"""


@pytest.mark.parametrize("width", [320, 390, 768, 1280, 1920])
@pytest.mark.parametrize("name", ["one", "two", "three", "few", "pair"])
def test_words_stay_whole_and_uncovered_and_the_width_is_used(name, width, pages, browser):
    browser.open(pages[name], width, touch=width < 500)
    assert browser.run(WORDS) == {"broken": [], "over": []}
    assert not browser.run(UNDER)
    unclear = "[...document.querySelectorAll('.plot')].filter(p => { const all = [...p.querySelectorAll(':scope > .y')].map(e => e.textContent); return new Set(all).size < all.length; }).length"
    assert not browser.run(unclear)  # no number twice on an axis, as 0.5 pairs would be 0 or 1
    browser.run("document.querySelectorAll('.tools button:first-child:enabled').forEach(e => e.click())")
    assert not browser.run(unclear)
    # no heading has its unit, or any word, twice
    for text in browser.run(
        "[...document.querySelectorAll('h1,h2,h3,.tiles span,figcaption,.legend li')].map(e => e.innerText)"
    ):
        assert not re.search(r"\\b([a-z]{3,})\\s+\\1\\b", text), text
    if width >= 1280:
        rows = browser.run("[...document.querySelectorAll('.tiles,.charts,.facts,section>.wide>table,.sample,h2')].map(e => {"
                           "const kids = e.matches('.tiles,.charts') ? [...e.children].map(c => c.getBoundingClientRect()) : [e.getBoundingClientRect()];"
                           "const ends = {}; kids.forEach(k => ends[Math.round(k.top)] = Math.max(ends[Math.round(k.top)] || 0, k.right));"
                           "return [e.className || e.tagName, Object.values(ends)]})")  # fmt: skip
        edge = browser.run("document.querySelector('main').getBoundingClientRect().right")
        assert rows and not [(what, end) for what, ends in rows for end in ends if abs(end - edge) > 2], (rows, edge)
        assert edge > 0.95 * min(width, 1760) and browser.run("document.querySelector('main').clientWidth") > 0.75 * min(width, 1760)  # fmt: skip


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["one", "pair"])
def test_contents_lead_to_every_section_from_anywhere(name, width, pages, browser):
    browser.open(pages[name], width, 844, touch=width < 500)
    links = browser.run("[...document.querySelectorAll('nav a')].map(e => [e.hash.slice(1), e.innerText])")
    assert [target for target, _ in links] == browser.run("[...document.querySelectorAll('h2[id]')].map(e => e.id)")
    assert len(links) > 4 and all(text for _, text in links)
    for target, _ in reversed(links):  # each from where the one before has led
        spot = browser.run(f"(() => {{const b = document.querySelector('nav a[href=\"#{target}\"]').getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2, b.height]}})()")  # fmt: skip
        assert 0 < spot[0] < width and 0 < spot[1] < 844 and spot[2] >= 24, target  # seen, and as large as a finger
        browser.mouse("Pressed", spot[0], spot[1], button="left", clickCount=1)
        browser.mouse("Released", spot[0], spot[1], button="left", clickCount=1)
        top, bar, left = browser.run(f"(() => {{const n = document.querySelector('nav').getBoundingClientRect(); return [document.getElementById('{target}').getBoundingClientRect().top, n.right < 300 ? 0 : n.bottom, document.documentElement.scrollHeight - innerHeight - scrollY]}})()")  # fmt: skip
        assert bar <= top < 844 and (top < bar + 100 or left < 2), (
            target
        )  # not behind the bar; at its top, or the page ends
    assert not browser.complaints()


def test_contents_work_in_a_frame_of_a_notebook(pages, browser, tmp_path):
    frame = tmp_path / "frame.html"
    page = html.escape(pages["one"].read_text("utf-8"))
    frame.write_text(
        f"<!doctype html><title>notebook</title><iframe srcdoc=\"{page}\" style='width:100%;height:600px'></iframe>",
        "utf-8",
    )
    browser.open(frame, 900)
    inside = "document.querySelector('iframe').contentWindow"
    browser.run(f"{inside}.document.querySelector('nav a:last-child').click()")
    assert browser.run(f"{inside}.document.title").startswith("ORPO run") and browser.run(f"{inside}.scrollY") > 500


def test_hovering_shows_the_values_under_the_mouse(pages, browser):
    browser.open(pages["one"])
    rest = legend(browser)
    box = browser.box(SVG)
    browser.mouse("Moved", box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tip = browser.run(
        "document.querySelector('#chart-loss .tip').hidden ? '' : document.querySelector('#chart-loss .tip').innerText"
    )
    step = int(re.search(r"optimizer step (\d+)", tip)[1])  # type: ignore[index]
    assert 14 <= step <= 16
    wanted = next(line for line in log_lines(30) if line["step"] == step)
    shown = float(re.search(r"ORPO loss\s+([-\d.]+)", tip)[1])  # type: ignore[index]
    assert shown == pytest.approx(wanted["loss"], abs=1e-3)
    assert legend(browser) != rest
    # charts over the same steps read along
    assert float(legend(browser, "margin")[0]) == pytest.approx(wanted["rewards/margins"], rel=1e-3)
    browser.mouse("Moved", 2, 2)
    assert legend(browser) == rest and browser.run("document.querySelector('#chart-loss .tip').hidden")
    assert not browser.complaints()


def test_dragging_zooms_and_a_double_click_shows_all(pages, browser):
    browser.open(pages["one"])
    before, drawn = axis(browser), browser.run("document.querySelector('#chart-loss .plot .line').getAttribute('d')")
    box = browser.box(SVG)
    browser.drag(box["x"] + box["width"] * 0.25, box["x"] + box["width"] * 0.5, box["y"] + 50)
    zoomed = axis(browser)
    assert (
        min(zoomed) >= 6
        and max(zoomed) <= 17
        and browser.run("document.querySelector('#chart-loss .plot .line').getAttribute('d')") != drawn
    )
    assert axis(browser, "margin") == zoomed  # the same steps
    assert max(axis(browser, "margins")) < 5  # a histogram has its own axis
    for count in (1, 2):
        browser.mouse("Pressed", box["x"] + 50, box["y"] + 50, button="left", clickCount=count)
        browser.mouse("Released", box["x"] + 50, box["y"] + 50, button="left", clickCount=count)
    assert axis(browser) == before
    browser.run("document.querySelector('#chart-margins .tools button').click()")
    assert axis(browser, "margins") and not browser.complaints()


def test_keys_read_zoom_and_reset(pages, browser):
    browser.open(pages["one"])
    before = axis(browser)
    for _ in range(300):
        browser.key("Tab")
        if browser.run("document.activeElement.matches('#chart-loss .plot > svg')"):
            break
    assert browser.run("document.activeElement.matches('#chart-loss .plot > svg')"), "not reached with Tab"
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") != "none"
    said = "document.querySelector('[role=status]').textContent"
    browser.key("Home")
    browser.key("ArrowRight")
    assert re.match("optimizer step 1, ORPO loss [0-9.]+, NLL per token", browser.run(said)), browser.run(said)
    browser.key("ArrowRight")
    assert browser.run(said).startswith("optimizer step 2,")
    browser.key("ArrowLeft")
    assert browser.run(said).startswith("optimizer step 1,")
    browser.key("+", "+")
    browser.key("+", "+")
    assert max(axis(browser)) < max(before) / 2
    browser.key("Escape")
    assert axis(browser) == before and browser.run("document.querySelector('#chart-loss .tip').hidden")
    assert not browser.complaints()


def test_touch_reads(pages, browser):
    browser.open(pages["one"], 360, touch=True)
    box = browser.box(SVG)
    spot = [{"x": box["x"] + box["width"] / 2, "y": box["y"] + 60}]
    browser("Input.dispatchTouchEvent", type="touchStart", touchPoints=spot)
    assert "optimizer step 1" in browser.run("document.querySelector('#chart-loss .tip').innerText")
    browser("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    assert not browser.complaints()


def test_names_for_screen_readers(pages, browser):
    browser.open(pages["one"])
    nodes = browser("Accessibility.getFullAXTree")["nodes"]
    named: dict[str, list[str]] = {}
    for node in nodes:
        if not node.get("ignored"):
            named.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    charts = len(browser.run("[...document.querySelectorAll('.chart')].map(e => e.id)"))
    assert len(named["application"]) == charts and all("arrow keys" in name for name in named["application"])
    assert any(name.startswith("Loss by optimizer step. ORPO loss from") for name in named["application"])
    assert len(named["button"]) == 3 * charts and all(len(name) > 10 for name in named["button"])
    assert len(set(named["button"])) == len(named["button"])
    assert "mine" in named["heading"] and all(named["heading"])
    assert "main" in named and {"Held-out pairs", "Answers", "Training", "Data"} <= set(named["region"])
    assert not [
        node
        for node in nodes
        if not node.get("ignored") and node["role"]["value"] in ("image", "img") and not node["name"]["value"]
    ]


def test_without_script_the_top_says_so_and_every_chart_is_in_words(pages, browser):
    """As in previews of mail programs and phones, which run none."""
    browser("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(pages["one"])
        nodes = browser("Accessibility.getFullAXTree")["nodes"]
        names = [n["name"]["value"] for n in nodes if n["role"]["value"] in ("image", "img") and not n.get("ignored")]
        assert sum("by optimizer step" in name for name in names) >= 9
        top, words = browser.run(
            "(e => [e.getBoundingClientRect().top, e.innerText])(document.querySelector('noscript p'))"
        )
        assert 0 <= top < 200 and "allow JavaScript" in words
    finally:
        browser("Emulation.setScriptExecutionDisabled", value=False)
    browser.open(pages["one"])
    assert browser.run("document.querySelector('noscript p')") is None


def test_nothing_injected_runs(written, browser, tmp_path):
    attack = "</script><script>document.title='owned'</script><img src='http://127.0.0.1:9/x' onerror=\"document.title='owned'\">\u2028"
    known = facts(name=attack)
    known["samples"]["after"][0]["answer"] = attack
    run = written(tmp_path / "run", known)
    other = written(tmp_path / "other", facts(name=f"{attack}2"))
    # even what would get into the page as it is may not run, nor ask
    for words in ([str(run)], [str(run), str(other)]):
        command(words, output=tmp_path / "page.html")
        browser.open(tmp_path / "page.html")
        assert browser.run("document.title") != "owned" and not browser.asked() and not browser.complaints()
    text = (tmp_path / "page.html").read_text("utf-8").replace("<main>", f"<main>{attack}", 1)
    (tmp_path / "in.html").write_text(text, "utf-8")
    browser.open(tmp_path / "in.html")
    assert browser.run("document.title") != "owned"
    assert "Content Security Policy" in json.dumps(browser.complaints())
