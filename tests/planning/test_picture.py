"""Pictures of plans: every byte drawn, readable without colours and in any width, and no text taken for anything else."""

import io
import itertools
import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from PIL import Image
from rich.console import Console

from orpo_lite import report
from orpo_lite.common.errors import RequestError
from orpo_lite.plan import drawing
from orpo_lite.plan import tables as show
from orpo_lite.plan.__main__ import command
from orpo_lite.plan.allocations import ADAPTER, BASE, HEAD, KEPT, LAYER, PARTS
from orpo_lite.plan.gpus import FITS, NOT, TIGHT, Card, verdict
from orpo_lite.plan.kernels import Target
from orpo_lite.plan.picture import LOOKS, MEASURED, NEEDED, RESERVED, UNKNOWN, Bar, Segment, bars, cells, picture, ticks
from orpo_lite.plan.predict import CONTEXT, LIBRARIES, MARGIN, plan
from orpo_lite.plan.remedies import Verdict
from orpo_lite.recipe import Recipe

GB = 1_000_000_000
HOSTILE = "<script>alert(1)</script>'\"&[bold red]x[/]\x1b[31m\x07\u202e\ud800 $\\nosuch$"


def planned(**changes) -> dict:
    """A plan's numbers: 6 GB in tensors at the most, 7 with what is assumed."""
    return {
        "recipe": "mine",
        "model": "org/base",
        "peak_bytes": 6 * GB,
        "needed_bytes": 7 * GB,
        "fullest_phase": "backward",
        "phases": {
            "load": {"total": 3 * GB, BASE: 3 * GB},
            "forward": {"total": 5 * GB, BASE: 3 * GB, ADAPTER: GB // 100, KEPT: 199 * GB // 100},
            "backward": {"total": 6 * GB, BASE: 3 * GB, KEPT: GB, LAYER: 3 * GB // 2, HEAD: GB // 2},
        },
        "assumed": {LIBRARIES: GB // 10, MARGIN: 3 * GB // 10, CONTEXT: 6 * GB // 10},
    } | changes


def card(total: float, words: str, name: str | None = None, needed: float = 7) -> dict:
    return {
        "card": name or f"{total:g} GB",
        "total_bytes": int(total * GB),
        "needed_bytes": int(needed * GB),
        "verdict": words,
    }


SEVERAL = [card(6, NOT, "rtx-2060", 7.5), card(6.9, TIGHT), card(8, FITS), card(8, FITS, "rtx-3070"),
           card(8, NOT, "rtx-2070", 7.5), card(80, FITS)]  # fmt: skip


def printed(drawn, width: int = 80, **wish) -> str:
    out = io.StringIO()
    bars(Console(file=out, width=width, highlight=False, **wish), drawn)
    return out.getvalue()


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


# ---- what is drawn -------------------------------------------------------------------------------------------------


def test_a_plan_is_drawn_to_the_byte():
    made = plan(Recipe.load("quickstart", ["model.quantization=nf4"]), Target("cuda"))
    drawn = picture(made.as_dict(), [show.as_dict(Verdict(Card("12 GB", 12), made, FITS, None, None))])
    assert [bar.name for bar in drawn.phases] == [*made.phases, NEEDED]
    for bar in drawn.phases[:-1]:
        assert bar.total == made.phases[bar.name].total()
        assert {s.part: s.size for s in bar.segments} == +made.phases[bar.name]
        assert [s.part for s in bar.segments] == [part for part in PARTS if made.phases[bar.name][part]]
    assert drawn.phases[-1].total == made.needed and drawn.phases[-1].words == verdict(made, Card("12 GB", 12))
    assert not drawn.cards and {bar.room for bar in drawn.phases} == {12 * GB}


def test_every_part_has_a_letter_and_a_colour_of_its_own():
    for which in ((*PARTS, LIBRARIES, MARGIN, CONTEXT, MEASURED, RESERVED), (FITS, TIGHT, NOT)):
        letters, colours = zip(*(LOOKS[part] for part in which), strict=True)
        assert len(set(letters)) == len(set(colours)) == len(which) and not {".", "|", ">", " "} & set(letters)
    unknown = Segment("of another version", 1)
    assert (unknown.letter, unknown.colour) == UNKNOWN


# Machado, Oliveira and Fernandes 2009, severity 1: linear RGB as it is seen
SEEN = {
    "all cones": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.01182, 0.04294, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.3039)),
}


def lab(colour: str, matrix) -> tuple[float, ...]:
    rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    rgb = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    rgb = [min(1, max(0, sum(a * b for a, b in zip(row, rgb, strict=True)))) for row in matrix]
    xyz = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    whites = (0.95047, 1, 1.08883)
    t = [sum(a * b for a, b in zip(row, rgb, strict=True)) / white for row, white in zip(xyz, whites, strict=True)]
    x, y, z = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in t)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("eyes", SEEN)
