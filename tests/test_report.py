"""The report of tokred analyze: rows as the metrics say, a page that needs nothing else, refusals with the reason."""

import csv
import dataclasses
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from test_analyze import MODEL, RUN, contents, photographs
from test_cli import one_line
from test_record import HEADER, write

from tokred_kernels import analysis, methods
from tokred_kernels.analysis import report, summary
from tokred_kernels.cli import main

RNG = np.random.default_rng(3)
STATE = RNG.bit_generator.state
IMAGES = RNG.integers(0, 2**63, (40, 2), dtype=np.uint64)
IDENTITY = np.arange(1, 7)


@pytest.fixture(autouse=True)
def _each_test_its_own_numbers():
    RNG.bit_generator.state = STATE


def setting(
    folder, method: str, rate: float | None, pattern=None, images=IMAGES, labels=-1, top1=0, **header
) -> analysis.Record:
    """A record of random features whose patterns, [n, 6] after block 1, stay; none: dense."""
    n = len(images)
    changed = dict(method=method, keep_rate=rate, blocks=() if pattern is None else (1,), **header)
    h = dataclasses.replace(HEADER, **changed)
    patterns = np.zeros((n, 0, 6)) if pattern is None else np.broadcast_to(pattern, (n, 6))[:, None]
    feature = RNG.standard_normal((n, 1, h.width))
    part = (images, np.broadcast_to(labels, n), np.broadcast_to(top1, n), patterns, feature)
    path = folder / f"{h.dataset}.{h.model}.{method}.{rate}"
    return analysis.Record(write(path, part, header=h))


def of(records, methods=("topk", "evit", "kmedoids", "tome", "dpcknn")) -> list[summary.Group]:
    return summary.groups(records, methods)


TOPK, TOME, EVIT = [1, 2, -1, 3, -1, -1], [1, 2, 2, 3, 3, 3], [1, -6, 2, 3, -6, -6]


@pytest.fixture
def group(tmp_path):
    records = [
        setting(tmp_path, "tome", 0.5, TOME),
        setting(tmp_path, "topk", 0.5, TOPK),
        setting(tmp_path, "evit", 0.5, EVIT),
    ]
    (found,) = of([*records, setting(tmp_path, "dense", None)])
    return found


