"""The report page: nothing hostile gets through, nothing is fetched, every number can be downloaded."""

import base64
import csv
import functools
import hashlib
import html.parser
import io
import json
import re

import numpy as np
import pytest

from analysis.report import Report, compare, generic, style
from analysis.report.html import display, markdown, percent
from jaxmodels.errors import UserError

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</title></style></script><svg onload=alert(1)>",
    "[x](javascript:alert(1))",
    '[x](https://evil.example/" onclick="alert(1))',
    "{{ 7919 * 7919 }} {% raw %}",
    "`<b>` **<i>** *<u>*",
    "\x00\ud800 & &amp;",
]


class Page(html.parser.HTMLParser):
    """Every start tag with its attributes, and the visible text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    handle_startendtag = handle_starttag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def read_csv(link):
    kind, _, body = link["href"].partition(";base64,")
    assert kind == "data:text/csv;charset=utf-8"
    return list(csv.reader(io.StringIO(base64.b64decode(body).decode("utf-8-sig"), newline="")))


def line_plot(label="y"):
    figure, axes = style.new_figure(4, 2)
    axes.plot([1, 2, 3], [3, 1, 2], label=label)
    axes.set(title=label, xlabel=label)
    axes.legend()
    return figure


def whole_report(text):
    report = Report(text, text)
    report.number_cards([(text, text, text), (text, 3)])
    report.section(text, text)
    report.text(text)
    report.table([{text: text, "n": 1}], None, text, text)
    report.table([[text, 1.5]], [text, text], text, text)
    plain = text.replace("\x00", "").replace("\ud800", "").replace("$", "")
    report.figure(line_plot(plain), text, {text: [text, 1]}, text, text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "HEAVY", 0)
        report.figure(line_plot(), text, None, text, text)  # as a PNG
    return report


@functools.cache
def plain_page():
    return whole_report("plain").render()


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_strings_stay_text(text, tmp_path):
    clean, page = Page(plain_page()), whole_report(text).save(tmp_path / "r.html").read_text("utf-8")
    parsed = Page(page)
    assert [tag for tag, _ in parsed.tags if tag in ("script", "style", "title", "img", "svg")] == [
        tag for tag, _ in clean.tags if tag in ("script", "style", "title", "img", "svg")
    ]
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    assert not [a for a in parsed.all("a") if "javascript:" in a["href"]]
    assert "62710561" not in "".join(parsed.words) and "evil.example/" not in [a["href"] for a in parsed.all("a")]
    if "script" in text:
        assert "alert(1)" in "".join(parsed.words)  # shown, as text


def test_nothing_is_fetched():
    page = plain_page()
    parsed = Page(page)
    for tag, attributes in parsed.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action", "poster", "data"):
            value = attributes.get(name)
            if value is not None and not (tag == "a" and value.startswith("https://")):
                assert value.startswith(("data:", "#")), (tag, name, value[:60])
    assert not parsed.all("link") and not parsed.all("iframe") and "@import" not in page
    assert all(value.startswith("#") for value in re.findall(r"url\(([^)]*)\)", page))
    assert "http://" not in page and "https://" not in page
    policy = next(meta["content"] for meta in parsed.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'")


def test_the_policy_lets_exactly_this_script_run():
    page = plain_page()
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page and 'addEventListener("click"' in script


def test_downloads_hold_the_numbers_in_full():
    report = Report("t")
    values = [0.1 + 0.2, 1e-300, -0.0, float("nan"), float("inf"), np.float32(0.1), np.int64(7), True, None, 'a,"b"\nc']
    report.table([{"x": value} for value in values], None, "", "table of x")
    report.figure(line_plot(), "c", [{"a": 1 / 3, "b": "ü"}, {"a": 2, "c": 5}], "fig")
    report.figure(line_plot(), "c", {"a": np.arange(3), "b": np.array([0.1, 0.2, 0.3])}, "../../etc/x")
    table, rows, columns = (link for link in Page(report.render()).all("a") if "download" in link)
    assert [table["download"], rows["download"], columns["download"]] == ["table-of-x.csv", "fig.csv", "etc-x.csv"]
    head, *back = read_csv(table)
    assert head == ["x"] and [row[0] if row else "" for row in back] == [
        "0.30000000000000004", "1e-300", "-0.0", "nan", "inf", "0.1", "7", "true", "", 'a,"b"\nc',
    ]  # fmt: skip
    assert read_csv(rows) == [["a", "b", "c"], [repr(1 / 3), "ü", ""], ["2", "", "5"]]
    assert read_csv(columns) == [["a", "b"], ["0", "0.1"], ["1", "0.2"], ["2", "0.3"]]


def test_columns_of_unequal_length_are_refused():
    with pytest.raises(ValueError):
        Report("t").figure(line_plot(), data={"a": [1, 2], "b": [1]})


def test_numbers_are_right_aligned_and_sort_by_their_full_value():
    report = Report("t")
    report.table([["a", 12345.678, 1], ["b", None, "x"]], ["name", "value", "mixed"])
    parsed = Page(report.render())
    assert [head.get("class") for head in parsed.all("th")] == [None, "n", None]
    cells = parsed.all("td")
    assert cells[1] == {"class": "n", "data-v": "12345.678"} and cells[4] == {"class": "n", "data-v": ""}
    assert "class" not in cells[2]


@pytest.mark.parametrize(
    "value, shown",
    [
        (None, "–"), (True, "yes"), (np.bool_(False), "no"), (0, "0"), (-1234567, "−1\u202f234\u202f567"), (0.0, "0"),
        (9999.7, "10\u202f000"), (9999.4, "9999"),
        (0.123456, "0.1235"), (12345.6, "12\u202f346"), (1.5e-7, "1.5e−7"), (-2e12, "−2e12"), (float("nan"), "–"),
        (float("-inf"), "−∞"), (np.float32(0.1), "0.1"), ("text", "text"),
    ],
)  # fmt: skip
def test_display(value, shown):
    assert display(value) == shown


def test_shares_that_differ_are_written_apart():
    shares = (0.001, 0.002, 0.07, 0.125, 0.12, 0.29, 1.0)
    assert [percent(share) for share in shares] == ["0.1%", "0.2%", "7%", "12.5%", "12%", "29%", "100%"]


def test_coloured_text():
    report = Report("page")
    report.coloured("ACD", [0.5, -1.0, 0.0], "a protein", marked={1})
    spans = [tag for tag in Page(report.render()).all("span") if "style" in tag]
    assert [(tag["class"], tag["style"]) for tag in spans] == [
        ("a", "--share:50%"), ("b m", "--share:100%"), ("b", "--share:0%")]
    assert spans[0]["title"] == "1: 0.5"
    report.coloured(["<b>"], [0.0], "")
    assert "<b>" not in report.render()


def test_markdown_light():
    text = "A **b** *c* `d*e*` [f](https://g.example/h) [i](#s1) 2*3*4\n\n- one\n- **two**"
    assert markdown(text) == (
        '<p>A <strong>b</strong> <em>c</em> <code>d*e*</code> <a href="https://g.example/h" rel="noreferrer">f</a> '
        '<a href="#s1" rel="noreferrer">i</a> 2*3*4</p>\n<ul><li>one</li><li><strong>two</strong></li></ul>'
    )


def test_figures_follow_the_page_and_do_not_share_ids():
    report = Report("t")
    report.figure(line_plot(), "first")
    report.figure(line_plot(), "second", alt='"quoted" <alt>')
    page = report.render()
    parsed = Page(page)
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 20
    used = re.findall(r'href="#(f\d-[^"]+)"|url\(#(f\d-[^)]+)\)', page)
    assert used and all((a or b) in ids for a, b in used)
    assert style.INK not in page.split("</style>", 1)[1] and "currentColor" in page and "var(--line)" in page
    assert [svg["aria-label"] for svg in parsed.all("svg")] == ["first", '"quoted" <alt>']
    assert page.count("<text") >= 10  # words stay words


def test_a_heavy_figure_becomes_a_png_and_a_heat_map_stays_svg():
    report = Report("t")
    figure, axes = style.new_figure(6, 4)
    style.heat_map(axes, np.random.default_rng(0).normal(size=(40, 1440)), ["日本語"] * 40, None, "z", centred=True)
    report.figure(figure, "map")
    figure, axes = style.new_figure(6, 4)
    axes.scatter(*np.random.default_rng(0).random((2, 20_000)), s=1)
    report.figure(figure, "cloud")
    page = report.render()
    parsed = Page(page)
    assert len(parsed.all("svg")) == 1 and [image["alt"] for image in parsed.all("img")] == ["cloud"]
    assert "日本語" in page and len(page) < 1_500_000


def test_names_in_a_heat_map_are_no_formulas():
    figure, axes = style.new_figure()
    style.heat_map(axes, np.eye(2), ["$0-$50", r"$\odd{$"], ["a", "b"])
    written = style.to_svg(figure, "f")
    assert ">$0-$50</text>" in written and r">$\odd{$</text>" in written


def test_a_centred_heat_map_is_symmetric_about_zero():
    _, axes = style.new_figure()
    image = style.heat_map(axes, np.array([[-1.0, 3.0], [np.nan, 0.0]]), centred=True)
    assert image.get_clim() == (-3.0, 3.0)


def test_saving_is_atomic_and_sections_are_listed(tmp_path):
    report = Report("t")
    report.text("before any section")
    for name in ("one", "two"):
        report.section(name, f"about {name}")
    path = report.save(tmp_path / "deep" / "report.html")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    parsed = Page(path.read_text("utf-8"))
    targets = {section["id"] for section in parsed.all("section")}
    assert {a["href"][1:] for a in parsed.all("a")} == {"s2", "s3"} <= targets
    assert "width=device-width" in next(m["content"] for m in parsed.all("meta") if m.get("name") == "viewport")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        report.save(tmp_path / "file" / "report.html")


def run_folder(path, lr=0.1, loss=1.0, torn=False, **results):
    path.mkdir(parents=True)
    config = {
        "name": "toy",
        "config": {"optimizer": {"lr": lr, "kind": "adam"}, "seed": 0, "sizes": [1, 2]},
        "commit": "abc",
    }
    (path / "config.json").write_text(json.dumps(config))
    lines = [json.dumps({"step": i, "loss": loss / (i + 1), "note": "x"}) + "\n" for i in range(5)]
    (path / "metrics.jsonl").write_text("".join(lines) + ('{"step": 5, "lo' if torn else ""))
    (path / "results.json").write_text(json.dumps({"status": "complete", "final_loss": loss / 5} | results))
    return path


def test_the_generic_report_of_a_run(tmp_path):
    path = generic.build(run_folder(tmp_path / "run", torn=True, languages=43))
    assert path == tmp_path / "run" / "report.html"
    parsed = Page(path.read_text("utf-8"))
    text = " ".join(parsed.words)
    assert "toy" in text and "43" in text and "config.optimizer.lr" in text and "[1, 2]" in text and "complete" in text
    (curve,) = (link for link in parsed.all("a") if link.get("download") == "loss.csv")
    assert read_csv(curve) == [["step", "loss"], *[[str(i), repr(1 / (i + 1))] for i in range(5)]]


def test_the_generic_report_of_a_run_that_did_not_finish(tmp_path):
    folder = run_folder(tmp_path / "run", status="interrupted")
    assert "Interrupted" in generic.build(folder).read_text("utf-8")
    (folder / "results.json").unlink()
    (folder / "metrics.jsonl").unlink()
    assert "no results yet" in generic.build(folder).read_text("utf-8")
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="not a run folder"):
        generic.build(folder)


def test_comparing_runs(tmp_path):
    folders = [run_folder(tmp_path / part / "run", lr, lr, extra=lr) for part, lr in (("a", 0.1), ("b", 0.2))]
    parsed = Page(compare.build(folders, tmp_path / "both.html").read_text("utf-8"))
    links = {link["download"]: read_csv(link) for link in parsed.all("a") if "download" in link}
    assert links["settings.csv"] == [["setting", "a/run", "b/run"], ["optimizer.lr", "0.1", "0.2"]]
    head, first, second = links["comparison.csv"]
    assert head == ["run", "optimizer.lr", "status", "final_loss", "extra"]
    assert first == ["a/run", "0.1", "complete", "0.02", "0.1"] and second[0] == "b/run"
    assert len(links["loss.csv"]) == 11 and links["loss.csv"][0] == ["run", "step", "loss"]
    with pytest.raises(UserError, match="at least 2"):
        compare.build(folders[:1], tmp_path / "one.html")
    with pytest.raises(UserError, match="twice"):
        compare.build([folders[0], folders[0]], tmp_path / "same.html")


def test_comparing_equal_runs_says_so(tmp_path):
    folders = [run_folder(tmp_path / name) for name in ("a", "b")]
    assert "same config" in compare.build(folders, tmp_path / "both.html").read_text("utf-8")
