"""The report in a real browser: opened offline from disk, sorted, filtered, looked at."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_report_records import record, study_records, with_loss, write_study

from rsauto.records import TrialRecord
from rsauto.report.page import FIGURES, write_report

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
HOSTILE = "</script><script>window.stolen = 1</script><img src=x onerror='window.stolen = 1'>"
READY = "document.documentElement.dataset.ready"
SHOWN = "Array.from(document.querySelectorAll('#trials tbody tr')).filter(row => !row.hidden)"


def all_trials() -> list[TrialRecord]:
    trials = study_records()
    hostile = record(len(trials), 16, 1e-3, target_modules=(HOSTILE,), worker=HOSTILE)
    return [*trials, with_loss(hostile, 2.0)]


def column(name: str) -> str:
    """Numbers of a column, from the top, as the page shows them; '-' is null."""
    heads = "Array.from(document.querySelectorAll('#trials th'))"
    cells = f"row.cells[{heads}.findIndex(head => head.dataset.name === '{name}')]"
    return f"{SHOWN}.map(row => {cells}.dataset.v ?? null).map(v => v && Number(v))"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A tab without a network, on the report of a study with names that try to be markup."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        browser = importlib.import_module("browser")
    program = browser.find_chromium()
    if program is None:
        pytest.skip("no chromium on this machine")
    folder = write_study(tmp_path_factory.mktemp("study"), all_trials(),
                         environment={"base": HOSTILE, HOSTILE: {"a": 1}})  # fmt: skip
    write_report(folder)
    with browser.opened(program) as page:
        page.send("Network.emulateNetworkConditions", offline=True, latency=0,
                  downloadThroughput=0, uploadThroughput=0)  # fmt: skip
        # A window as tall as the page, so that all figures are near it.
        page.resize(1280, 8000)
        page.open(folder / "report.html", READY)
        yield page


@pytest.fixture(autouse=True)
def _complains_of_nothing(tab: Any) -> Iterator[None]:
    yield
    assert tab.complaints() == []


def test_every_figure_is_drawn_and_no_text_became_markup(tab: Any) -> None:
    for key in FIGURES:
        tab.run(f"document.querySelector('input[value={key}]')?.click()")
        assert tab.run(f"document.querySelectorAll('#plot-{key} .main-svg').length") > 0, key
    assert tab.run("window.stolen === undefined && document.querySelectorAll('img').length === 0")
    assert tab.run("document.body.textContent.includes('window.stolen = 1')"), "it is shown as text"


def test_a_click_on_a_head_sorts_and_another_turns_it_round(tab: Any) -> None:
    click = "document.querySelector('#trials th[data-name=eval_loss] button').click()"
    head = "document.querySelector('#trials th[data-name=eval_loss]').getAttribute('aria-sort')"
    for order, is_down in (("ascending", False), ("descending", True)):
        tab.run(click)
        found = tab.run(column("eval_loss"))
        known = [value for value in found if value is not None]
        assert tab.run(head) == order
        assert known == sorted(known, reverse=is_down) and len(set(known)) > 20
        assert found[len(known) :] == [None] * (len(found) - len(known)), "absent ones come last"


@pytest.mark.parametrize(
    ("words", "holds"),
    [
        ("rank>=64 complete", lambda t: t.rank >= 64 and t.outcome == "complete"),
        ("eval_loss<1.3", lambda t: t.eval_loss is not None and t.eval_loss < 1.3),
        ("predicted_peak_bytes<=15MiB", lambda t: t.predicted_peak_bytes <= 15 * 2**20),
        ("outcome=pruned", lambda t: t.outcome == "pruned"),
        ("nothing says this", lambda t: False),
    ],
)
def test_words_and_comparisons_filter(
    tab: Any, words: str, holds: Callable[[TrialRecord], bool]
) -> None:
    tab.run(_fill(words))
    found = tab.run(column("number"))
    trials = all_trials()
    expected = {trial.number for trial in trials if holds(trial)}
    assert set(map(int, found)) == expected
    said = tab.run("document.getElementById('filter').elements.count.value")
    assert said == f"{len(expected)} of {len(trials)} trials"


def test_a_choice_and_its_clearing(tab: Any) -> None:
    tab.run(_fill(""))
    tab.run("""(() => {
        const select = document.querySelector('#filter select[name=outcome]');
        select.value = 'infeasible';
        select.dispatchEvent(new Event('input', { bubbles: true }));
    })()""")
    assert tab.run(f"{SHOWN}.length") == 1
    tab.run("document.querySelector('#filter button[type=reset]').click()")
    tab.run("new Promise(done => setTimeout(done, 50))")
    assert tab.run(f"{SHOWN}.length") == len(all_trials())


def test_an_entry_of_a_legend_hides_its_trace(tab: Any) -> None:
    points = "document.querySelectorAll('#plot-rank .scatterlayer .trace').length"
    before = tab.run(points)
    place = tab.run("""(() => {
        const entry = document.querySelector('#plot-rank .legendtoggle').getBoundingClientRect();
        return [entry.x + entry.width / 2, entry.y + entry.height / 2];
    })()""")
    for kind in ("mousePressed", "mouseReleased"):
        tab.send("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left",
                 clickCount=1)  # fmt: skip
    # Plotly waits to see whether a second click follows.
    tab.run("new Promise(done => setTimeout(done, 700))")
    hidden = (
        "document.getElementById('plot-rank').data.filter(t => t.visible === 'legendonly').length"
    )
    assert tab.run(hidden) == 1 and tab.run(points) == before - 1


def test_dark_phone_and_paper(tab: Any) -> None:
    ink = "getComputedStyle(document.body).color"
    plot = "document.getElementById('plot-rank').layout.font.color"
    light = tab.run(ink), tab.run(plot)
    tab.prefer("dark")
    tab.wait(f"{plot} !== '{light[1]}'", "figures are in the colours of a dark page")
    assert tab.run(ink) != light[0]
    tab.prefer("light")
    tab.wait(f"{plot} === '{light[1]}'", "figures are in the colours of a light page again")
    assert tab.run(ink) == light[0]
    tab.resize(390, 844, is_phone=True)
    tab.wait("document.documentElement.scrollWidth <= 390", "nothing sticks out on a phone")
    tab.resize(1280, 8000)
    width = "document.querySelector('#plot-rank .main-svg').getAttribute('width')"
    tab.run(f"addEventListener('beforeprint', () => {{ window.onPaper = {width} }})")
    assert len(tab.send("Page.printToPDF")["data"]) > 10_000
    assert tab.run("window.onPaper") == "660", "as wide as the paper, whatever the window"
    room = "document.getElementById('plot-rank').clientWidth"
    tab.wait(f"Math.abs({width} - {room}) < 1", "figures have the width of the window again")
    assert tab.run("document.querySelectorAll('.pane[data-paper]').length") == 0


def test_nothing_sticks_out_of_a_page_of_paper(tab: Any) -> None:
    """718 pixels are A4 between its margins; Chromium shrinks every page to fit the widest."""
    tab.resize(718, 8000)
    tab.send("Emulation.setEmulatedMedia", media="print")
    tables = "Array.from(document.querySelectorAll('table')).map(t => t.scrollWidth)"
    assert max(tab.run(tables)) <= 718
    assert tab.run("document.querySelector('details:not([open]) pre').checkVisibility()")
    tab.send("Emulation.setEmulatedMedia", media="")
    tab.resize(1280, 8000)


def _fill(words: str) -> str:
    return f"""(() => {{
        const form = document.getElementById('filter');
        form.elements.words.value = {words!r};
        form.dispatchEvent(new Event('input', {{ bubbles: true }}));
    }})()"""
