"""The report: what its figures say, that they are safe to look at, and what a browser makes of the page."""

import shutil
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from support import ADAPTER, BASE, CALIBRATION, FIXTURES, HELDOUT, refused, run

import lorapack
from lorapack.core.adapter import size
from lorapack.core.plan import Choice
from lorapack.core.report import GateOutcome, Interval, ModuleRow, TypeRow, to_json
from lorapack.report import html, markdown
from lorapack.report.scale import linear, logarithmic
from lorapack.report.view import grid, layer, size_against_quality
from lorapack.sweep import Point

SHOTS = FIXTURES.parent / "build" / "screenshots"  # CI keeps them
HOSTILE = (
    '"><img src=http://example.invalid/x onerror=alert(1)> {{ 7 * 7 }} [a](http://b) `|` @everyone '
    "<script>alert(2)</script>"
)
GATES = (
    GateOutcome("min-retained", 0.99, Interval(0.4, 0.3, 0.5), 0.3, False),
    GateOutcome("max-params", 50_000, Interval(39_040, 39_040, 39_040), 39_040, True),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small compression with everything in it: a search, sharing, a recovery, figures of quality."""
    folder = tmp_path_factory.mktemp("report")
    for source, rows in ((CALIBRATION, 30), (HELDOUT, 8)):
        (folder / source.name).write_text("".join(source.read_text().splitlines(keepends=True)[:rows]))
    done = lorapack.compress_adapter(
        lorapack.read_adapter(ADAPTER),
        str(folder / CALIBRATION.name),
        str(BASE),
        eval_data=str(folder / HELDOUT.name),
        name="shakespeare",
        method="lora-drop",
        retain=0.3,
        recover_steps=4,
        max_length=48,
    )
    command = ["lorapack", "compress", "my adapter", "--retain", "30%"]
    return replace(done, report=replace(done.report, gates=GATES, run={**done.report.run, "command": command}))


@pytest.fixture(scope="module")
def report(made):
    return made.report


@pytest.fixture(scope="module")
def hostile(report):
    """The same with a name in it, wherever a checkpoint or a user can put one, that wants to be more than text."""
    first, *others = report.modules
    choices = (replace(report.plan.choices[0], module=HOSTILE, reason=HOSTILE, group=HOSTILE), *report.plan.choices[1:])
    return replace(
        report,
        base_model=HOSTILE,
        adapter={**report.adapter, "name": HOSTILE},
        modules=(replace(first, module=HOSTILE, type=HOSTILE), *others),
        types=(replace(report.types[0], type=HOSTILE), *report.types),
        plan=replace(report.plan, method=HOSTILE, choices=choices, options={HOSTILE: HOSTILE}),
        run={**report.run, "command": ["lorapack", HOSTILE]},
    )


def large(report):
    """As of a model with 80 layers of seven types."""
    types = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    names = [(f"model.layers.{n}.part.{kind}", kind, n) for n in range(80) for kind in types]
    rows = tuple(ModuleRow(m, kind, 64, (n * 7) % 65, 1_048_576, 16_384 * ((n * 7) % 65), 0.5) for m, kind, n in names)
    choices = tuple(
        Choice(row.module, "keep" if row.rank_after else "drop", row.rank_after or None, None, 1.0 + n, "a reason")
        for row, (_, _, n) in zip(rows, names, strict=True)
    )
    spectrum = tuple(0.9**n for n in range(64))
    kinds = tuple(TypeRow(kind, 80, 79, 0, 1, 10**8, 10**7, spectrum, spectrum[:32]) for kind in types)
    return replace(report, modules=rows, types=kinds, plan=replace(report.plan, choices=choices, groups={}))


def sweep(report):
    """Points as `sweep` gives them, two methods at three sizes, and one that has no plan so small."""
    found = [
        Point(method, f"{share:.0%}", 1, share, replace(report.quality, retained=Interval(y, y - 0.02, y + 0.02)))
        for method, gain in (("rank", 0.9), ("rank:metric=weight", 0.7))
        for share, y in ((0.5, gain), (0.25, gain * 0.8), (0.12, gain * 0.5))
    ]
    return (*found, Point("lora-drop", "1%", 0, 0.0, None, "too small"))


# The figures


def test_the_spectra_and_energies_are_those_of_the_updates_themselves(made):
    before, after, report = lorapack.read_adapter(ADAPTER), made.adapter, made.report

    def truth(adapter, module):
        factors = adapter.factors(module)
        return torch.linalg.svdvals(adapter.scale(module) * factors.B.double() @ factors.A.double())[: factors.rank]

    for row in report.modules:
        values = truth(before, row.module) ** 2
        assert row.energy == pytest.approx(float(values[: row.rank_after].sum() / values.sum()), rel=1e-3)
    for kind in report.types:
        members = [row.module for row in report.modules if row.type == kind.type]
        for adapter, said in ((before, kind.spectrum_before), (after, kind.spectrum_after)):
            mean = torch.stack([truth(adapter, module) ** 2 for module in members]).mean(dim=0).sqrt()
            assert said == pytest.approx(mean.tolist(), rel=1e-3)
    own = sum(row.parameters_after for row in report.modules)
    pairs = sum(after.pool[name].parameters for name in after.groups)
    assert own + pairs == size(after).parameters == sum(row.parameters_after for row in report.types)


def test_a_cell_of_the_grid_says_what_happened_to_its_modules(report):
    found = grid(report)
    assert sum(cell.share for cell in found.cells) == pytest.approx(1)
    assert max(cell.importance for cell in found.cells) == max(found.of_layer.values()) == 1
    shared = {choice.module for choice in report.plan.choices if choice.action == "share"}
    for cell in found.cells:
        (module,) = cell.modules
        assert (layer(module), cell.state) == (cell.layer, "shared" if module in shared else "kept")
    several = replace(report, modules=tuple(replace(row, module="layers.0.experts.9") for row in report.modules[:1]))
    assert [cell.layer for cell in grid(several).cells] == [0]
    assert grid(replace(report, modules=())) is None and layer("head") == -1


@given(st.lists(st.floats(1e-9, 1e9), min_size=1))
def test_every_value_lies_on_its_axis_in_order_and_the_ticks_too(values):
    for axis in (linear(values), logarithmic(values)):
        places = [axis.at(value) for value in sorted(values)]
        assert places == sorted(places) and places[0] >= 0 and places[-1] <= 1
        assert all(axis.low <= tick <= axis.high for tick in axis.ticks) and len(axis.ticks) <= 12


def test_size_against_quality_has_the_search_the_sweep_and_the_result(report):
    chart = size_against_quality(report, sweep(report))
    assert [series.name for series in chart.series] == [
        "rank",
        "rank:metric=weight",
        "tried, lower bound",
        "this result",
    ]
    assert chart.series[-1].points[0][0] == report.after.parameters / report.before.parameters
    assert len(chart.series[2].points) == len(report.settings["retain"]["tried"])
    assert size_against_quality(replace(report, settings={}, quality=None)) is None


# Nothing in it is more than text


def test_what_a_checkpoint_names_is_text_in_the_markdown(hostile):
    shown = MarkdownIt("commonmark").enable("table").render(markdown(hostile))
    assert "<script" not in shown and "<img" not in shown and "<a " not in shown and "@everyone" in shown
    assert "49" not in markdown(hostile).split("compressed")[0]
    for line in markdown(hostile).splitlines():
        assert "@everyone" not in line or line.count("`") >= 2  # code, where nothing is a mention


def test_the_markdown_says_the_size_the_quality_and_the_gates(report):
    page = markdown(report, sweep(report))
    for part in (
        "❌ **not met**",
        "✅ met",
        f"{report.after.parameters:,}",
        "**gain retained**",
        "`lorapack compress 'my a",
    ):
        assert part in page
    tables = MarkdownIt("commonmark").enable("table").render(page)
    assert tables.count("<table>") == 6 and "|" not in tables.replace("||", "")


def test_the_page_is_one_small_file_that_names_no_other(report, hostile):
    for found in (report, hostile, large(report)):
        page = html(found, sweep(report))
        assert len(page.encode()) < 1_000_000
        assert "default-src 'none'" in page and "<img" not in page and " src=" not in page.replace("img src=http", "")
        assert page.count("<script>") == 1 and "49" not in page.split("</title>")[0].split("<title>")[1]


def test_without_data_there_is_still_a_page(tmp_path):
    run("compress", ADAPTER, "--method", "rank", "--metric", "weight", "--budget", "30%", "-o", tmp_path / "out")
    done = run("report", tmp_path / "out")
    assert done.returncode == 0 and done.stderr == "" and "its quality was not measured" in done.stdout
    done = run("report", tmp_path / "out", "-o", tmp_path / "page.html")
    assert done.returncode == 0 and (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert "exists" in refused(run("report", tmp_path / "out", "-o", tmp_path / "page.html"))
    assert "does not exist" in refused(run("report", tmp_path))


def test_a_report_of_other_making_is_refused_in_one_line(report, tmp_path):
    for settings in ({"retain": {"share": "much", "tried": []}}, {"retain": {"share": 1.0, "tried": [[1]]}}):
        (tmp_path / "report.json").write_text(to_json(replace(report, settings=settings)))
        assert "settings.retain" in refused(run("report", tmp_path))


# In a browser


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("there is no Chromium here: .ci/browser installs it")
    quiet = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    arguments = [*quiet.split(), "--disable-component-update", "--disable-sync"]
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=arguments)
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(report, hostile, tmp_path_factory):
    """The pages as files, by name."""
    folder = tmp_path_factory.mktemp("pages")
    nothing = replace(report, data=None, quality=None, recovery=None, gates=(), settings={}, modules=())
    given = {"report": report, "hostile": hostile, "large": large(report), "nothing": nothing}
    for name, found in given.items():
        (folder / f"{name}.html").write_text(html(found, sweep(report) if name != "nothing" else ()))
    return {name: (folder / f"{name}.html").as_uri() for name in given}


@contextmanager
def opened(browser, address, **settings):
    """A page, which at its end is checked: no error, no dialog, and no request but for the file itself."""
    context = browser.new_context(**settings)
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    yield page
    assert said == [] and [url for url in asked if not url.startswith("data:")] == [address]
    context.close()


NOT_THE_LONG_TABLE = {"exclude": [["#modules tbody tr:nth-child(n+50)"]]}  # rows like the others, 560 of them
SCREENS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]


@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [("report", *screen) for screen in SCREENS]
    + [(name, *screen) for name in ("hostile", "nothing", "large") for screen in (SCREENS[0], SCREENS[-1])],
)
def test_it_can_be_read_by_everybody_on_every_screen(browser, pages, name, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed").Axe()
    with opened(browser, pages[name], viewport={"width": width, "height": 900}, color_scheme=scheme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true })")
        found = axe.run(page, NOT_THE_LONG_TABLE).response
        serious = [each for each in found["violations"] if each["impact"] in ("serious", "critical")]
        assert not serious, [(each["id"], [node["html"][:200] for node in each["nodes"]][:3]) for each in serious]
        assert len(found["passes"]) > 20
        if name in ("report", "large"):
            page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = false })")
            SHOTS.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=SHOTS / f"{name}-{width}-{scheme}.png", full_page=True)


def test_the_page_shows_the_figures_of_the_report(browser, pages, report):
    with opened(browser, pages["report"]) as page:
        text = page.inner_text("body")
        for part in (f"{report.before.parameters:,} before", f"{report.quality.retained.value:.1%}", "Not met"):
            assert part in text
        assert page.locator("#modules tbody tr").count() == len(report.modules)
        assert (
            page.locator("#importance-svg-title, #kept-svg-title, #trade-svg-title, #recovery-svg-title").count() == 4
        )
        assert page.locator("#spectrum figure").count() == len(report.types)
        assert page.locator("pre").inner_text() == "lorapack compress 'my adapter' --retain 30%"


def test_names_that_want_to_be_more_are_shown_as_they_are(browser, pages):
    with opened(browser, pages["hostile"]) as page:
        assert page.inner_text("h1") == f"{HOSTILE}, compressed"
        assert page.locator("#modules tbody th").first.inner_text() == HOSTILE
        assert page.locator("img, script").count() == 1  # our own


def test_the_table_can_be_searched_and_is_there_in_full_without_scripts(browser, pages, report):
    rows = "#modules tbody tr:visible"
    with opened(browser, pages["report"]) as page:
        page.fill("#search", "Q_PROJ layers.3")
        assert page.locator(rows).all_inner_texts()[0].startswith("model.layers.3.self_attn.q_proj")
        assert page.locator(rows).count() == 1 and page.inner_text("#found") == f"1 of {len(report.modules)} modules"
    with opened(browser, pages["report"], java_script_enabled=False) as page:
        assert page.locator(rows).count() == len(report.modules) and not page.is_visible("#search")


def test_it_prints_in_full_and_in_ink_on_paper(browser, pages):
    with opened(browser, pages["report"], color_scheme="dark") as page:
        printed = page.pdf(path=SHOTS.parent / "report.pdf")
        assert printed.startswith(b"%PDF") and printed.count(b"/Type /Page\n") >= 2
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert not page.is_visible("#search") and page.is_visible("#modules")