class TestSummary:
    def test_settings_by_method_and_rate(self, group):
        assert [s.method for s in group.settings] == ["dense", "topk", "evit", "tome"]
        rows = summary.settings(group)
        assert [row["left"] for row in rows] == [6, 3, 4, 3]
        # Of 4 blocks: half of the patches of Top-K are gone in block 1; only one of ToMe's is alone in its row.
        assert [row["depth"] for row in rows] == [4, 2.5, 2.5, 1.5]

    def test_a_pair_has_the_measures_that_suit_both(self, group):
        rows = {(row["a"], row["b"]): row for row in summary.pairs(group)}
        assert len(rows) == 6

        def has(a, b):
            return {name for name in summary.MEASURES if math.isfinite(rows[a, b][name])}

        sets, clusters = {"iou", "ioa"}, {"homogeneity", "completeness", "v_measure"}
        assert has("dense", "tome") == set(summary.FEATURES)
        assert has("topk", "evit") == {*sets, *summary.FEATURES, *summary.MAPS}
        assert has("evit", "tome") == {*clusters, *summary.FEATURES, *summary.MAPS}
        assert has("topk", "tome") == {*summary.FEATURES, *summary.MAPS}
        assert rows["topk", "evit"]["iou"] == pytest.approx(2 / 4)
        assert rows["topk", "evit"]["ioa"] == pytest.approx(2 / 3)
        want = analysis.clusterings(np.array([1, 4, 2, 3, 4, 4]), np.array(TOME))
        assert [rows["evit", "tome"][name] for name in want._fields] == pytest.approx(np.array(want))
        a, b = (group.settings[i].record for i in (1, 3))
        assert rows["topk", "tome"]["emd"] == pytest.approx(analysis.emd(a.mean_depth(), b.mean_depth()))
        assert rows["topk", "tome"]["cka"] == pytest.approx(analysis.linear_cka(a.feature(3), b.feature(3)))
        assert rows["topk", "tome"]["mean_cca"] == pytest.approx(analysis.cca(a.feature(3), b.feature(3)).mean())

    def test_many_images_a_part_at_a_time(self, tmp_path, monkeypatch):
        monkeypatch.setattr(summary, "_IMAGES", 7)
        kept = RNG.random((2, 40, 6)) < 0.5
        a, b = np.where(kept, IDENTITY, -1)
        c, d = RNG.integers(1, 4, (2, 40, 6))
        records = [
            setting(tmp_path, method, 0.5, p)
            for method, p in zip(("topk", "evit", "tome", "dpcknn"), (a, b, c, d), strict=True)
        ]
        (found,) = of([setting(tmp_path, "dense", None), *records])
        rows = {(row["a"], row["b"]): row for row in summary.pairs(found)}
        assert rows["topk", "evit"]["iou"] == pytest.approx(analysis.iou(*kept).mean())
        assert rows["tome", "dpcknn"]["v_measure"] == pytest.approx(analysis.clusterings(c, d).v_measure.mean())
        assert found.settings[1].left == pytest.approx(kept[0].sum(1).mean())

    def test_ioa_is_of_the_setting_that_keeps_less(self, tmp_path):
        records = [setting(tmp_path, "topk", rate, p) for rate, p in ((0.9, [1, 2, 3, 4, -1, -1]), (0.5, TOPK))]
        (found,) = of([setting(tmp_path, "dense", None), *records])
        (row,) = summary.across_rates(found)
        assert (row["keep_rate_a"], row["keep_rate_b"]) == (0.9, 0.5)
        assert row["ioa"] == pytest.approx(3 / 3) and row["iou"] == pytest.approx(3 / 4)

    def test_across_models_and_data_sets(self, tmp_path):
        records = []
        for model, width, dataset in (("tiny", 5, "birds"), ("small", 7, "birds"), ("tiny", 5, "cars")):
            images = IMAGES if dataset == "birds" else IMAGES[:9]
            where = dict(model=model, width=width, dataset=dataset, images=images)
            records += [setting(tmp_path, "dense", None, **where), setting(tmp_path, "topk", 0.5, TOPK, **where)]
        found = of(records)
        (models,), (datasets,) = summary.across_models(found), summary.across_datasets(found)
        assert (models["a"], models["b"], models["iou"]) == ("tiny", "small", 1)
        assert 0 < models["cka"] < 1 and 0 < models["procrustes"] < 2
        assert (datasets["a"], datasets["b"], datasets["emd"], datasets["sim"]) == ("birds", "cars", 0, 1)
        assert "cka" not in datasets

    def test_block_by_block(self, tmp_path):
        """Both keep the same in block 1 and have the same class tokens there; in block 2 they part."""
        both, first = [1, 2, 3, 4, -1, -1], RNG.standard_normal((40, 5))
        fused = [1, 2, 3, 4, -7, -7]
        after = {"topk": (both, [1, 2, -1, -1, -1, -1]), "evit": (fused, [1, -5, 2, -5, -5, -5]), "dense": ()}
        records = []
        for method, patterns in after.items():
            rate = None if method == "dense" else 0.5
            h = dataclasses.replace(
                HEADER, method=method, keep_rate=rate, blocks=(1, 2)[: len(patterns)], feature_blocks=(1, 3)
            )
            pattern = np.broadcast_to(np.reshape(patterns, (1, -1, 6)), (40, len(patterns), 6))
            feature = np.stack([first, RNG.standard_normal((40, 5))], 1)
            part = (IMAGES, np.full(40, -1), np.zeros(40, int), pattern, feature)
            records.append(analysis.Record(write(tmp_path / method, part, header=h)))
        (found,) = of(records)
        early, late = summary.across_blocks(found)
        assert [early[key] for key in ("a", "b", "block", "keep_rate", "iou")] == ["topk", "evit", 1, 0.5, 1]
        assert early["cka"] == pytest.approx(1) and early["procrustes"] == pytest.approx(0, abs=1e-9)
        assert (late["block"], late["iou"], late["ioa"]) == (3, pytest.approx(1 / 3), 1 / 2)
        a, b = (s.record.feature(3) for s in found.reduced)
        assert late["cka"] == pytest.approx(analysis.linear_cka(a, b)) and "pearson" not in late

    def test_proxies(self, tmp_path):
        """The more a method keeps of what Top-K keeps, the closer its accuracy, here."""
        sets = {"topk": [1, 2, 3, -1, -1, -1], "evit": [1, 2, -1, 3, -1, -1], "dpcknn": [1, -1, -1, 2, 3, -1]}
        sets |= {"tome": [-1, -1, -1, 1, 2, 3], "kmedoids": [1, 2, 3, 4, -1, -1]}
        right = {"topk": 40, "kmedoids": 38, "evit": 30, "dpcknn": 20, "tome": 0}
        records = [setting(tmp_path, "dense", None, labels=1, top1=1)]
        for method, pattern in sets.items():
            records.append(setting(tmp_path, method, 0.5, pattern, labels=1, top1=np.arange(40) < right[method]))
        (found,) = of(records)
        rows = summary.proxy_rows(found, summary.pairs(found))
        (iou,) = [row for row in rows if row["measure"] == "iou" and row["reference"] == "topk"]
        assert (iou["n"], iou["spearman"], iou["kendall"]) == (4, pytest.approx(-1), pytest.approx(-1))
        assert {row["reference"] for row in rows} == {"topk", "kmedoids"}
        assert summary.settings(found)[-1]["accuracy"] == right[found.settings[-1].method] / 40

    def test_refusals(self, tmp_path):
        topk, fewer = setting(tmp_path, "topk", 0.5, TOPK), setting(tmp_path, "evit", 0.5, TOPK, images=IMAGES[:7])
        dense = setting(tmp_path, "dense", None)
        with pytest.raises(ValueError, match="no dense record of tiny on birds"):
            of([topk])
        with pytest.raises(ValueError, match="unequal image sets, 40 and 7 images"):
            of([dense, topk, fewer])
        with pytest.raises(ValueError, match="holds no image"):
            of([setting(tmp_path, "tome", 0.5, TOPK, images=IMAGES[:0])])
        assert of([dense]) == []

    def test_names_of_files_do_not_collide(self, tmp_path):
        records = []
        for dataset in ("a b", "a-b"):
            where = dict(dataset=dataset)
            records += [setting(tmp_path, "dense", None, **where), setting(tmp_path, "topk", 0.5, TOPK, **where)]
        with pytest.raises(ValueError, match="data sets a b and a-b are one as names of files"):
            report.write(tmp_path, of(records), lambda group: [])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with records of 6 photographs and their report."""
    folder = tmp_path_factory.mktemp("report")
    photos = photographs(folder / "birds & <b>bees", 6)
    argv = [word for word in RUN if word != "--no-report"]
    argv[argv.index("topk,tome")] = "topk,evit,tome"
    assert main(["analyze", str(photos), *argv, "--examples", "2", "-o", str(folder / "out")]) == 0
    return folder / "out"


class TestPage:
    def test_needs_nothing_else(self, written):
        page = (written / "report.html").read_text()
        for value in re.findall(r'(?:src|href)="([^"]*)"', page):
            assert value.startswith(("#", "data:image/")), value
        assert not re.search(r"@import|url\((?!#)|<link|<script src|fetch\(", page)
        assert "<b>bees" not in page and "birds &amp; &lt;b&gt;bees" in page

    def test_says_that_weights_are_random(self, written):
        page = (written / "report.html").read_text()
        assert f"The weights of {MODEL} are random" in page and "6 images" in page and "10 x 10 patches" in page

    def test_every_figure_is_a_png_and_an_svg_and_on_the_page(self, written):
        names = {path.stem for path in (written / "figures").glob("*.svg")}
        prefix = f"birds-b-bees.{MODEL}."
        kinds = ("depth", "iou", "v_measure", "cka", "pearson", "rates.ioa", "rates.v_measure", "agreement")
        assert names == {prefix + kind for kind in kinds}
        page = (written / "report.html").read_text()
        assert page.count('<div class="figure"') == len(names)
        for name in names:
            ElementTree.parse(written / "figures" / f"{name}.svg")
            with Image.open(written / "figures" / f"{name}.png") as picture:
                assert min(picture.size) > 200 and len(picture.convert("RGB").getcolors(10**7)) > 10

    def test_figures_on_the_page_have_the_colour_of_its_text(self, written):
        found = re.findall(r'<div class="figure".*?>(<svg.*?</svg>)', (written / "report.html").read_text(), re.S)
        assert len(found) == 8
        for one in found:
            ElementTree.fromstring(one)
            assert "currentColor" in one and "#010203" not in one

    def test_tables_are_the_rows_of_the_summary(self, written):
        with open(written / "tables" / f"birds-b-bees.{MODEL}.pairs.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        records = [analysis.Record(path) for path in (written / "birds & <b>bees").glob("*.record")]
        (group,) = of(records, list(methods.METHODS))
        want = summary.pairs(group)
        assert len(rows) == len(want) == 2 * 6
        for row, values in zip(rows, want, strict=True):
            for key, value in values.items():
                if isinstance(value, float):
                    assert (row[key] == "") == math.isnan(value)
                    assert not row[key] or float(row[key]) == value
                else:
                    assert row[key] == value

    def test_examples(self, written):
        page = (written / "report.html").read_text()
        assert page.count("<figure><img") == 2 * 2 * 4  # photographs, keep rates, the photograph and three methods
        assert len(list((written / "figures").glob("*.examples.*.png"))) == 2

    def test_no_number_is_minus_nothing(self):
        cells = [report._cell("pearson", value).text for value in (-1e-9, -0.0004, -0.0006, 0.25)]
        assert cells == ["0.000", "0.000", "-0.001", "0.250"] and report._cell("block", 3).text == "3"

    def test_columns_are_explained(self):
        for name in (*summary.MEASURES, *analysis.Proxy._fields):
            assert name in report.COLUMNS

    def test_again_without_the_model(self, written, monkeypatch, capsys):
        """The same page from the records alone."""
        before = (written / "report.html").read_bytes()
        monkeypatch.setattr("timm.create_model", None)
        assert main(["analyze", "--examples", "2", "-o", str(written)]) == 0
        assert (written / "report.html").read_bytes() == before
        assert f"{written}: 7 records" in capsys.readouterr().out


class TestRefused:
    @pytest.fixture
    def there(self, written, tmp_path):
        folder = next(path for path in written.iterdir() if path.name.startswith("birds"))
        (tmp_path / folder.name).mkdir()
        for name, data in contents(folder).items():
            (tmp_path / folder.name / name).write_bytes(data)
        return tmp_path / folder.name

    def refused(self, there, named, capsys) -> None:
        assert main(["analyze", "-o", str(there.parent)]) == 2
        assert named in one_line(capsys)
        assert not (there.parent / "report.html").exists()

    def test_truncated_within_an_image(self, there, capsys):
        path = there / f"{MODEL}.tome.0.5.record"
        path.write_bytes(path.read_bytes()[:-1])
        self.refused(there, "truncated: 5 images, and", capsys)

    def test_truncated_between_images(self, there, capsys):
        path = there / f"{MODEL}.tome.0.5.record"
        path.write_bytes(path.read_bytes()[: -analysis.Record(path).header.row.itemsize])
        self.refused(there, "truncated: 5 of 6 images; run the same tokred analyze again", capsys)

    def test_damaged(self, there, capsys):
        path = there / f"{MODEL}.topk.0.7.record"
        data = bytearray(path.read_bytes())
        data[-9] ^= 1
        path.write_bytes(data)
        self.refused(there, "damaged at image 5", capsys)

    def test_no_dense_record(self, there, capsys):
        (there / f"{MODEL}.dense.record").unlink()
        self.refused(there, f"no dense record of {MODEL}", capsys)

    def test_in_the_folder_of_another_data_set(self, there, capsys):
        (there / "images.json").rename(there.parent / "images.json")
        there.rename(there.parent / "cars")
        (there.parent / "images.json").rename(there.parent / "cars" / "images.json")
        self.refused(there, "is of the data set birds", capsys)
