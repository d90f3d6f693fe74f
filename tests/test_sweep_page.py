"""What people see of a sweep: curves, maps, the page in a real browser."""

import io
import itertools
import math
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
import synthetic_sweep
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from llmcompressor_moe.checkpoint.atomic import OutputDirectoryError
from llmcompressor_moe.sweep.columns import columns_of, number_text, signed_share_text
from llmcompressor_moe.sweep.curves import KINDS, Curve, CurvePoint, kind_of, label_of, trade_off_curves
from llmcompressor_moe.sweep.geometry import Box, Label, axis_for, place_labels, round_ticks
from llmcompressor_moe.sweep.grid import Point
from llmcompressor_moe.sweep.page import render_page, write_page
from llmcompressor_moe.sweep.plots import PlotsMissingError, write_plots
from llmcompressor_moe.sweep.png import indexed_png
from llmcompressor_moe.sweep.report import pareto_front
from llmcompressor_moe.sweep.svg import COLOURS, MARKERS, MapRow, StripRow, cell_map, scatter, strips
from llmcompressor_moe.sweep.views import base_shares, budgets, most_interesting, point_shares, stack

HOSTILE = """</script><script>window.pwned=1</script><img src=x onerror="window.pwned=2">'&"""

# Machines that run tests are busy at times.
patient = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])

finite = st.floats(min_value=-1e9, max_value=1e9, allow_nan=False)
positive = st.floats(min_value=1e-6, max_value=1e9)


@pytest.fixture(scope="module")
def report():
    return synthetic_sweep.sweep_report()


# Axes and labels.


@patient
@given(finite, positive)
def test_ticks_are_round_and_within(low, span):
    assume(low + span > low and span > 1e-9 * abs(low))
    ticks = round_ticks(low, low + span)
    assert all(low <= tick <= low + span for tick in ticks)
    assert 1 <= len(ticks) <= 9
    for tick in ticks:
        assert len(f"{abs(tick):.12g}".replace(".", "").strip("0")) <= 12
    steps = {f"{b - a:.3g}" for a, b in itertools.pairwise(ticks)}
    assert {step.replace(".", "").strip("0").split("e")[0] for step in steps} <= {"1", "2", "5"}


@patient
@given(st.lists(positive, min_size=1, max_size=30))
def test_an_axis_holds_its_values_and_marks_some(values):
    axis = axis_for(values, 40, 400)
    assert all(40 <= axis.at(value) <= 400 for value in values)
    assert all(40 <= axis.at(tick) <= 400 for tick in axis.ticks)
    assert axis.ticks
    assert axis.log == (max(values) / min(values) > 5)
    assert [axis.at(value) for value in sorted(values)] == sorted(axis.at(value) for value in values)


def test_an_axis_needs_values():
    with pytest.raises(ValueError, match="at least one"):
        axis_for([], 0, 1)
    with pytest.raises(ValueError, match="must be above"):
        round_ticks(1, 1)


place = st.tuples(st.floats(0, 400), st.floats(0, 300), st.floats(5, 150))


@patient
@given(st.lists(place, max_size=15))
def test_labels_do_not_collide(places):
    area = Box(0, 0, 400, 300)
    marks = [Box(x - 5, y - 5, x + 5, y + 5) for x, y, _ in places]
    placed = place_labels([Label(x, y, [width, 5], 12) for x, y, width in places], marks, area, 9)
    boxes = [found.box for found in placed if found is not None]
    assert all(area.holds(box) for box in boxes)
    assert not any(box.overlaps(mark) for box in boxes for mark in marks)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_a_label_alone_stands_beside_its_point():
    (placed,) = place_labels([Label(50, 50, [40], 12)], [Box(45, 45, 55, 55)], Box(0, 0, 400, 300), 9)
    assert (placed.choice, placed.x, placed.anchor) == (0, 59, "start")
    assert placed.box == Box(59, 44, 99, 56)


# Images, read by a decoder that is not ours.


