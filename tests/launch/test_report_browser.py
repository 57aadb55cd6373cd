"""The report in a real browser, as wide as a phone and as a desk: all is drawn, nothing is cut, nothing is fetched."""

from pathlib import Path

import pytest
import report_samples
from browser import SIZES, Chromium

from commpress.launch import records, report

pytestmark = pytest.mark.slow

MEASURE = """
new Promise(done => setTimeout(done, 300)).then(() => {
  const texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const parent = walker.currentNode.parentElement, box = parent.getBoundingClientRect();
    if (!walker.currentNode.textContent.trim() || !box.width || parent.closest('script, .modebar')) continue;
    texts.push({
      text: walker.currentNode.textContent.trim(),
      size: parseFloat(getComputedStyle(parent).fontSize),
      cut: !parent.closest('.wide') && (box.left < 0 || box.right > document.documentElement.clientWidth),
    });
  }
  const marks = '.scatterlayer .trace path, .barlayer .point path';
  return {
    width: document.documentElement.clientWidth,
    scroll_width: document.documentElement.scrollWidth,
    height: document.documentElement.scrollHeight,
    figures: [...document.querySelectorAll('.plotly-graph-div')].map(figure => ({
      shapes: figure.querySelectorAll(marks).length,
      width: figure.querySelector('.main-svg')?.getBoundingClientRect().width ?? 0,
    })),
    texts,
  };
})
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    path = folder / "report.html"
    path.write_text(report.page([records.read(file) for file in report_samples.write(folder)]), encoding="utf-8")
    return path


@pytest.mark.parametrize("size", SIZES)
def test_the_report_at_the_width_of(chromium: Chromium, page: Path, tmp_path: Path, size: str) -> None:
    chromium.open(page, *SIZES[size])
    found = chromium.evaluate(MEASURE)
    chromium.screenshot(tmp_path / f"{size}.png", SIZES[size][0], found["height"])
    assert (tmp_path / f"{size}.png").stat().st_size > 10_000

    assert not chromium.sent("Runtime.exceptionThrown", "Log.entryAdded")
    assert not [e for e in chromium.sent("Runtime.consoleAPICalled") if e["type"] in ("error", "warning", "assert")]
    fetched = [e["request"]["url"] for e in chromium.sent("Network.requestWillBeSent")]
    assert [url for url in fetched if not url.startswith("data:")] == [page.as_uri()]

    assert found["scroll_width"] <= found["width"] <= SIZES[size][0]
    assert len(found["figures"]) == 14
    for figure in found["figures"]:
        assert figure["shapes"] > 0
        assert 0 < figure["width"] <= found["width"]
    assert min(text["size"] for text in found["texts"]) >= 12
    assert [text["text"] for text in found["texts"] if text["cut"]] == []


CHOOSE = """
(async () => {
  const figure = [...document.querySelectorAll('.plotly-graph-div')].at(-1);
  const press = element => element.dispatchEvent(new MouseEvent('click', {bubbles: true}));
  const before = figure.data[3].hovertext[0];
  press(figure.querySelector('.updatemenu-header'));
  press([...figure.querySelectorAll('.updatemenu-dropdown-button')].at(-1));
  await new Promise(done => setTimeout(done, 300));
  return [before, figure.data[3].hovertext[0]];
})()
"""


def test_the_menu_of_a_timeline_shows_another_step(chromium: Chromium, page: Path) -> None:
    chromium.open(page, *SIZES["desk"])
    assert chromium.evaluate(CHOOSE) == ["bucket 0, step 4, 19.20 ms", "bucket 0, step 3, 22.40 ms"]
    assert not chromium.sent("Runtime.exceptionThrown", "Log.entryAdded")
