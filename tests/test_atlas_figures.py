"""Every figure of the atlas draws what it is given, also at the smallest and largest sizes."""

import numpy as np
import pytest

from analysis.atlas import classes, families, figures, report
from analysis.atlas.intervals import Interval
from analysis.report import Report, style
from analysis.report.style import INK, PALETTE

LANGUAGES = ["French", "Galician", "Danish", "Norwegian", "Basque"]
FAMILIES = ["Romance", "Romance", "Germanic", "Germanic", None]
RNG = np.random.default_rng(0)


def similarity(size=5):
    return np.corrcoef(RNG.normal(size=(size, 30)))


def texts(figure):
    """Everything that is written in a figure, as the page will hold it."""
    svg = style.to_svg(figure, "t")
    assert svg.startswith("<svg") and svg.endswith("</svg>")
    return svg


def test_language_map_orders_rows_and_columns():
    profiles = RNG.gamma(1, 1, (5, 12))
    figure = figures.language_map(profiles, LANGUAGES, [4, 0, 1, 3, 2], layer=7, by="frequency")
    image = figure.axes[0].images[0].get_array()
    assert np.allclose(image, profiles[[4, 0, 1, 3, 2]][:, np.argsort(-profiles.mean(0))])
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()][0] == "Basque"
    assert "Layer 7" in texts(figure)
    centred = profiles - profiles.mean(0)
    figure = figures.language_map(centred, LANGUAGES, centred=True, families=FAMILIES)
    assert [t.get_color() for t in figure.axes[0].get_yticklabels()] == figures.family_colours(FAMILIES)
    assert np.allclose(figure.axes[0].images[0].get_array(), centred)
    assert figure.axes[0].images[0].get_clim() == pytest.approx((-np.abs(centred).max(), np.abs(centred).max()))
    by_size = figures.language_map(centred, LANGUAGES, centred=True, by="frequency").axes[0].images[0].get_array()
    assert (np.diff(np.abs(by_size).mean(0)) <= 1e-12).all()


def test_family_tree_names_leaves_in_their_colours():
    tree = families.dendrogram(similarity())
    figure = figures.family_tree(tree, LANGUAGES, FAMILIES)
    labels = figure.axes[0].get_yticklabels()
    colours = figures.family_colours(FAMILIES)
    for label, leaf in zip(labels, tree.order, strict=True):
        assert label.get_text().startswith(LANGUAGES[leaf]) and label.get_color() == colours[leaf]
    assert colours == [PALETTE[1], PALETTE[1], PALETTE[0], PALETTE[0], INK]
    assert figures.family_colours(FAMILIES[::-1]) == colours[::-1], "the same in every figure"
    assert len(figure.axes[0].lines) == 4, "one joint for each merge"
    written = texts(figure)
    assert "Galician  ·  Romance" in written and "None" not in written
    # Leaves of the drawing stand where their names are: the two that join first are neighbours at their places.
    first = sorted(tree.order.tolist().index(int(i)) for i in tree.linkage[0, :2])
    assert any(sorted(set(line.get_ydata())) == first for line in figure.axes[0].lines)


def test_similarity_map_follows_the_leaves():
    r, order = similarity(), [3, 1, 4, 0, 2]
    figure = figures.similarity_map(r, order, LANGUAGES, FAMILIES)
    image = figure.axes[0].images[0].get_array()
    expected = r[np.ix_(order, order)]
    off = ~np.eye(5, dtype=bool)
    assert np.allclose(image[off], expected[off]) and (np.ma.getmaskarray(image) | np.isnan(image.data))[~off].all()
    assert figure.axes[0].get_xticklabels()[0].get_text() == "Norwegian"
    assert r[0, 0] == pytest.approx(1), "the caller's matrix is left alone"


def test_depth_curve_counts_the_layers_above_the_band():
    curve = families.Curve(np.array([0.3, 0.1, -0.2]), np.full(3, -0.15), np.full(3, 0.15), np.array([0.001, 0.2, 1]))
    figure = figures.depth_curve(curve)
    assert "1 of 3 layers" in figure.axes[0].get_title(loc="left")
    assert np.allclose(figure.axes[0].lines[0].get_ydata(), curve.difference)
    nothing = np.full(3, np.nan)
    assert "Too few families" in texts(figures.depth_curve(families.Curve(nothing, nothing, nothing, np.ones(3))))


def test_class_counts_stack_to_the_number_of_experts():
    counts = RNG.integers(0, 9, (6, 5))
    figure = figures.class_counts(counts, 97.5)
    tops = np.max([[p.get_y() + p.get_height() for p in bars] for bars in figure.axes[0].containers], axis=0)
    assert np.allclose(tops, counts.sum(1))
    written = texts(figure)
    for name, total in zip(figures.CLASS_NAMES.values(), counts.sum(0), strict=True):
        assert f"{name} ({total})" in written
    assert "97.5th" in written and len(figures.CLASS_COLOURS) == len(set(figures.CLASS_COLOURS)) == len(classes.CLASSES)