@patient
@given(st.integers(1, 16), st.integers(1, 40), st.integers(1, 9), st.randoms(use_true_random=False))
def test_images_say_what_was_written(colours, width, height, draw):
    palette = [tuple(draw.randrange(256) for _ in range(4)) for _ in range(colours)]
    rows = [[draw.randrange(colours) for _ in range(width)] for _ in range(height)]
    image = Image.open(io.BytesIO(indexed_png(rows, palette))).convert("RGBA")
    assert image.size == (width, height)
    assert [[image.getpixel((x, y)) for x in range(width)] for y in range(height)] == [
        [palette[index] for index in row] for row in rows
    ]


@pytest.mark.parametrize(
    "rows, palette",
    [([], [(0,) * 4]), ([[0], [0, 0]], [(0,) * 4]), ([[1]], [(0,) * 4]), ([[0]], [(0,) * 4] * 17)],
)
def test_images_that_cannot_be(rows, palette):
    with pytest.raises(ValueError, match=r"rows|palette"):
        indexed_png(rows, palette)


# Charts.


def drawn(markup):
    """The markup as a tree: it is well-formed, and has a title and a description."""
    root = ElementTree.fromstring(str(markup))
    assert root.find("title").text
    assert root.find("desc").text
    assert root.get("aria-labelledby") == root.find("title").get("id")
    assert root.get("aria-describedby") == root.find("desc").get("id")
    return root


def view_box(root):
    left, top, width, height = map(float, root.get("viewBox").split())
    return Box(left, top, left + width, top + height)


points = st.lists(st.tuples(st.sampled_from(list(KINDS)), positive, positive), min_size=1, max_size=25)


@patient
@given(points)
def test_a_curve_draws_every_point_within_itself(found):
    every = tuple(CurvePoint(f"n{i}", f"label {i}", str(i), *values) for i, values in enumerate(found))
    front = tuple(pareto_front((p.name, p.x, p.y) for p in every))
    root = drawn(scatter(Curve("k", "Size", "GiB", every, front, ()), {p.name: f"#{p.name}" for p in every}))
    box = view_box(root)
    links = root.findall("a")
    assert {link.get("href") for link in links} == {f"#{p.name}" for p in every}
    places = {}
    for link in links:
        mark = link.find("path")
        x, y = map(float, re.match(r"translate\((\S+) (\S+)\)", mark.get("transform")).groups())
        assert box.left + 6 <= x <= box.right - 6
        assert box.top + 6 <= y <= box.bottom - 6
        places[link.get("href")[1:]] = (x, y)
        kind = next(p.kind for p in every if f"#{p.name}" == link.get("href"))
        assert mark.get("d") == MARKERS[kind]
        assert "perplexity" in link.get("aria-label")
    for text in root.findall("text"):
        if text.get("x"):
            assert box.left <= float(text.get("x")) <= box.right
            assert box.top <= float(text.get("y")) <= box.bottom
    on_front = [link for link in links if link.get("tabindex") == "0"]
    assert [link.get("href")[1:] for link in on_front] == list(front)
    line = next(path for path in root.findall("path") if path.get("class") == "front-line").get("d")
    for name in front:
        x, y = (f"{value:.1f}".removesuffix(".0") for value in places[name])
        assert f"M{x} {y}" in line or f"H{x}V{y}" in line


def test_kinds_differ_in_shape_and_have_names():
    assert set(MARKERS) == set(KINDS)
    assert len(set(MARKERS.values())) == len(MARKERS)


def test_what_points_are_called():
    assert label_of(Point()) == "untouched"
    assert label_of(Point(blocks=1, experts=2, bits=4.5)) == "\u22121 block \u22122 experts, 4.5 bit"
    kinds = [kind_of(p) for p in (Point(), Point(layers=2), Point(bits=4), Point(blocks=1, layers=1))]
    assert kinds == ["base", "layers", "bits", "combination"]