def test_parts_can_be_told_apart_by_colour_blind_readers(eyes):
    for which, least in ((PARTS, 18), ((FITS, TIGHT, NOT), 25)):
        for a, b in itertools.combinations(which, 2):
            assert math.dist(*(lab(LOOKS[part][1], SEEN[eyes]) for part in (a, b))) >= least, (a, b)


def test_cards_that_come_to_the_same_share_a_bar():
    drawn = picture(planned(), SEVERAL)
    assert [(bar.name, bar.ending) for bar in drawn.cards] == [
        ("6 GB, rtx-2060", "7.50 does not fit"), ("6.9 GB", "7.00 tight"), ("8 GB", "7.00 fits"),
        ("8 GB, rtx-2070", "7.50 does not fit"), ("80 GB", "7.00 fits"),
    ]  # fmt: skip
    assert {bar.room for bar in drawn.phases} == {None}
    assert drawn.scale == 8 * GB  # the card of 80 does not press all others to the side
    assert picture(planned(), [card(80, FITS)]).scale == 7 * GB


def test_a_plan_for_the_cpu_has_nothing_assumed_and_no_card():
    drawn = picture(planned(assumed={}))
    assert [bar.name for bar in drawn.phases] == ["load", "forward", "backward"] and not drawn.edge
    assert "assumed" not in drawn.note


def test_ticks_are_round_and_on_the_scale():
    for largest in (1e-9, 0.004, 0.19, 1, 1.28, 1.6, 3.999, 4, 7.99, 8, 13.43, 24, 99, 141, 1000):
        found = ticks(largest)
        assert found[0] == 0 and 4 <= len(found) <= 9 and found[-1] <= largest * (1 + 1e-9)
        assert largest - found[-1] < found[1] and f"{found[1]:e}"[0] in "125"


# ---- in a terminal ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [20, 40, 80, 120, 200])
@pytest.mark.parametrize(
    "cards", [[], [card(6.5, NOT)], [card(12, FITS)], SEVERAL], ids=["none", "less", "more", "all"]
)
def test_a_pipe_gets_letters_in_any_width(cards, width):
    text = printed(picture(planned(), cards), width)
    assert text.isascii() and "\x1b" not in text
    assert all(len(line) <= width for line in text.splitlines())
    for name in ("load", "forward", "backward", NEEDED):
        assert any(line.startswith(name) for line in text.splitlines())


def test_letters_stand_for_parts_to_scale():
    lines = printed(picture(planned())).splitlines()
    row = next(line for line in lines if line.startswith("backward"))
    found = {letter: len(list(run)) for letter, run in itertools.groupby(row.split()[1])}
    width = 80 - len("backward") - len("6.00") - 5
    assert found == {"B": 27, "K": 9, "R": 14, "H": 4} and row.split()[2] == "6.00"
    assert found["B"] == round(3 / 7 * width)
    legend = "\n".join(lines)
    for words in ("B base weights", "K kept activations", "R layer recompute", "H head chunk", "c CUDA context"):
        assert words in legend
    assert "A adapter" not in legend  # less than a column
    assert "0" in lines[5] and lines[5].endswith("GB")


