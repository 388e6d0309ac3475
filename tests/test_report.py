"""The report: its table, its JSON, its page."""

import json
import math
import os
import re
import sys

import pytest

from torchquant.report import (
    ActivationReport,
    LayerReport,
    Pictures,
    Report,
    Table,
    as_json,
    geometric_mean,
    write_atomically,
    write_html,
)


def made() -> Report:
    layers = [
        LayerReport(
            "blocks.0.fc1", "Linear", "auto", "W2A16", 2, 0, (48, 24), 0.4, 0.1, 1, 0, 512, "ok", 0.25, 4608, 672
        ),
        LayerReport(
            "blocks.0.fc2", "Linear", "auto", "W2A16", 2, 0, (24, 48), 0.2, 0.2, 0, 3, 512, "damped", 0.5, 4608, 480
        ),
        LayerReport("head", "Linear", status="skipped: weight is tied with <embed>"),
    ]
    layers[0].winners = {"gptq+comq": 40, "magr150+gptq+comq": 8}
    counts = [0, 5, 20, 40, 20, 5, 0, 1]
    details = {
        "histograms": {
            name: {"low": -1.0, "high": 4.0, "levels": 4, "counts": counts} for name in ("blocks.0.fc1", "blocks.0.fc2")
        },
        "magr": {"blocks.0.fc1": [1.0, 0.7]},
    }
    return Report(layers, 1.5, "W2A16", "auto", 7, details)


def with_activations() -> Report:
    report = made()
    softmax = "blocks.0.attn.product.softmax"
    report.activations = [
        ActivationReport("blocks.0.fc1", "input", "uniform", 4, -1.5, 2.25, 0.0625),
        ActivationReport("blocks.0.fc2", "input", "dynamic", 4),
        ActivationReport(softmax, "softmax", "sulq", 4, 0.0, 1.0, 0.03125),
    ]
    counts = [1, 2, 3, 2]
    drawn = {"low": -2.0, "high": 3.0, "log2": False, "unit": "value", "levels": [-1.5, 0.0, 2.25], "counts": counts}
    report.details |= {
        "activations": {"blocks.0.fc1": drawn, softmax: {**drawn, "log2": True}},
        "attention": {
            "name": "blocks.0.attn",
            "head": 2,
            "change": 0.125,
            "before": [[0.5, 0.5], [1.0, 0.0]],
            "after": [[0.25, 0.75], [1.0, 0.0]],
        },
        "sensitivity": {"blocks.0.fc1": {"weights": 0.5, "input": 0.25}, "blocks.0.attn.product": {"key": math.nan}},
    }
    return report


def page_of(report: Report, path) -> str:
    report.to_html(path)
    return path.read_text()


def test_table_names_every_layer_and_counts_those_that_are_not_ok():
    lines = str(made()).splitlines()
    assert lines[2].split()[:4] == ["blocks.0.fc1", "Linear", "W2A16", "auto"]
    assert "0.250" in lines[2] and lines[2].endswith("ok")
    assert lines[3].endswith("damped")
    assert lines[4].endswith("skipped: weight is tied with <embed>")
    assert lines[-1].startswith("3 layers in 1.5 s") and lines[-1].endswith("2 not ok")
    assert "error 0.500 of rounding" in lines[-1]


def test_layer_is_found_by_name():
    assert made()["blocks.0.fc2"].damping == 3
    with pytest.raises(KeyError, match="no layer named 'fc9'"):
        made()["fc9"]


@pytest.mark.parametrize(("values", "mean"), [([2, 8], 4), ([math.nan, 3], 3), ([0.0, 5], 0)])
def test_geometric_mean(values, mean):
    assert geometric_mean(values) == pytest.approx(mean)


def test_geometric_mean_of_nothing_is_unknown():
    assert math.isnan(geometric_mean([math.nan]))


def test_json_is_strict_and_comes_back(tmp_path):
    path = tmp_path / "report.json"
    made().to_json(path)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse)["layers"][2]["error"] is None
    again = Report.from_json(path)
    assert str(again) == str(made())
    assert again.layers[0] == made().layers[0]
    assert again.details == made().details