@patient
@given(st.integers(1, 120), st.integers(1, 300), st.randoms(use_true_random=False))
def test_maps_have_a_cell_per_expert(layers, experts, draw):
    rows = [
        MapRow(block + 3, [draw.choice([None, 0.0, 1.0, 9.0]) for _ in range(experts)])
        for block in range(layers)
    ]
    markup = cell_map("m", "title", "what it shows", rows)
    root = drawn(markup)
    box = view_box(root)
    images = root.findall("image")
    assert len(images) == 1
    assert images[0].get("href").startswith("data:image/png;base64,")
    for element in (*images, *(text for text in root.findall("text") if text.get("x"))):
        assert box.left <= float(element.get("x")) <= box.right
        assert box.top <= float(element.get("y")) <= box.bottom
    patterns = {rect.get("fill") for rect in root.findall("rect") if rect.get("fill")}
    values = {value for row in rows for value in row.values}
    assert ("url(#hatch)" in patterns) == (None in values)
    assert ("url(#dots)" in patterns) == (0.0 in values)
    assert len(markup) < 6000 + 1.1 * layers * experts


def test_maps_of_nothing():
    with pytest.raises(ValueError, match="at least one layer"):
        cell_map("m", "title", "what it shows", [])


@pytest.mark.parametrize("blocks", [1, 6, 100])
def test_strips_say_every_value(blocks):
    values = {block: 0.5 + block / 1000 for block in range(1, blocks)}
    change = {block: 1 - value for block, value in values.items()}
    root = drawn(strips("s", "title", blocks, [StripRow("a", values, change), StripRow("b", {}, {})]))
    titles = [rect.find("title").text for rect in root.findall("rect")]
    assert len(titles) == 2 * blocks
    assert titles.count("block 0: none") == 2
    assert all(f"block {block}: {value:.3g}" in titles for block, value in values.items())
    box = view_box(root)
    for rect in root.findall("rect"):
        assert float(rect.get("x")) + float(rect.get("width")) <= box.right
    if blocks > 2:
        fills = [rect.get("fill") for rect in root.findall("rect")]
        assert (fills[1], fills[blocks - 1]) == (COLOURS[-1], COLOURS[0])


def test_numbers_in_cells_can_be_read(report):
    root = drawn(strips("s", "title", 13, [StripRow("a", *[{b: 10.0**b for b in range(13)}] * 2)]))
    fills = [rect.get("fill") for rect in root.findall("rect")]
    texts = [text.get("fill") for text in root.findall("text") if text.get("class") == "in-cell"]
    assert len(set(fills)) == 13
    for fill, text in zip(fills, texts, strict=True):
        assert contrast(hex_colour(fill), hex_colour(text)) >= 4.5


# What the page says.


def test_curves_of_a_report(report):
    by_size, by_reads = trade_off_curves(report)
    assert (by_size.unit, by_reads.unit) == ("MiB", "MiB")
    assert by_size.points[0].kind == "base"
    assert by_size.points[0].x == pytest.approx(report.points[0].size / 2**20)
    assert by_size.front == tuple(report.front_by_size())
    assert by_reads.front == tuple(report.front_by_reads())
    for point in by_size.front_points:
        assert not any(p.x <= point.x and p.y < point.y for p in by_size.points)


def test_the_stack_says_what_is_gone(report):
    result = next(p for p in report.points if p.point == Point(experts=2, layers=1))
    rows = stack(report, result)
    assert [row.layer for row in rows] == ["dense", "kept", "kept", "kept", "kept", "gone"]
    assert [row.experts for row in rows[1:5]] == ["6 of 8"] * 4
    assert rows[1].kept_share == 0.75
    dropped = next(p for p in report.points if p.point == Point(blocks=1, bits=5))
    rows = stack(report, dropped)
    assert (rows[1].attention, rows[1].layer, rows[1].scheme) == ("gone", "gone", "\u2013")
    assert (rows[2].attention, rows[2].layer, rows[2].scheme) == ("kept", "kept", "W4A16")