@pytest.mark.parametrize("width", [10, 33, 50, 100])
def test_bars_are_as_long_as_their_bytes_and_edges_on_the_right_side(width):
    for size in (0, 1, 1_234_567, 3 * GB, 9 * GB, 10 * GB):
        bar = Bar("x", tuple(Segment(part, size // 4) for part in PARTS[:4]))
        text = cells(bar, 10 * GB, width).plain
        assert len(text) == width + 1 and len(text.rstrip()) == round(bar.total / (10 * GB) * width)
    bar = Bar("x", (Segment(BASE, 4 * GB), Segment(KEPT, 2 * GB)))
    columns = round(0.6 * width)
    for room in (6 * GB - 1, 5 * GB, GB, 1):
        text = cells(Bar("x", bar.segments, room), 10 * GB, width).plain.rstrip()
        assert len(text) == columns and text.count("|") == 1 and not set(text) & set(".>")
    for room in (6 * GB, 6 * GB + 1, 9 * GB, 10 * GB):
        text = cells(Bar("x", bar.segments, room), 10 * GB, width).plain.rstrip()
        assert text.index("|") == len(text) - 1 >= columns and set(text[columns:-1]) <= {"."}
    assert cells(Bar("x", bar.segments, 30 * GB), 10 * GB, width).plain.endswith(".>")


def test_colours_cover_the_letters_and_can_be_switched_off(monkeypatch):
    drawn = picture(planned(), SEVERAL)
    piped = printed(drawn)
    coloured = printed(drawn, force_terminal=True, color_system="truecolor")
    assert "48;2;46;70;161" in coloured and plain(coloured) == piped  # base weights on their blue
    monkeypatch.setenv("NO_COLOR", "1")
    without = printed(drawn, force_terminal=True, color_system="truecolor")
    assert plain(without) == piped and not re.search(r"\x1b\[[0-9;]*(?:38|48|3[0-7]|4[0-7]|9[0-7])", without)


def test_verdicts_are_words_as_well():
    text = printed(picture(planned(), SEVERAL))
    assert re.search(r"^6 GB, rtx-2060 +x+\|x+ +7.50 does not fit$", text, re.M)
    assert re.search(r"^6.9 GB +\++\|\+* +7.00 tight$", text, re.M)
    assert re.search(r"^8 GB +#+\.+\| +7.00 fits$", text, re.M)
    assert re.search(r"^80 GB +#+\.+> +7.00 fits$", text, re.M)
    assert "| 6.5 GB, mine" in printed(picture(planned(), [card(6.5, NOT, "mine")]))


# ---- as files --------------------------------------------------------------------------------------------------------


def test_the_figure_holds_the_numbers():
    drawn = picture(planned(), [card(6.5, NOT, "rtx-x")])
    figure = drawing.figure(drawn)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["load", "forward", "backward", NEEDED]
    widths: dict[tuple[str, str], float] = {}
    for container in axes.containers:
        (patch,) = container.patches
        name = drawn.phases[round(patch.get_y() + patch.get_height() / 2)].name
        widths[name, container.get_label()] = patch.get_width()
    for bar in drawn.phases:
        assert widths[bar.name, drawing.ROOM] == 6.5
        for segment in bar.segments:
            assert widths[bar.name, segment.part] * GB == pytest.approx(segment.size)
    assert {tuple(line.get_xdata()) for line in axes.lines} == {(6.5, 6.5)}
    texts = [text.get_text() for text in axes.texts]
    assert {"base weights 3.00", "6.5 GB, rtx-x", "7.00 does not fit", "6.00"} <= set(texts)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [s.part for s in drawn.legend]
    assert axes.get_xlabel() == "GB (10^9 bytes)" and "7.00 GB with what is assumed" in axes.get_title(loc="left")
    both = drawing.figure(picture(planned(), SEVERAL)).axes
    assert len(both) == 2 and both[0].get_xlim() == both[1].get_xlim()
    assert sorted({line.get_xdata()[0] for line in both[1].lines}) == [6, 6.9, 8]  # 80 GB lies further out


def test_png_and_svg_are_whole_and_repeat(tmp_path):
    drawn = picture(planned(), SEVERAL)
    for name in ("a.png", "b.PNG", "a.svg", "b.svg"):
        drawing.write(drawn, tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "b.PNG", "a.svg", "b.svg"}
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.PNG").read_bytes()
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert image.size[0] == 2 * drawing.WIDTH and image.size[1] > 800 and len(image.getcolors(1 << 20) or []) > 50
    text = "".join(ET.parse(tmp_path / "a.svg").getroot().itertext())
    assert "mine: org/base" in text and "does not fit" in text


class Page(HTMLParser):
    """Elements, attributes and texts of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.titles, self.words = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags[-1][0] == "title":
            self.titles.append(data)
        self.words += data


def test_html_has_every_value_and_asks_for_nothing():
    drawn = picture(planned(), SEVERAL)
    text = drawing.page(drawn)
    page = Page(text)
    rects = [attrs for tag, attrs in page.tags if tag == "rect" and "fill" in attrs]
    assert len(rects) == sum(len(bar.segments) for bar in [*drawn.phases, *drawn.cards])
    for bar in drawn.phases:
        for segment in bar.segments:
            assert f"{bar.name}: {segment.part} {segment.size / GB:.3f} GB" in page.titles
    scale = float(rects[0]["width"]) / 3
    assert sum(float(r["width"]) for r in rects[4:8]) == pytest.approx(6 * scale, rel=0.01)  # the backward phase
    assert "prefers-color-scheme:dark" in text and "the card's memory: 80 GB" in page.titles
    assert not re.search(r"https?:|url\(|@import|\bsrc=|\bhref=", text)
    (svg,) = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert svg["role"] == "img" and svg["aria-labelledby"] == "plan-title plan-desc"
    assert "backward 6.00" in page.words and "Memory of mine: org/base" in page.titles


def test_hostile_names_stay_text(tmp_path):
    drawn = picture(planned(model=HOSTILE, recipe=HOSTILE), [card(6.5, NOT, "<i>[red]\\x")])
    text = printed(drawn)
    assert "\x1b" not in text and "| 6.5 GB, <i>[red]\\x" in text
    for name in ("x.png", "x.svg", "x.html"):
        drawing.write(drawn, tmp_path / name)
    html = (tmp_path / "x.html").read_text("utf-8")
    page = Page(html)
    assert {"script", "i"} & {tag for tag, _ in page.tags} <= {"i"}
    assert all("style" in attrs for tag, attrs in page.tags if tag == "i")  # the legend's own
    assert "<script>alert(1)</script>'\"&[bold red]x[/]\\x1b[31m\\x07\\u202e\\ud800 $\\nosuch$" in page.words
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", html)
    root = ET.parse(tmp_path / "x.svg").getroot()
    assert not [e for e in root.iter() if e.tag.endswith("script")] and "<script>" in "".join(root.itertext())
    out = io.StringIO()
    made = plan(Recipe.load("quickstart"), Target("cpu"))
    made.model = HOSTILE
    show.plan(Console(file=out, width=400), made)
    assert "\x1b" not in out.getvalue() and "[bold red]x[/]\\x1b[31m" in out.getvalue()


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    drawn, path = picture(planned()), tmp_path / "x.png"
    path.write_text("old")
    monkeypatch.setattr(
        "pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(RequestError, match=r"x\.png cannot be written: No space left"):
        drawing.write(drawn, path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    drawing.write(drawn, path)
    assert path.read_bytes()[:4] == b"\x89PNG"
    for name in ("x.jpg", "x", "x.png.gz"):
        with pytest.raises(RequestError, match=r"--picture: found .*expected a name that ends in \.png, \.svg, \.html"):
            drawing.write(drawn, tmp_path / name)
    with pytest.raises(RequestError, match="found no folder"):
        drawing.write(drawn, tmp_path / "none" / "x.png")
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(RequestError, match="cannot be written"):
        drawing.write(drawn, tmp_path / "folder.svg")


# ---- in the report ---------------------------------------------------------------------------------------------------

FACTS = {
    "name": "mine", "eval": {"before": None, "after": None}, "steps": 1, "samples": {"after": []},
    "data": {"train_pairs": 1, "eval_pairs": 0, "drops": {}, "fingerprint": "f"}, "base_model": {"name_or_path": "org/base"},
    "parameters": {"trainable": 1, "total": 2}, "effective_batch": 1, "adapter": "last", "train_seconds": 1.0,
    "pairs_per_second": 1.0, "peak_memory_bytes": GB, "device": "cuda", "versions": {},
}  # fmt: skip


def test_the_report_holds_the_plan_against_what_was_measured():
    assert "Memory" not in report.page(FACTS, [])
    assert "<h2>Memory: the plan</h2>" in report.page(FACTS | {"plan": planned()}, [])
    measured = {"allocated_bytes": 5 * GB, "reserved_bytes": 6 * GB}
    text = report.page(FACTS | {"plan": planned(measured=measured)}, [])
    assert (
        "plan against measured" in text
        and "6.00 GB in tensors were planned, 5.00 GB measured: the plan was 20.0% over" in text
    )
    titles = Page(text).titles
    assert "measured: measured in tensors 5.000 GB" in titles and "measured: reserved beside them 1.000 GB" in titles
    hostile = report.page(FACTS | {"plan": planned(model=HOSTILE, measured=measured)}, [])
    assert "<script>" not in hostile


# ---- command ---------------------------------------------------------------------------------------------------------


def test_command_draws_and_writes(tmp_path, capsys):
    path = tmp_path / "plan.html"
    command("quickstart", gpu="12GB", picture=path)
    out = capsys.readouterr().out
    assert f"picture: {path}" in out and path.read_text("utf-8").startswith("<!doctype html>")
    assert re.search(r"^needed +\S+.*fits$", out, re.M) and "| 12 GB" in out
    command("quickstart", gpu="cpu", picture=path, as_json=True)
    done = capsys.readouterr()
    assert json.loads(done.out)["device"] == "cpu" and "picture:" in done.err


def test_a_wrong_picture_is_told_before_planning(tmp_path):
    with pytest.raises(RequestError, match=r"x\.jpg.*\.png, \.svg, \.html"):
        command("no such recipe", picture=tmp_path / "x.jpg")
    with pytest.raises(RequestError, match="--recipe NAME"):
        command(all_recipes=True, picture=tmp_path / "x.png")
