"""The report page in a real Chromium: `make test-browser`."""

import os
import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from test_report import html_of, scores

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """The page of the committed results, with scores, so that everything it can show is there."""
    root = tmp_path_factory.mktemp("results")
    for name in ("five-250", "five-500"):
        shutil.copytree(ROOT / "results" / name, root / name)
    shutil.rmtree(root / "five-500/smollm2_135m/none")  # a cell that is needed and was not run
    scores(root, "smollm2_135m", 30)
    file = root / "report.html"
    file.write_text(html_of(root), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium's own sandbox does not run as root, which a container is.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium, file):
    """Opens the page; afterwards nothing was said on the console and nothing but the file was asked for."""
    contexts, said, asked = [], [], []

    def open_(hash: str = "", width: int = 1280, **options):
        context = chromium.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri() + hash)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert said == []
    assert {url.partition("#")[0] for url in asked} == {file.as_uri()}


def column(table, place: int) -> list[str]:
    return table.locator(f"tbody tr > :nth-child({place})").evaluate_all(
        "cells => cells.map(cell => cell.dataset.value ?? cell.textContent.trim())"
    )


def test_a_table_is_sorted_by_its_buttons_and_says_so(open_page):
    page = open_page()
    table = page.locator("#details table.cells").first
    button = table.locator("thead th:nth-child(3) button")
    button.focus()
    page.keyboard.press("Enter")
    assert table.locator("thead th:nth-child(3)").get_attribute("aria-sort") == "ascending"
    values = [float(v) for v in column(table, 3)]
    assert values == sorted(values) and len(values) > 10
    page.keyboard.press("Space")
    assert table.locator("thead th:nth-child(3)").get_attribute("aria-sort") == "descending"
    assert [float(v) for v in column(table, 3)] == values[::-1]
    table.locator("thead th:nth-child(1) button").click()
    assert table.locator("[aria-sort]").count() == 1
    names = column(table, 1)
    assert names != sorted(names, reverse=True) and names[0].startswith("BF16")


def test_what_has_no_number_is_sorted_last_both_ways(open_page):
    page = open_page()
    page.get_by_role("tab", name="smollm2_135m, mxfp4_mxfp8, five-500").click()
    table = page.locator("#details table.cells:visible")
    for order in ("ascending", "descending"):
        table.locator("thead th:nth-child(3) button").click()
        assert table.locator("thead th:nth-child(3)").get_attribute("aria-sort") == order
        assert column(table, 3)[-1] == ""  # BF16 was not run there


def test_tabs_by_mouse_by_keyboard_and_by_link(open_page):
    page = open_page()
    tabs = page.get_by_role("tablist", name="Model, options and evaluation").get_by_role("tab")
    assert tabs.count() == 4

    def selected() -> str:
        (name,) = [t.inner_text() for t in tabs.all() if t.get_attribute("aria-selected") == "true"]
        visible = page.locator("#details > div > [role=tabpanel]:visible")
        assert visible.count() == 1 and visible.get_attribute("data-tab") == name
        return name

    first = selected()
    tabs.nth(0).focus()
    names = [tab.inner_text() for tab in tabs.all()]
    for key, place in (
        ("ArrowRight", 1),
        ("ArrowLeft", 0),
        ("ArrowLeft", 3),
        ("Home", 0),
        ("End", 3),
    ):
        page.keyboard.press(key)
        assert selected() == names[place]
        assert page.evaluate("document.activeElement.textContent") == names[place]
    assert [tab.get_attribute("tabindex") for tab in tabs.all()] == ["-1", "-1", "-1", "0"]
    page.locator("#verdict a").first.click()
    assert selected() == first
    tabs.nth(2).click()
    assert selected() == names[2]
    panel = tabs.nth(1).get_attribute("aria-controls")
    linked = open_page(f"#{panel}")
    assert linked.locator(f"#{panel}").is_visible()