def test_shares_of_experts(report):
    assert list(base_shares(report)) == [1, 2, 3, 4, 5]
    result = next(p for p in report.points if p.point == Point(experts=2, layers=1))
    shares = point_shares(report, result.found)
    assert shares[5] == [None] * 8
    for block, gone in result.dropped.experts.items():
        assert [e for e, value in enumerate(shares[block]) if value is None] == gone
        assert sum(value for value in shares[block] if value is not None) == pytest.approx(1, abs=1e-4)


def test_budgets_name_the_smallest_point_that_keeps_them(report):
    found = budgets(report)
    assert found
    for budget in found:
        limit = report.base.text.perplexity * (1 + budget.share)
        assert report.perplexity(budget.result) <= limit
        assert budget.result.size == min(p.size for p in report.points if report.perplexity(p) <= limit)
    sizes = [budget.result.size for budget in found]
    assert sizes == sorted(set(sizes), reverse=True)
    assert most_interesting(report).found is not None


def test_how_numbers_are_written():
    assert number_text(28.0) == "28.00"
    assert number_text(1234567.0) == "1\u202f234\u202f567"
    assert number_text(0.000123456, 3) == "0.000123"
    assert (number_text(math.inf), number_text(math.nan)) == ("infinite", "not a number")
    assert (signed_share_text(0.25), signed_share_text(-0.004)) == ("+25.0 %", "\u22120.4 %")


