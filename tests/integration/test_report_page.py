"""How the report page looks in a browser, at three widths, light and dark: nothing overlaps, leaves its frame, is faint
or empty, a phone shows it within six screens, and every part looks as in the stored reference.

The references (`report_page/`) are whole pages, ten times smaller. Each part is compared by the mean colours of a
coarse grid. With the fonts of the references the tolerance is small. Other fonts shift and wrap lines: there only a
missing part or a wrong ground is found.
After a wanted change, ``python -m tests.integration.test_report_page`` makes them anew; look at the page first.
"""

from __future__ import annotations

import base64
import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from peft_gauge.history.rules import read_rules
from peft_gauge.report.html import page
from peft_gauge.report.html.page_data import gather
from tests.support import chromium, png
from tests.support.paths import RESULTS
from tests.support.report_runs import card_run, many_methods, three_runs

pytestmark = pytest.mark.integration

REFERENCES = Path(__file__).parent / "report_page"
PROBE = (Path(__file__).parent.parent / "support" / "probe.js").read_text(encoding="utf-8")
WIDTHS, SCHEMES = (1400, 800, 390), ("light", "dark")
LOOKS = [(width, scheme) for width in WIDTHS for scheme in SCHEMES]
SMALLER = 0.1
SCREEN = 844  # pixels, the height of a phone that is 390 wide
MOST_SCREENS = 6
COLUMNS, LINES = 12, 8
TOLERANCE, OTHER_FONTS = (2.5, 30.0), (28.0, 130.0)
"""Of 255: the largest mean and the largest single difference of the cells of a part, with the same and other fonts."""
STUMBLES = ("faint", "overlapping", "outside", "empty", "wide")


def planted_page(folder: Path) -> Path:
    """A page of runs with known metrics, which stays the same."""
    three_runs(folder / "results")
    card_run(folder / "results")
    many_methods(folder / "results")
    return written(folder / "results", folder / "planted.html")


def written(results: Path, out: Path) -> Path:
    out.write_text(page.render(gather([results], read_rules())), encoding="utf-8")
    return out


def look(browser: chromium.Chromium, width: int, scheme: str) -> Any:
    """The open page at this width: the probe's findings, once everything is drawn."""
    browser.look_like(width=width, dark=scheme == "dark")
    browser.js(
        """(async () => {
          await new Promise((done) => setTimeout(done, 200)); // a changed width is drawn anew after a moment
          for (let y = 0; y < document.documentElement.scrollHeight; y += 700) {
            scrollTo(0, y);
            await new Promise((done) => requestAnimationFrame(() => setTimeout(done, 10)));
          }
          scrollTo(0, 0);
        })()"""
    )
    canvases = "[...document.querySelectorAll('.canvas')]"
    browser.wait_for(f"{canvases}.every((each) => !each.checkVisibility() || each.dataset.drawn === 'true')")
    return browser.js(PROBE)


def small_picture(browser: chromium.Chromium, width: int, height: int) -> bytes:
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": SMALLER}
    shot = browser.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
    return base64.b64decode(shot["data"])


def differences(page: Seen, scheme: str, width: int) -> dict[str, tuple[float, float]]:
    """For each part of the reference, the mean and the largest difference of a cell; 255 for a part that is gone."""
    known = json.loads((REFERENCES / "regions.json").read_text())[f"{width}-{scheme}"]
    reference = png.decode((REFERENCES / f"{width}-{scheme}.png").read_bytes())
    result = {}
    for name, box in known.items():
        if name not in page.found["regions"]:
            result[name] = (255.0, 255.0)
            continue
        pairs = zip(_cells(reference, box), _cells(page.image, page.found["regions"][name]), strict=True)
        cells = [sum(abs(a - b) for a, b in zip(*pair, strict=True)) / 3 for pair in pairs]
        result[name] = (sum(cells) / len(cells), max(cells))
    return result


def _cells(image: png.Image, box: png.Box) -> list[list[float]]:
    return image.grid([side * SMALLER for side in box], COLUMNS, LINES)


def has_its_fonts(found: Any) -> bool:
    """Whether this machine's fonts are as wide as those of the references."""
    return bool(found["fonts"] == json.loads((REFERENCES / "regions.json").read_text())["fonts"])


def is_other(difference: tuple[float, float], found: Any) -> bool:
    mean, cell = TOLERANCE if has_its_fonts(found) else OTHER_FONTS
    return difference[0] > mean or difference[1] > cell


@dataclass(frozen=True)
class Seen:
    """The probe's findings on a page, and its small picture."""

    found: Any
    image: png.Image


def seen(browser: chromium.Chromium, width: int, scheme: str) -> Seen:
    found = look(browser, width, scheme)
    return Seen(found, png.decode(small_picture(browser, width, found["height"])))