def test_the_slider_shows_one_budget_at_a_time(open_page):
    page = open_page()
    group = page.locator("[data-slider]:visible").first
    slider = group.get_by_role("slider", name="Budget")
    slider.focus()
    for key, budget in (
        ("Home", "4.5 bits"),
        ("ArrowRight", "5 bits"),
        ("End", "6 bits"),
        ("ArrowLeft", "5 bits"),
    ):
        page.keyboard.press(key)
        assert slider.get_attribute("aria-valuetext") == budget
        assert group.locator("output").inner_text() == budget
        (shown,) = [p for p in group.locator("> [data-value]").all() if p.is_visible()]
        assert shown.get_attribute("data-value") == budget
        assert shown.locator("svg.map").count() == 4


def test_a_cell_of_a_heat_map_is_read_out_as_it_is_stored(open_page, file):
    import json

    page = open_page()
    group = page.locator("[data-slider]:visible").first
    own = group.locator("> [data-value]:visible svg.map[data-rule=ours]")
    own.scroll_into_view_if_needed()
    box = own.locator(".gaps").bounding_box()
    page.mouse.move(box["x"] + 2.5 * 16, box["y"] + 9.5 * 9)  # the third module of block 9
    where = file.parent / "five-250/smollm2_135m/mxfp4_mxfp8"
    schemes = [
        json.loads((where / f"{rule}-4.5/allocation.json").read_text())["layers"][
            "model.layers.9.self_attn.v_proj"
        ]
        for rule in ("ours", "fisher")
    ]
    text = group.locator(".readout").inner_text()
    assert text.startswith("Block 9, self_attn.v_proj: ")
    assert f"ours {schemes[0]}, fisher {schemes[1]}" in text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(open_page, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page = open_page(color_scheme=scheme)
    grounds = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (grounds == "rgb(255, 255, 255)") == (scheme == "light")
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    found = Axe().run(page).response
    assert len(found["passes"]) > 10
    bad = [
        (one["id"], one["impact"], [node["html"][:120] for node in one["nodes"]][:3])
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    ]
    assert bad == []


@pytest.mark.parametrize("javascript", [True, False])
def test_a_phone_scrolls_tables_and_not_the_page(open_page, javascript):
    page = open_page(width=360, java_script_enabled=javascript)
    # Without scripts of its own the page can still be measured, by what is laid out where.
    widest = max(
        box["x"] + box["width"]
        for one in page.locator("h1, h2, h3, h4, .lead, nav, .card, .scroll, figure").all()
        if (box := one.bounding_box())
    )
    assert widest <= 360
    if javascript:
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        inside = page.evaluate(
            "[...document.querySelectorAll('.scroll')].some(one => one.scrollWidth > one.clientWidth)"
        )
        assert inside


def test_without_scripts_everything_is_there(open_page, file):
    page = open_page(java_script_enabled=False)
    panels = page.locator("[data-tab], [data-slider] > [data-value]")
    assert panels.count() > 15 and all(panel.is_visible() for panel in panels.all())
    assert page.locator("[role=tab], [role=slider], th button").count() == 0
    assert page.get_by_role("row", name="fisher 5-bit 5.000 0.").is_visible()


def test_charts_are_not_cut_off(open_page):
    """No text of a figure lies outside of its drawing."""
    page = open_page()
    cut = page.evaluate(
        """() => [...document.querySelectorAll("svg[role=img]")].filter(one => one.getBoundingClientRect().width)
        .flatMap(one => { const all = one.getBoundingClientRect(); return [...one.querySelectorAll("text")].filter(text => {
            const box = text.getBoundingClientRect();
            return box.left < all.left - 1 || box.right > all.right + 1 || box.top < all.top - 1 || box.bottom > all.bottom + 1;
        }).map(text => `${one.getAttribute("aria-label")}: ${text.textContent}`); })"""
    )
    assert cut == []