class Elements(HTMLParser):
    """Tags with their attributes, text of table cells."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def all(self, tag):
        return [attrs for name, attrs in self.found if name == tag]


def test_the_page_needs_nothing_else(report):
    page = render_page(report)
    elements = Elements(page)
    assert not re.search(r"https?://|@import|url\((?!#)", page)
    for tag, attrs in elements.found:
        for name in ("src", "href", "xlink:href", "action", "srcset", "poster", "data"):
            assert (attrs.get(name) or "#").startswith(("#", "data:")), (tag, attrs)
    policy = next(
        m["content"] for m in elements.all("meta") if m.get("http-equiv") == "Content-Security-Policy"
    )
    assert "default-src 'none'" in policy


def test_the_page_refers_to_what_it_has(report):
    elements = Elements(render_page(report))
    ids = [attrs["id"] for _, attrs in elements.found if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in elements.found:
        for name in ("aria-labelledby", "aria-describedby", "for"):
            assert all(key in ids for key in (attrs.get(name) or "").split()), attrs
        if (attrs.get("href") or "").startswith("#"):
            assert attrs["href"][1:] in ids
    used = {
        key
        for _, attrs in elements.found
        for v in attrs.values()
        for key in re.findall(r"url\(#(.*?)\)", v or "")
    }
    assert used <= set(ids)
    assert "hatch" in used


def test_every_number_of_the_table_is_there(report):
    page = render_page(report)
    for column in columns_of(report):
        assert column.meaning.replace("'", "&#39;") in page
        for result in report.points:
            assert f">{column.cell(result).text}</td>" in page


def test_text_is_escaped():
    page = render_page(synthetic_sweep.sweep_report(model=f"models/{HOSTILE}"))
    assert len(Elements(page).all("script")) == 1
    assert not Elements(page).all("img")
    assert "&lt;script&gt;" in page


def test_infinite_perplexity_is_told_and_not_drawn(tmp_path):
    report = synthetic_sweep.sweep_report()
    report.points[3].found.text.perplexity = math.inf
    name = report.points[3].point.name
    page = render_page(report)
    assert f"as their perplexity is infinite: {name}" in page
    assert page.count(">infinite</td>") == 2
    assert all(name in curve.left_out for curve in trade_off_curves(report))
    assert len(write_plots(report, tmp_path)) == 2


def test_a_sweep_of_the_untouched_model_alone(tmp_path):
    report = synthetic_sweep.sweep_report(points=[])
    page = render_page(report)
    assert 'id="p0"' in page
    assert "No point but the untouched model" in page
    assert len(write_plots(report, tmp_path)) == 2


def test_a_model_without_dense_blocks_and_all_layers_gone():
    report = synthetic_sweep.sweep_report(blocks=2, dense=0, points=[Point(layers=2)])
    report.points[1].found.routing.mean = None
    assert "2 MoE layers dropped" in render_page(report)


def test_large_sweeps_make_pages_that_open():
    points = [Point(experts=n) for n in range(1, 9)]
    report = synthetic_sweep.sweep_report(blocks=100, experts=256, points=points, dense=3)
    page = render_page(report)
    # Some 20 kB for the map and 15 kB for the stack of each point.
    assert len(page.encode()) < 150_000 + 45_000 * len(report.points)
    assert "The same as numbers" in page
    assert "Share of all choices" not in page


def test_pages_are_written_whole(report, tmp_path):
    write_page(report, tmp_path / "new" / "sweep.html")
    assert (tmp_path / "new" / "sweep.html").read_text(encoding="utf-8") == render_page(report)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["sweep.html"]
    (tmp_path / "file").touch()
    with pytest.raises(OutputDirectoryError, match="cannot be written"):
        write_page(report, tmp_path / "file" / "sweep.html")


# Plots.


def test_plots_are_images(report, tmp_path):
    written = write_plots(report, tmp_path / "plots")
    assert [path.name for path in written] == ["trade-off-size.png", "trade-off-reads.png"]
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(
        path.name for path in written
    )
    for path in written:
        with Image.open(path) as image:
            assert image.size == (1200, 780)
            colours = {colour[:3] for _, colour in image.convert("RGB").getcolors(1 << 20)}
        assert {(0x00, 0x67, 0xA5), (0x8C, 0x3B, 0x7C)} <= colours


def test_plots_without_matplotlib(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PlotsMissingError, match=r"pip install llmcompressor-moe\[plots\]"):
        write_plots(report, tmp_path)


# In a browser.


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        pytest.fail("no Chromium on the path: run scripts/ensure-browser.sh, or apt-get install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail("playwright is not installed: pip install -e '.[dev]'")
    with sync_playwright() as playwright:
        # Containers run tests as root, where Chromium's sandbox does not start.
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(report, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "sweep.html"
    write_page(report, path)
    return path.as_uri()


@pytest.fixture
def opened(browser):
    """Opens a page and, when the test is over, makes sure that nothing was wrong and nothing was fetched."""
    contexts, wrong = [], []

    def open_page(address, width=1280, height=800, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request",
            lambda request: (
                wrong.append(request.url)
                if not request.url.startswith("data:") and request.url.split("#")[0] != address.split("#")[0]
                else None
            ),
        )
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.mark.browser
@pytest.mark.parametrize("width, height", [(360, 740), (1280, 800)])
def test_nothing_overflows(opened, address, width, height):
    page = opened(address, width, height)
    for details in page.query_selector_all("details > summary"):
        if details.is_visible():
            details.click()
    for option in page.eval_on_selector_all("#choose option", "found => found.map(o => o.value)"):
        page.select_option("#choose", option)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    too_wide = page.evaluate(
        """() => [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, svg, details')
              && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
    )
    assert too_wide == []


@pytest.mark.browser
def test_wide_models_do_not_overflow_on_a_phone(opened, tmp_path):
    report = synthetic_sweep.sweep_report(blocks=100, experts=256, points=[Point(experts=40)], dense=3)
    write_page(report, tmp_path / "wide.html")
    page = opened((tmp_path / "wide.html").as_uri(), 360, 740)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


FOCUSABLE = """() => [...document.querySelectorAll('a[href], button, select, summary, [tabindex="0"]')]
    .filter(e => e.tabIndex >= 0 && e.checkVisibility({contentVisibilityAuto: true}) && !e.closest('[hidden]'))
    .filter(e => !e.closest('details:not([open])') || e.tagName === 'SUMMARY').length"""

