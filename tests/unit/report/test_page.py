"""The page: whole and by itself, its numbers those of the saved runs, and, where a Chromium is there, how it behaves.

``PEFT_GAUGE_CHROMIUM`` names the browser; without one, only what can be read in the file is checked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from peft_gauge.history.comparison import compare
from peft_gauge.history.reader import read_run
from peft_gauge.history.rules import read_rules
from peft_gauge.history.schema import CONTROL_SAMPLES, SAMPLES
from peft_gauge.medians import median_interval
from peft_gauge.report.charts.panels import PLOTTED
from peft_gauge.report.html import page, page_script_data
from peft_gauge.report.html.page_data import gather
from tests.support.colours import contrast
from tests.support.report_runs import card_run, three_runs

if TYPE_CHECKING:
    from tests.support import chromium

# Builds, plans or trains models: seconds, which are too long for the unit tests.
pytestmark = pytest.mark.integration

VOID = {"meta", "link", "br", "img", "input", "hr"}
UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1.0, "s": 1.0, "ms": 1e-3, "µs": 1e-6, "%": 0.01}
HOSTILE = "benchmarks/test_x.py::test_y[</script><img src=x onerror=alert(1)>-\u2028]"


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(each if isinstance(each, str) else each.text for each in self.children)

    def all(self, tag: str) -> Iterator[Element]:
        """Every element of this kind in it."""
        for each in self.children:
            if isinstance(each, Element):
                if each.tag == tag:
                    yield each
                yield from each.all(tag)

    def one(self, tag: str, **attributes: str) -> Element:
        wanted = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
        (found,) = (each for each in self.all(tag) if wanted.items() <= each.attributes.items())
        return found


class Strict(HTMLParser):
    """Builds a tree and refuses what a browser would have to mend."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute of {tag} stands twice"
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parsed(text: str) -> Element:
    parser = Strict()
    parser.feed(text)
    parser.close()
    assert parser.open == [parser.root], f"never closed: {[each.tag for each in parser.open[1:]]}"
    return parser.root


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "results"
    three_runs(folder)
    card_run(folder)
    hostile = sorted((folder / "cpu-box").iterdir())[-1]
    document = json.loads(hostile.read_text())
    reason = {
        "id": HOSTILE,
        "benchmark": "x",
        "outcome": "failed",
        "reason": "<b>1 & 2</b>",
        "metrics": {"method": "'\"<", "loss": 1.5},
    }
    document["peft_gauge"]["cases"].append(reason)
    hostile.write_text(json.dumps(document))
    (folder / "cpu-box" / "0008_broken.json").write_text("{")
    return folder


@pytest.fixture(scope="module")
def text(results: Path) -> str:
    return page.render(gather([results], read_rules()))


@pytest.fixture(scope="module")
def tree(text: str) -> Element:
    return parsed(text)


@pytest.fixture(scope="module")
def data(tree: Element) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tree.one("script", id="data").text)
    return found


# What stands in the file


def test_nothing_is_loaded_and_nothing_may_be(tree: Element) -> None:
    loading = {"src", "href", "srcset", "data", "action", "poster", "background", "formaction", "xlink:href"}
    for element in every(tree):
        for name, value in element.attributes.items():
            if name in loading:
                assert (value or "").startswith("#"), f"<{element.tag} {name}={value!r}>"
            assert not name.startswith("on"), f"<{element.tag} {name}>"
    assert not [element.tag for element in every(tree) if element.tag in ("link", "img", "iframe", "object", "base")]
    assert not re.search(r"@import|url\(", tree.one("style").text)
    policy = tree.one("meta", http_equiv="Content-Security-Policy").attributes["content"] or ""
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy


def every(element: Element) -> Iterator[Element]:
    for child in element.children:
        if isinstance(child, Element):
            yield child
            yield from every(child)


def test_names_of_cases_are_text_and_never_markup(tree: Element) -> None:
    (row,) = (row for row in tree.one("table", id="t-outcomes").all("tr") if "onerror" in row.text)
    assert row.one("th").text == HOSTILE.removeprefix("benchmarks/")
    assert "<b>1 & 2</b>" in row.text
    assert row.attributes["data-method"] == "'\"<"