def test_infinity_becomes_null_inside_lists_too():
    assert json.loads(as_json({"a": [1.0, math.inf, (math.nan,)]})) == {"a": [1.0, None, [None]]}


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"layers": 3}', '{"layers": [{"shape": [1, 2]}]}', '{"layers": [], "more": 1}']
)
def test_other_files_are_refused_by_name(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json is not a report written by to_json"):
        Report.from_json(path)


def test_page_needs_nothing_from_outside_and_shows_everything(tmp_path):
    path = tmp_path / "report.html"
    made().to_html(path)
    page = path.read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert sources and all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert "<script" not in page and "@import" not in page and "url(" not in page
    for text in (
        "blocks.0.fc1",
        "0.4000",
        "0.1000",
        "magr150+gptq+comq 8",
        "damped",
        "tied with &lt;embed&gt;",
        "48 \u00d7 24",
    ):
        assert text in page, text
    for heading in ("Error per layer", "Weights and grid", "MagR: largest magnitudes", "Winners"):
        assert f"<h3>{heading}</h3>" in page
    assert "nan" not in re.sub(r"base64,[^\"]*", "", page).lower()


def test_same_report_gives_the_same_page(tmp_path):
    made().to_html(tmp_path / "a.html")
    made().to_html(tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_page_of_a_run_that_quantized_nothing(tmp_path):
    Report([LayerReport("head", "Linear", status="skipped: tied")]).to_html(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "skipped: tied" in page and "<img" not in page


def test_further_tables_come_first(tmp_path):
    table = Table("Checks", ["rule", "result"], [["a <= b", "FAIL"]], "about it")
    write_html(tmp_path / "r.html", {"net": made()}, title="Demo", tables=[table])
    page = (tmp_path / "r.html").read_text()
    assert page.index("a &lt;= b") < page.index("<h2>net</h2>")
    assert '<span class="notok">FAIL</span>' in page
    assert str(table).splitlines() == ["Checks", "about it", "rule    result", "------  ------", "a <= b    FAIL"]


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_missing_package_is_named_with_the_way_to_get_it(tmp_path, monkeypatch, package):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "torchquant.plots", raising=False)
    monkeypatch.delattr("torchquant.plots", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs {package}; install it with `pip install torchquant\[report\]`"):
        made().to_html(tmp_path / "r.html")
    assert not list(tmp_path.iterdir())


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    path.write_text("old")

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]


def test_file_mode_follows_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_atomically(tmp_path / "r", "text")
    finally:
        os.umask(old)
    assert (tmp_path / "r").stat().st_mode & 0o777 == 0o640


NEW_FIGURES = ("Sensitivity", "Activations and their levels", "Attention before and after")


def test_page_shows_activations(tmp_path):
    page = page_of(with_activations(), tmp_path / "r.html")
    for heading in (*NEW_FIGURES, "Activations"):
        assert f"<h3>{heading}</h3>" in page, heading
    for text in (">sulq<", ">-1.5000<", ">0.0625<", "blocks.0.attn, head 2", "by 12 %"):
        assert text in page, text
    assert "nan" not in re.sub(r"base64,[^\"]*", "", page).lower()


def test_page_without_activations_has_none_of_it(tmp_path):
    page = page_of(made(), tmp_path / "r.html")
    assert not [heading for heading in (*NEW_FIGURES, "Activations") if f"<h3>{heading}</h3>" in page]


def test_activations_come_back_from_json_and_give_the_same_page(tmp_path):
    report = with_activations()
    report.to_json(tmp_path / "r.json")
    again = Report.from_json(tmp_path / "r.json")
    assert again.activations[0] == report.activations[0] and math.isnan(again.activation("blocks.0.fc2").error)
    assert page_of(again, tmp_path / "a.html") == page_of(report, tmp_path / "b.html")


def test_activation_is_found_by_name():
    assert with_activations().activation("blocks.0.fc1").high == 2.25
    with pytest.raises(KeyError, match="no quantized activation named 'fc9'"):
        with_activations().activation("fc9")


def test_table_lists_activations():
    line = next(line for line in str(with_activations()).splitlines() if "product.softmax" in line)
    assert line.split() == ["blocks.0.attn.product.softmax", "softmax", "sulq", "4", "0.0000", "1.0000", "0.0312"]


def test_drawings_are_pictures_in_a_notebook():
    from torchquant import plots

    report = with_activations()
    drawings = [plots.sensitivity(report), plots.activations(report, ["blocks.0.fc1"]), plots.attention(report)]
    assert all(drawing._repr_png_().startswith(b"\x89PNG") for drawing in drawings)


def test_pictures_side_by_side(tmp_path):
    grey, coloured = [[0.0, 0.5], [1.0, 0.25]], [[[1.0, 0.0, 0.0]] * 2] * 2
    shown = Pictures("Enlarged", "Twice the size.", ["original", "4 bits"], {"cat": [grey, coloured]})
    write_html(tmp_path / "r.html", {"net": made()}, pictures=[shown])
    page = (tmp_path / "r.html").read_text()
    assert page.index("<h3>Enlarged</h3>") < page.index("<h2>net</h2>") and "Twice the size." in page