FOCUSED = """() => {
    const e = document.activeElement, style = getComputedStyle(e);
    if (e === document.body) return null;
    e.dataset.visited = 'yes';
    const box = e.getBoundingClientRect();
    return {what: e.outerHTML.slice(0, 90),
            outline: style.outlineStyle !== 'none' && parseFloat(style.outlineWidth),
            inside: box.bottom > 0 && box.top < innerHeight};
}"""


@pytest.mark.browser
def test_tab_reaches_every_control_and_shows_where_it_is(opened, address):
    page = opened(address)
    expected = page.evaluate(FOCUSABLE)
    assert expected > 30
    for _ in range(expected):
        page.keyboard.press("Tab")
        focused = page.evaluate(FOCUSED)
        assert focused is not None
        assert focused["outline"] >= 2, focused
        assert focused["inside"], focused
    assert page.locator("[data-visited]").count() == expected


@pytest.mark.browser
def test_the_first_tab_skips_to_the_content(opened, address):
    page = opened(address)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getBoundingClientRect().left >= 0")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def column(page, number):
    return page.eval_on_selector_all(
        "#points tbody tr", f"rows => rows.map(row => row.cells[{number}].dataset.v)"
    )


@pytest.mark.browser
def test_headings_sort_by_keyboard(opened, address):
    page = opened(address)
    headings = page.locator("#points thead th")
    titles = headings.all_inner_texts()
    number = next(i for i, title in enumerate(titles) if title.startswith("Perplexity"))
    for key, sort, reverse in (("Enter", "ascending", False), ("Space", "descending", True)):
        headings.nth(number).locator("button").focus()
        page.keyboard.press(key)
        assert headings.nth(number).get_attribute("aria-sort") == sort
        found = [float(value) for value in column(page, number)]
        assert found == sorted(found, reverse=reverse)
    kl = next(i for i, title in enumerate(titles) if title.startswith("KL"))
    headings.nth(kl).locator("button").click()
    assert headings.nth(number).get_attribute("aria-sort") == "none"
    values = column(page, kl)
    assert values[-1] == ""
    assert [float(v) for v in values[:-1]] == sorted(float(v) for v in values[:-1])


@pytest.mark.browser
def test_choosing_a_point_changes_the_map(opened, address, report):
    page = opened(address)
    images = set()
    for result, option in zip(
        report.points, (f"p{number}" for number in range(len(report.points))), strict=True
    ):
        page.select_option("#choose", option)
        visible = page.locator("article.point:visible")
        assert visible.count() == 1
        assert visible.locator("h3").inner_text() == str(result.point)
        if result.found is not None:
            image = visible.locator("svg.map > image")
            assert image.bounding_box()["height"] > 50
            images.add(image.get_attribute("href"))
    assert len(images) == len(report.points) - 1