def test_the_page_is_small_but_for_vega(text: str) -> None:
    assert len(text.encode()) - len(page.vega().encode()) < 180_000


def test_every_plot_has_a_name_and_a_table(tree: Element) -> None:
    holders = [each for each in tree.all("div") if "data-plot" in each.attributes]
    assert {each.attributes["data-plot"] for each in holders} == {*PLOTTED, "history"}
    for holder in holders:
        assert holder.attributes["aria-label"]
        described = holder.attributes["aria-describedby"]
        assert described
        assert tree.one("p", id=described).text
    for kind in PLOTTED:
        (around,) = (
            each for each in tree.all("details") if any(one.tag == "div" for one in tables_of(each, f"t-{kind}"))
        )
        assert "Data as a table" in next(around.all("summary")).text


def tables_of(details: Element, name: str) -> list[Element]:
    """The scrolling part of the table ``name``, if it is directly in ``details``."""
    parts = [each for each in details.children if isinstance(each, Element) and each.tag == "div"]
    return [each for each in parts if any(table.attributes.get("id") == name for table in each.all("table"))]


def test_tables_and_controls_can_be_heard(tree: Element) -> None:
    for table in tree.all("table"):
        assert table.one("caption").text
        assert all(each.attributes.get("scope") in ("col", "row") for each in table.all("th"))
        columns = len(list(table.one("thead").all("th")))
        for row in table.one("tbody").all("tr"):
            assert len(list(row.all("th"))) == 1
            assert len(list(row.all("td"))) == columns - 1
    labelled = [select for label in tree.all("label") for select in label.all("select")]
    assert (
        len(labelled) == len(list(tree.all("select"))) == 11
    )  # filters, the setup, five plots, a cost, history's axis
    assert [each.attributes["type"] for label in tree.all("label") for each in label.all("input")] == ["search"]
    ids = [each.attributes["id"] for each in every(tree) if "id" in each.attributes]
    assert len(ids) == len(set(ids))
    assert tree.one("html").attributes["lang"] == "en"
    assert tree.one("p", id="status").attributes["aria-live"] == "polite"


def test_headings_are_the_targets_of_the_links(tree: Element) -> None:
    for link in tree.one("nav").all("a"):
        target = (link.attributes["href"] or "").removeprefix("#")
        assert tree.one("section", id=target).one("h2", id=f"h-{target}").text.endswith("?")
        assert link.text