@pytest.fixture(scope="module")
def planted(browser: chromium.Chromium, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], Seen]:
    """The page of known runs in all its looks; it stays open at 800 pixels, light."""
    browser.open(planted_page(tmp_path_factory.mktemp("planted")).as_uri())
    found = {each: seen(browser, *each) for each in LOOKS}
    assert browser.errors == []
    assert browser.js("window.reportFailures") == []
    look(browser, 800, "light")
    return found


def assert_nothing_is_in_the_way(found: Any, width: int) -> None:
    assert {name: found[name] for name in STUMBLES} == {name: [] for name in STUMBLES}
    if width == min(WIDTHS):
        assert found["height"] <= MOST_SCREENS * SCREEN


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_nothing_is_in_a_readers_way(width: int, scheme: str, planted: dict[tuple[int, str], Seen]) -> None:
    assert_nothing_is_in_the_way(planted[width, scheme].found, width)


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_every_part_looks_as_in_the_reference(width: int, scheme: str, planted: dict[tuple[int, str], Seen]) -> None:
    page = planted[width, scheme]
    compared = differences(page, scheme, width)
    assert len(compared) == 9
    assert {name: each for name, each in compared.items() if is_other(each, page.found)} == {}


FAULTS = {
    "a part is gone": ("grid", "article .scroll { display: none !important }"),
    "a plot lost its marks": ("memory", ".mark-rect { visibility: hidden }"),
    "colours of the wrong scheme": ("recommendation", ".recommendation { background: #1a2636 !important }"),
    "bars of one colour": ("memory", ".mark-rect path { fill: #888 !important }"),
    "every second card is lost": ("cards", ".card:nth-child(2n) { visibility: hidden }"),
}
STYLES = {
    "faint": ".about summary { color: #aaa !important }",
    "overlapping": ".role-axis-label text { font-size: 60px !important }",
    "outside": ".role-axis-title text { font-size: 90px !important }",
    "empty": "#changed > :not(h2) { display: none !important }",
    "wide": ".cards { width: 3000px }",
}


@contextlib.contextmanager
def styled(browser: chromium.Chromium, style: str) -> Iterator[None]:
    text = json.dumps(style)
    browser.js(
        f"document.head.append(Object.assign(document.createElement('style'), {{ id: 'x', textContent: {text} }}))"
    )
    yield
    browser.js("document.getElementById('x').remove()")


@pytest.mark.parametrize("fault", FAULTS)
def test_the_reference_finds_a_planted_fault(
    browser: chromium.Chromium, planted: dict[tuple[int, str], Seen], fault: str
) -> None:
    part, style = FAULTS[fault]
    with styled(browser, style):
        found = browser.js(PROBE)
        image = png.decode(small_picture(browser, 800, found["height"]))
    if not has_its_fonts(found) and part not in ("grid", "recommendation"):
        pytest.skip("other fonts than the references': their tolerance is too wide for this fault")
    assert is_other(differences(Seen(found, image), "light", 800)[part], found)


@pytest.mark.parametrize("stumble", STUMBLES)
def test_the_probe_finds_a_planted_fault(
    browser: chromium.Chromium, planted: dict[tuple[int, str], Seen], stumble: str
) -> None:
    with styled(browser, STYLES[stumble]):
        assert browser.js(PROBE)[stumble]


@pytest.mark.slow
def test_the_page_of_this_repositorys_runs_is_as_good(browser: chromium.Chromium, tmp_path: Path) -> None:
    browser.errors.clear()
    browser.open(written(RESULTS, tmp_path / "saved.html").as_uri())
    for width, scheme in zip(WIDTHS, ("light", "dark", "light"), strict=True):
        assert_nothing_is_in_the_way(look(browser, width, scheme), width)
    assert browser.errors == []
    assert browser.js("window.reportFailures") == []


def main() -> None:
    """Make the references anew."""
    path = chromium.find()
    assert path is not None, "no Chromium on the path"
    regions: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        browser = chromium.Chromium(path, Path(folder) / "profile")
        browser.open(planted_page(Path(folder)).as_uri())
        for width, scheme in LOOKS:
            found = look(browser, width, scheme)
            REFERENCES.mkdir(exist_ok=True)
            (REFERENCES / f"{width}-{scheme}.png").write_bytes(small_picture(browser, width, found["height"]))
            regions[f"{width}-{scheme}"] = {
                name: [round(side, 1) for side in box] for name, box in found["regions"].items()
            }
            regions["fonts"] = found["fonts"]
        browser.close()
    (REFERENCES / "regions.json").write_text(json.dumps(regions, indent=1) + "\n")


if __name__ == "__main__":
    main()