def test_language_neurons_put_the_most_first():
    language = RNG.random((5, 4, 50)) < np.array([0.02, 0.3, 0.1, 0.0, 0.05])[:, None, None]
    figure = figures.language_neurons(language, LANGUAGES)
    widths = [p.get_width() for p in figure.axes[0].patches]
    assert widths == sorted(language.sum((1, 2)), reverse=True)
    assert figure.axes[0].get_yticklabels()[0].get_text() == "Galician"
    assert np.array_equal(figure.axes[1].images[0].get_array(), language.sum(2)[np.argsort(-language.sum((1, 2)))])
    assert f"{language.any(0).sum()} neurons" in texts(figure)


@pytest.mark.parametrize("log", [False, True])
def test_quality_curves_show_values_and_intervals(log):
    shares = [75, 50, 25]
    schemes = {f"scheme {i}": [Interval(v, v - 0.1, v + 0.2) for v in (0.1 * i, 0.5, 3 + i)] for i in range(9)}
    figure = figures.quality_curves(shares, schemes, log=log)
    for container, intervals in zip(figure.axes[0].containers, schemes.values(), strict=True):
        line, _, (bars,) = container.lines
        assert np.allclose(line.get_ydata(), [i.value for i in intervals])
        assert np.allclose(line.get_xdata(), shares, atol=3), "moved sideways by little"
        assert np.allclose([s[:, 1] for s in bars.get_segments()], [(i.low, i.high) for i in intervals])
    looks = {(c.lines[0].get_color(), c.lines[0].get_marker()) for c in figure.axes[0].containers}
    assert len(looks) == 9, "schemes differ in colour or marker"
    assert "scheme 8" in texts(figure)
    single = figures.quality_curves([50], {"a": [Interval(1, 0, 2)]})
    assert "nats a token" in texts(single)
    once = figures.quality_curves([50], {"a": [Interval(1, 0.5, 0.5)]}, log=log)  # prune.bootstrap=1
    assert once.axes[0].containers[0].lines[0].get_ydata() == 1


def test_change_matrix_leaves_what_was_not_measured_empty():
    change = np.array([[0.5, np.nan], [-0.1, 0.25]])
    figure = figures.change_matrix(change, ["fr", "ru"], ["fr", "ru"])
    assert [t.get_text() for t in figure.axes[0].texts] == ["0.50", "-0.10", "0.25"]
    written = texts(figure)
    assert "nan" not in written and "grey: not measured" in written
    tiny = figures.change_matrix(np.array([[-0.001]]), ["x"], ["y"])
    assert [t.get_text() for t in tiny.axes[0].texts] == ["0.00"] and "grey" not in texts(tiny)
    assert not figures.change_matrix(np.zeros((21, 3)), ["x"] * 21, ["y"] * 3).axes[0].texts


def test_speed_bars_say_what_share_of_the_ceiling_is_reached():
    figure = figures.speed_bars(["prefill, 50 % kept", "decoding, 25 % kept"], [1.4, 1.8], [1.5, 2.4])
    assert [p.get_width() for p in figure.axes[0].patches] == [1.4, 1.8]
    assert [t.get_text() for t in figure.axes[0].texts] == ["1.40x, 93 % of the ceiling", "1.80x, 75 % of the ceiling"]
    assert "ceiling" in texts(figure)


def test_the_whole_model_timed_alone_has_no_bars():
    page = Report("t")
    report._speed(page, [{"phase": "prefill", "share": 1.0, "speedup": 1.0, "ceiling": 1.0}])
    assert "prefill" in page.render() and "<svg" not in page.render()


def test_variants_of_one_name_keep_their_columns():
    """Two texts in French (text.variants) would be one column of the downloads, under the name of both."""
    codes = {"fr": "French", "fr-x-2": "French", "de": "German"}
    languages = [{"code": code, "name": name} for code, name in codes.items()]
    assert report.names_of(languages) == ["French (fr)", "French (fr-x-2)", "German"]


def test_eighty_languages_fit_on_a_page():
    names = [f"Language {i}" for i in range(80)]
    labels = [f"Family {i % 15}" for i in range(80)]
    r = similarity(80)
    tree = families.dendrogram(r)
    for figure in (figures.family_tree(tree, names, labels), figures.similarity_map(r, tree.order, names, labels),
                   figures.language_map(RNG.gamma(1, 1, (80, 48)), names, tree.order)):
        figure.draw_without_rendering()
        labels_drawn = figure.axes[0].get_yticklabels()
        boxes = [t.get_window_extent() for t in labels_drawn]
        middles = np.array([(b.y0 + b.y1) / 2 for b in boxes])
        assert np.abs(np.diff(middles)).min() > 0.9 * max(b.height for b in boxes) * 0.75, "names do not run together"