def numbers(value: Any) -> Iterator[float]:
    """Every number in what JSON held."""
    if isinstance(value, dict):
        for each in value.values():
            yield from numbers(each)
    elif isinstance(value, list):
        for each in value:
            yield from numbers(each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def as_shown(words: str) -> tuple[float, float]:
    """The number that the words stand for, and half of its last digit."""
    match = re.fullmatch(r"([+-]?[\d,]+(?:\.(\d+))?)(?: (\S+))?", words)
    assert match, words
    scale = UNITS[match[3]] if match[3] else 1.0
    return float(match[1].replace(",", "")) * scale, 0.5 * 10.0 ** -len(match[2] or "") * scale


def test_every_number_is_the_saved_one_to_its_last_digit(tree: Element, results: Path) -> None:
    runs = [json.loads(path.read_text()) for path in results.glob("*/*.json") if "broken" not in path.name]
    known = set(numbers(runs)) | set(derived(runs)) | set(judged(results))
    shown = list(tree.all("data"))
    assert len(shown) > 100
    for each in shown:
        value = float(each.attributes["value"] or "nan")
        about, half = as_shown(each.text)
        assert abs(value - about) <= half * 1.000001, each
        assert value in known, each


def derived(runs: list[dict[str, Any]]) -> Iterator[float]:
    """What the page itself counts or adds up: a bar, rounds, processes, cases, verdicts, intervals of ratios."""
    for run in runs:
        cases = run["peft_gauge"]["cases"]
        yield from range(len(cases) * 20)
        for case in cases:
            metrics = case["metrics"]
            for holder in (metrics, metrics.get("plan", {})):
                yield sum(holder.get("peak_by_category", {}).values())
            for metric, processes in metrics.get(SAMPLES, {}).items():
                rounds = [each for process in processes for each in process]
                yield len(rounds)
                controls = [each for process in metrics.get(CONTROL_SAMPLES, {}).get(metric, []) for each in process]
                if len(controls) == len(rounds):
                    yield from median_interval([a / b for a, b in zip(rounds, controls, strict=True)]) or ()


def judged(results: Path) -> Iterator[float]:
    """The times of a comparison, which are those of its own estimate."""
    runs = [read_run(path) for path in sorted((results / "cpu-box").glob("000[123]*"))]
    for base, new in pairwise(runs):
        yield from numbers([[row.before, row.after] for row in compare(base, new, read_rules()).rows])


def test_the_tables_say_what_the_runs_say(tree: Element, results: Path) -> None:
    newest = read_run(sorted((results / "cpu-box").glob("0003*"))[0])
    claims = {each.attributes["data-claim"]: each for each in tree.all("details") if "data-claim" in each.attributes}
    assert set(claims) == {claim["id"] for claim in newest.claims}
    assert claims["lora-memory"].one("summary").text.startswith("LoRA needs < 2 GB & no more. ✗ 1 refuted")
    assert "✗ refuted" in claims["lora-memory"].one("tbody").text
    decided = [
        [cell.text for cell in every(row) if cell.tag in ("td", "th")][:5]
        for row in tree.one("table", id="t-decided").one("tbody").all("tr")
    ]
    assert ["▼ better", "test_speed.py::test_step[lora-toy-cpu]", "step_seconds", "3.01 s", "1.50 s"] in decided
    assert ["▲ worse", "claim::lora-memory[toy]", "verdict", "holds", "refuted"] in decided
    machines = tree.one("table", id="t-machines")
    assert "none: no comparable earlier run" in machines.text
    assert "0008_broken.json is truncated" in tree.one("section", id="sources").text


def test_the_history_holds_every_run_once(data: dict[str, Any]) -> None:
    past = data["history"]
    assert [(past["machines"][run[0]], run[1]) for run in past["runs"]] == [
        ("GPU-box", "0001"),
        ("cpu-box", "0001"),
        ("cpu-box", "0002"),
        ("cpu-box", "0003"),
    ]
    peaks = [
        (past["at"][at], values)
        for machine, case, metric, at, values, *_ in past["series"]
        if past["machines"][machine] == "cpu-box"
        and past["cases"][case] == ["benchmarks/test_memory.py::test_peak[lora-toy-cpu]", "lora", "toy"]
        and past["metrics"][metric] == "tensor_peak_bytes"
    ]
    assert peaks == [([1, 2, 3], [1_234_588_370, [1_239_708_370, 2]])]


def test_versions_are_told_by_what_differs() -> None:
    one, other = {"torch": "2", "peft": "1"}, {"torch": "3", "peft": "1", "extra": None}
    assert page_script_data.differing([one, other]) == ["torch 2", "torch 3"]
    assert page_script_data.differing([one, one | {"new": "5"}]) == ["new absent", "new 5"]
    assert page_script_data.differing([one]) == ["the same libraries in all runs"]


def test_no_row_and_no_round_is_embedded_twice(data: dict[str, Any]) -> None:
    assert all("datasets" not in spec and "values" not in json.dumps(spec["layer"]) for spec in data["specs"].values())
    assert "sampled" not in json.dumps(data)


def test_the_page_opens_with_what_to_use_and_what_changed(tree: Element) -> None:
    sections = [each.attributes["id"] for each in tree.one("main").all("section") if "id" in each.attributes]
    assert sections[:2] == ["choice", "changed"]
    first = next(tree.one("section", id="choice").all("article"))
    assert first.one("table").attributes["id"] == "t-grid-0"
    cards = [each.one("h3").text for each in first.all("section")]
    assert cards == ["Fits?", "Fastest?", "Cheapest?", "Changed?", "Claims?"]
    changes = [each.text for each in tree.one("ul", **{"class": "changes"}).all("li")]
    (halved,) = (each for each in changes if "step" in each and "lora" in each)
    assert halved.startswith("▼ -50 % better")
    assert "3.00 s → 1.50 s" in halved or "3.01 s → 1.50 s" in halved


# In a browser


@pytest.fixture(scope="module")
def address(text: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page") / "report.html"
    out.write_text(text, encoding="utf-8")
    return out.as_uri()


@pytest.fixture
def opened(browser: chromium.Chromium, address: str) -> Iterator[chromium.Chromium]:
    """The page, just opened; at the end no error and no request may have come from it."""
    browser.look_like(width=1200)
    browser.errors.clear()
    browser.requests.clear()
    browser.open(address)
    yield browser
    assert browser.errors == []
    assert browser.js("window.reportFailures") == []
    assert [each for each in browser.requests if not each.startswith((address, "about:blank", "data:"))] == []


def scroll_through(browser: chromium.Chromium) -> None:
    """Look at everything, so that everything is drawn."""
    browser.js(
        """(async () => {
          for (let y = 0; y < document.documentElement.scrollHeight; y += 300) {
            scrollTo(0, y);
            await new Promise((done) => requestAnimationFrame(() => setTimeout(done, 10)));
          }
        })()"""
    )
    browser.wait_for(
        "[...document.querySelectorAll('.canvas')]"
        ".every((each) => !each.checkVisibility() || each.querySelector('svg'))"
    )


def visible(browser: chromium.Chromium, table: str) -> list[str]:
    found: list[str] = browser.js(
        f"[...document.querySelectorAll('#{table} tbody tr')].filter((row) => !row.hidden)"
        ".map((row) => row.cells[0].textContent)"
    )
    return found


def choose(browser: chromium.Chromium, name: str, value: str) -> None:
    browser.js(
        f"(() => {{ const select = document.querySelector('select[name={name}]'); select.value = {json.dumps(value)};"
        " select.dispatchEvent(new Event('change', { bubbles: true })); })()"
    )


def test_every_plot_is_drawn(opened: chromium.Chromium, data: dict[str, Any]) -> None:
    opened.js("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    scroll_through(opened)
    drawn = opened.js(
        "[...document.querySelectorAll('figure [role=img]')].map((each) => each.getAttribute('aria-label'))"
    )
    assert len(drawn) == len(PLOTTED) + 1
    for kind, panels in data["panels"].items():
        options = opened.js(f"[...document.querySelector('select[name={kind}]').options].map((each) => each.value)")
        if kind == "quality":
            assert options == ["Rank? · toy"]
            continue
        assert set(options) == set(panels)
        assert any(panel in label for label in drawn for panel in panels)
    # One segment for each category of each bar of the panel that is shown.
    panel = opened.js("document.querySelector('select[name=memory]').value")
    panels = data["rows"]["memory"]["panel"]
    expected = sum(panels["texts"][at] == panel for at in panels["at"])
    assert opened.js("document.querySelectorAll('[data-plot=memory] .mark-rect path').length") == expected > 0


def test_filters_act_on_everything(opened: chromium.Chromium) -> None:
    assert sorted(visible(opened, "t-times")) == ["full", "lora"]
    before = opened.js("document.querySelectorAll('tbody tr').length")
    choose(opened, "method", "lora")
    assert visible(opened, "t-times") == ["lora"]
    claims = (
        "[...document.querySelectorAll('details.claim')].filter((each) => !each.hidden).map((c) => c.dataset.claim)"
    )
    assert opened.js(claims) == ["lora-memory", "other"]  # a claim is about no method
    card = "[...document.querySelectorAll('article:not([hidden]) .card')].map((each) => each.innerText)"
    assert "lora: ✓ from 8 GB on" not in opened.js(card)[0]  # nothing was planned for a GPU
    assert opened.js(card)[1].startswith("Fastest?\nlora:\n1.50 ×")
    assert not [each for each in opened.js(changes_shown()) if "full" in each]
    choose(opened, "method", "")
    choose(opened, "model", "big")
    assert visible(opened, "t-times") == []
    assert visible(opened, "t-memory") == ["qlora"]
    assert opened.js("document.querySelector('[data-plot=times]').textContent") == "No row passes the filters."
    assert opened.js("document.querySelector('select[name=setup]').value").startswith("big, planned, 1×64 tokens")
    assert opened.js("document.querySelectorAll('article.setup:not([hidden])').length") == 1
    assert opened.js("!document.getElementById('no-change').hidden")
    told = "[...document.querySelectorAll('[data-verdict]')].map((each) => [each.dataset.verdict, each.value])"
    assert opened.js(told) == [["refuted", "0"], ["inconclusive", "1"]]  # a claim about any model stays
    told = opened.js("document.getElementById('status').textContent")
    shown = opened.js("[...document.querySelectorAll('tbody tr')].filter((row) => !row.hidden).length")
    assert told.startswith(f"{shown} of ")
    assert shown < before
    opened.js("document.querySelector('form.filters button').click()")
    opened.wait_for("[...document.querySelectorAll('#t-times tbody tr')].every((row) => !row.hidden)")
    assert opened.js("document.querySelector('select[name=model]').value") == ""


def changes_shown() -> str:
    return (
        "[...document.querySelectorAll('ul.changes li')].filter((each) => !each.hidden).map((each) => each.innerText)"
    )


def test_the_grid_sorts_by_any_column(opened: chromium.Chromium) -> None:
    names = "[...document.querySelectorAll('article:not([hidden]) tbody th')].map((each) => each.textContent)"
    button = "document.querySelectorAll('article:not([hidden]) thead button')[{}]"
    heading = button.format(2) + ".closest('th').getAttribute('aria-sort')"
    opened.js(button.format(2) + ".click()")  # step / base forward
    assert (opened.js(names), opened.js(heading)) == (["lora", "full"], "ascending")
    opened.js(button.format(2) + ".click()")
    assert (opened.js(names), opened.js(heading)) == (["full", "lora"], "descending")
    opened.js(button.format(1) + ".click()")  # peak memory: full ran out of it, so it comes last
    assert opened.js(names) == ["lora", "full"]


def test_the_search_and_the_tree_find_a_metric(opened: chromium.Chromium) -> None:
    opened.js(
        "(() => { const find = document.querySelector('input[name=find]'); find.value = 'lora tensor peak';"
        " find.dispatchEvent(new Event('input', { bubbles: true })); })()"
    )
    hits = opened.js("[...document.querySelectorAll('#hits button')].map((each) => each.textContent)")
    assert hits[0] == "tensor_peak_bytes of test_memory.py::test_peak[lora-toy-cpu]"
    opened.js("document.querySelector('#hits button').click()")
    assert opened.js("document.querySelector('#t-history caption').textContent") == hits[0]
    assert "metric=tensor_peak_bytes" in opened.js("location.hash")
    opened.js("document.getElementById('browse').open = true")
    branch = (
        "[...document.querySelectorAll('#tree > li > details')].find((d) => d.innerText.startsWith('test_speed.py'))"
    )
    opened.js(f"{branch}.open = true")
    opened.wait_for(f"{branch}.querySelectorAll('ul details').length === 2")
    opened.js(f"[...{branch}.querySelectorAll('ul details')].find((d) => d.innerText.includes('full')).open = true")
    opened.wait_for(f"{branch}.querySelector('ul button') !== null")
    opened.js(f"[...{branch}.querySelectorAll('ul button')].find((b) => b.textContent === 'step_seconds').click()")
    assert opened.js("document.querySelector('#t-history caption').textContent").startswith("step_seconds of")


def test_a_link_restores_what_was_chosen(opened: chromium.Chromium, address: str) -> None:
    choose(opened, "machine", "cpu-box")
    choose(opened, "method", "full")
    link = opened.js("document.getElementById('link').href")
    expected = visible(opened, "t-methods")
    opened.open(address)
    assert visible(opened, "t-methods") != expected
    opened.open(link)
    assert visible(opened, "t-methods") == expected == ["full"]
    assert opened.js("document.querySelector('select[name=machine]').value") == "cpu-box"
    links = opened.js("[...document.querySelectorAll('nav a')].map((each) => each.hash)")
    assert all("method=full" in each and "machine=cpu-box" in each for each in links)


def test_a_filter_that_is_gone_shows_everything(opened: chromium.Chromium, address: str) -> None:
    opened.open(f"{address}#method=never-heard-of&section=times")
    assert sorted(visible(opened, "t-times")) == ["full", "lora"]
    assert opened.js("document.activeElement.id") == "h-times"


def test_the_history_shows_values_changes_and_versions(opened: chromium.Chromium, address: str) -> None:
    link = "[...document.querySelectorAll('#t-changes a')].find((a) => a.hash.includes('metric=tensor_peak_bytes'))"
    opened.js(f"{link}.click()")
    opened.wait_for("document.querySelector('#t-history caption')?.textContent.startsWith('tensor_peak_bytes')")
    choose(opened, "machine", "cpu-box")
    rows = opened.js(
        "[...document.querySelectorAll('#t-history tbody tr')].map((row) => [row.cells[0].textContent,"
        " Number(row.querySelector('data').value), row.cells[3].textContent, row.cells[6].textContent,"
        " row.cells[7].textContent])"
    )
    assert rows == [
        ["0001", 1_234_588_370, "1.23 GB", "–", "torch 2.13.0, peft 0.21.2"],
        ["0002", 1_239_708_370, "1.24 GB", "worse", "torch 2.14.0, peft 0.21.2"],
        ["0003", 1_239_708_370, "1.24 GB", "–", "torch 2.14.0, peft 0.21.2"],
    ]
    words = "[...document.querySelectorAll('[data-plot=history] svg text')].map((each) => each.textContent)"
    opened.js("document.querySelector('[data-plot=history]').scrollIntoView()")
    marks = "[...document.querySelectorAll('[data-plot=history] .mark-symbol.role-mark path')]"
    opened.wait_for(f"{marks}.some((each) => each.getAttribute('fill') === '#B34700')")  # the change for the worse
    choose(opened, "across", "versions")
    opened.wait_for(f"['torch 2.13.0', 'torch 2.14.0'].every((each) => {words}.includes(each))")  # peft is the same


def test_the_interval_of_a_time_is_in_its_history(opened: chromium.Chromium, results: Path, address: str) -> None:
    opened.open(f"{address}#case=benchmarks/test_speed.py::test_step[lora-toy-cpu]&metric=step_seconds")
    last = opened.js(
        "[...[...document.querySelectorAll('#t-history tr')].at(-1).querySelectorAll('data')].map((d) => d.value)"
    )
    (time,) = (row for row in gather([results], read_rules()).rows("times") if row["method"] == "lora")
    assert [float(value) for value in last] == pytest.approx(
        [time["seconds"], time["low_seconds"], time["high_seconds"]], rel=1e-6
    )


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320])
def test_it_fits_the_screen_and_can_be_read(opened: chromium.Chromium, address: str, width: int, dark: bool) -> None:
    opened.look_like(width=width, dark=dark)
    opened.open(address)
    scroll_through(opened)
    assert opened.js("document.documentElement.scrollWidth <= innerWidth")
    ground, words = opened.js(
        "(({ backgroundColor, color }) => [backgroundColor, color])(getComputedStyle(document.body))"
    )
    assert contrast(ground, words) > 7
    label = opened.js("getComputedStyle(document.querySelector('.canvas svg .role-axis-label text')).fill")
    assert contrast(ground, label) > 4.5
    signs = opened.js("[...document.querySelectorAll('.v, a, summary')].map((each) => getComputedStyle(each).color)")
    assert min(contrast(ground, sign) for sign in signs) > 4.5


def test_the_keyboard_reaches_everything_and_focus_is_seen(opened: chromium.Chromium) -> None:
    wanted = opened.js(
        "[...document.querySelectorAll('a[href], select, input, button, summary')]"
        ".filter((each) => each.checkVisibility()).length"
    )
    reached = set()
    for _ in range(wanted + 40):
        opened.press("Tab")
        tag = opened.js("document.activeElement.localName")
        if tag == "body":
            break
        reached.add(opened.js("[...document.querySelectorAll('*')].indexOf(document.activeElement)"))
        assert opened.js("getComputedStyle(document.activeElement).outlineStyle") == "solid", tag
    assert len(reached) >= wanted
    opened.js("document.querySelector('summary').focus()")
    opened.press("Enter")
    assert opened.js("document.querySelector('details').open")