@pytest.mark.browser
def test_maps_are_seen_as_drawn(opened, tmp_path):
    report = synthetic_sweep.sweep_report(blocks=2, experts=4, dense=0, points=[Point(experts=1)])
    shares = [0.0, 0.97, 0.01, 0.02]
    layer = report.points[1].found.routing.layers[0]
    layer.kept_experts, layer.routing.utilization_after = [1, 2, 3], shares
    write_page(report, tmp_path / "map.html")
    page = opened((tmp_path / "map.html").as_uri())
    box = page.locator("#p1 svg.map > image").bounding_box()
    page.locator("#p1 svg.map").scroll_into_view_if_needed()
    box = page.locator("#p1 svg.map > image").bounding_box()
    seen = Image.open(io.BytesIO(page.screenshot(clip=box))).convert("RGB")

    def cell(number):
        left = round(seen.width * number / 4)
        crop = seen.crop((left + 6, 6, left + seen.width // 4 - 6, seen.height // 2 - 6))
        return {colour for _, colour in crop.getcolors(1 << 20)}

    assert len(cell(0)) > 1, "an expert that is gone is hatched"
    assert cell(1) == {hex_colour(COLOURS[10])}
    assert cell(2) == {hex_colour(COLOURS[0])}


@pytest.mark.browser
def test_points_of_a_curve_lead_to_their_details(opened, address, report):
    page = opened(address)
    first = page.locator("#trade-offs svg.curve a[tabindex='0']").first
    first.focus()
    readout = page.locator("#trade-offs .readout").first
    assert readout.inner_text() == first.get_attribute("aria-label")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == readout.inner_text()
    assert readout.inner_text() != first.get_attribute("aria-label")
    target = page.evaluate("document.activeElement.getAttribute('href')")
    page.keyboard.press("Enter")
    assert page.locator(target).is_visible()
    assert page.locator("#choose").input_value() == target[1:]


@pytest.mark.browser
def test_addresses_name_points(opened, address):
    page = opened(f"{address}#p3")
    assert page.locator("#p3").is_visible()
    assert page.locator("article.point:visible").count() == 1


@pytest.mark.browser
def test_without_scripts_a_point_is_shown_and_links_show_others(opened, address):
    page = opened(address, java_script_enabled=False)
    assert page.locator("article.point:visible").count() == 1
    assert page.locator("#choose").is_hidden()
    page.locator("#points tbody a").nth(2).click()
    assert page.locator("#p2").is_visible()


@pytest.mark.browser
def test_hostile_text_does_nothing(opened, tmp_path):
    write_page(synthetic_sweep.sweep_report(model=f"models/{HOSTILE}"), tmp_path / "hostile.html")
    page = opened((tmp_path / "hostile.html").as_uri(), 360, 740)
    assert page.evaluate("window.pwned") is None
    assert page.locator("dd.path").inner_text() == f"models/{HOSTILE}"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.browser
def test_motion_and_print(opened, address):
    page = opened(address)
    assert page.evaluate("document.getAnimations().length") == 0
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    page.emulate_media(media="print", color_scheme="dark")
    assert page.locator("nav").is_hidden()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


# Text with the colour behind it; gradients count as their first colour.
COLOURS_SEEN = r"""() => {
    const colour = (text) => (text.match(/rgba?\([^)]*\)/) || [null])[0];
    const seen = new Map();
    for (const element of document.querySelectorAll('body *')) {
        const own = [...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
        if (!own || !element.checkVisibility() || element.matches('title, desc')) continue;
        if (element.classList.contains('in-cell')) continue;
        const style = getComputedStyle(element);
        let behind = null;
        for (let e = element; e && !behind; e = e.parentElement) {
            const s = getComputedStyle(e);
            const found = colour(s.backgroundImage) || s.backgroundColor;
            if (found && found !== 'rgba(0, 0, 0, 0)') behind = found;
        }
        const front = element instanceof SVGElement ? style.fill : style.color;
        seen.set(front + '|' + behind, element.outerHTML.slice(0, 60));
    }
    const page = getComputedStyle(document.body).backgroundColor;
    for (const mark of document.querySelectorAll('.legend .mark, .legend .front-line'))
        seen.set(getComputedStyle(mark).stroke + '|' + page + '|mark', mark.outerHTML.slice(0, 60));
    return [...seen.entries()];
}"""


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(opened, address, scheme, report):
    page = opened(address, color_scheme=scheme)
    page.select_option("#choose", "p5")
    seen = page.evaluate(COLOURS_SEEN)
    assert len(seen) > 12
    for pair, where in seen:
        front, behind, *kind = pair.split("|")
        # WCAG 2.2: 4.5 for text (1.4.3), 3 for what charts are made of (1.4.11).
        assert contrast(rgb(front), rgb(behind)) >= (3 if kind else 4.5), (pair, where)
    body = rgb(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (sum(body) > 600) == (scheme == "light")


def rgb(text):
    return tuple(int(float(number)) for number in re.findall(r"[\d.]+", text)[:3])


def hex_colour(text):
    digits = text[1:]
    return tuple(bytes.fromhex(digits if len(digits) == 6 else "".join(2 * digit for digit in digits)))


def contrast(one, other):
    """Of two colours, 1 to 21 (https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio)."""

    def luminance(colour):
        parts = [c / 255 for c in colour]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
