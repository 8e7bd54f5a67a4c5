"""Records: whole, small, appended to after a kill, and refused with the reason where they do not fit."""

import dataclasses
import struct
import zlib

import numpy as np
import pytest
import torch
import vits

import tokred_kernels as tokred
from tokred_kernels import analysis
from tokred_kernels.analysis.record import HEADER_BYTES, read_header

HEADER = analysis.Header(
    dataset="birds",
    model="tiny",
    weights="random (seed 0)",
    fingerprint="00ff",
    method="topk",
    keep_rate=0.5,
    options={"keep_rate": 0.5, "stages": (1, 3)},
    untrained=False,
    depth=4,
    grid=(2, 3),
    prefix=1,
    blocks=(1, 3),
    feature_blocks=(3,),
    width=5,
)


def rows(n: int, seed: int = 0, header: analysis.Header = HEADER) -> tuple:
    """What `append` takes, of n images."""
    r = np.random.default_rng(seed)
    shape = (len(header.blocks), header.grid[0] * header.grid[1])
    return (
        r.integers(0, 2**63, (n, 2), dtype=np.uint64),
        r.integers(-1, 9, n),
        r.integers(0, 9, n),
        r.integers(-3, 7, (n, *shape)),
        r.standard_normal((n, len(header.feature_blocks), header.width)).astype(np.float32),
    )


def write(path, *parts, header: analysis.Header = HEADER):
    for part in parts:
        with analysis.Writer(path, header) as writer:
            writer.append(*part)
    return path


class TestFile:
    def test_comes_back(self, tmp_path):
        first, second = rows(3, 1), rows(4, 2)
        record = analysis.Record(write(tmp_path / "a", first, second))
        record.verify()
        assert len(record) == 7
        assert dataclasses.asdict(record.header) == {
            **dataclasses.asdict(HEADER),
            **{
                "options": {"keep_rate": 0.5, "stages": [1, 3]},
                "grid": [2, 3],
                "blocks": [1, 3],
                "feature_blocks": [3],
            },
        }
        for name, a, b in zip(("image", "label", "top1", "pattern", "feature"), first, second, strict=True):
            np.testing.assert_array_equal(record.rows[name], np.concatenate([a, b]))

    def test_layout_is_the_documented_one(self, tmp_path):
        """Read by struct alone."""
        image, label, top1, pattern, feature = rows(2)
        data = write(tmp_path / "a", (image, label, top1, pattern, feature)).read_bytes()
        assert data.startswith(b'tokred record 1\n{"dataset": "birds"') and data[:HEADER_BYTES].rstrip().endswith(b"}")
        form = "<2Q2i12h5fI"
        size = struct.calcsize(form)
        assert len(data) == HEADER_BYTES + 2 * size
        for n in range(2):
            row = data[HEADER_BYTES + n * size :][:size]
            want = (*image[n], label[n], top1[n], *pattern[n].ravel(), *feature[n].ravel(), zlib.crc32(row[:-4]))
            assert struct.unpack(form, row) == want

    def test_fifty_thousand_images_are_below_one_and_a_half_gigabytes(self):
        """12 blocks that reduce 197 tokens, class tokens after four blocks of DeiT-B's width."""
        header = dataclasses.replace(
            HEADER, depth=12, grid=(14, 14), blocks=range(12), feature_blocks=range(4), width=768
        )
        assert 50_000 * header.row.itemsize < 1.5e9

    def test_is_mapped(self, tmp_path):
        record = analysis.Record(write(tmp_path / "a", rows(5)))
        assert isinstance(record.rows, np.memmap) and isinstance(record.pattern(3), np.memmap)


class TestKill:
    @pytest.mark.parametrize("cut", [1, 3, 27, 60, 61, 90])
    def test_what_was_cut_off_is_written_again(self, cut, tmp_path):
        """A row has 72 bytes: the kill leaves a part of the last or of the one before."""
        first, last = rows(4, 1), rows(2, 2)
        whole = write(tmp_path / "whole", first, last).read_bytes()
        path = tmp_path / "cut"
        path.write_bytes(whole[:-cut])
        with pytest.raises(ValueError, match=r"cut is truncated: [45] images, and \d+ of the next one's 72 bytes"):
            analysis.Record(path)
        with analysis.Writer(path, HEADER) as writer:
            assert writer.count == (5 if cut < 72 else 4)
            writer.append(*(part[writer.count - 4 :] for part in last))
        assert path.read_bytes() == whole

    def test_rows_that_were_lost_in_a_crash_of_the_machine_are_cut_off(self, tmp_path):
        """The length is on disk, the last pages are not."""
        path = write(tmp_path / "a", rows(6))
        with open(path, "r+b") as file:
            file.seek(-2 * 72, 2)
            file.write(bytes(2 * 72))
        with analysis.Writer(path, HEADER) as writer:
            assert writer.count == 4

    def test_a_damaged_row_is_found(self, tmp_path):
        path = write(tmp_path / "a", rows(6))
        data = bytearray(path.read_bytes())
        data[HEADER_BYTES + 2 * 72 + 30] ^= 1
        path.write_bytes(data)
        with pytest.raises(ValueError, match="a is damaged at image 2"):
            analysis.Record(path).verify()

    def test_one_process_appends(self, tmp_path):
        with analysis.Writer(tmp_path / "a", HEADER), pytest.raises(BlockingIOError):
            analysis.Writer(tmp_path / "a", HEADER)


class TestReading:
    def test_after_every_block(self, tmp_path):
        record = analysis.Record(write(tmp_path / "a", rows(3)))
        np.testing.assert_array_equal(record.pattern(0), np.tile(np.arange(1, 7), (3, 1)))
        for block, step in ((1, 0), (2, 0), (3, 1)):
            np.testing.assert_array_equal(record.pattern(block), record.rows["pattern"][:, step])
        np.testing.assert_array_equal(record.feature(3), record.rows["feature"][:, 0])
        want = analysis.depths(record.rows["pattern"], [1, 3], 4).mean(0).reshape(2, 3)
        np.testing.assert_allclose(record.mean_depth(), want)

    def test_missing_blocks(self, tmp_path):
        record = analysis.Record(write(tmp_path / "a", rows(3)))
        for block in (-1, 4):
            with pytest.raises(ValueError, match=f"a has no block {block}: tiny has 4"):
                record.pattern(block)
        with pytest.raises(ValueError, match="a has no features after block 2; of blocks: 3"):
            record.feature(2)

    def test_no_record(self, tmp_path):
        (tmp_path / "a").write_bytes(b"something else")
        with pytest.raises(ValueError, match="a is no record of this version"):
            analysis.Record(tmp_path / "a")
        (tmp_path / "a").write_bytes(b"tokred record 1\n{} ")
        with pytest.raises(ValueError, match="a has a damaged header"):
            read_header(tmp_path / "a")

    @pytest.mark.parametrize(("field", "value"), [("method", "evit"), ("fingerprint", "11"), ("blocks", (1, 2))])
    def test_another_setting_is_not_appended(self, field, value, tmp_path):
        path = write(tmp_path / "a", rows(2))
        before = path.read_bytes()
        with pytest.raises(ValueError, match=f"a was recorded with {field} .*, not"):
            analysis.Writer(path, dataclasses.replace(HEADER, **{field: value}))
        assert path.read_bytes() == before

    def test_rows_of_another_shape_are_not_appended(self, tmp_path):
        image, label, top1, pattern, feature = rows(2)
        refused = pytest.raises(ValueError, match=r"pattern must be \[2, 2, 6\], got \[2, 1, 6\]")
        with analysis.Writer(tmp_path / "a", HEADER) as writer, refused:
            writer.append(image, label, top1, pattern[:, :1], feature)
        assert len(analysis.Record(tmp_path / "a")) == 0


class TestComparable:
    def records(self, folder, *written) -> list:
        folder.mkdir(exist_ok=True)
        return [analysis.Record(write(folder / str(n), part, header=h)) for n, (part, h) in enumerate(written)]

    def test_equal_sets(self, tmp_path):
        image, *rest = rows(3)
        analysis.check_comparable(self.records(tmp_path, ((image, *rest), HEADER), ((image, *rows(3, 5)[1:]), HEADER)))

    def test_unequal_sets(self, tmp_path):
        part = rows(3)
        fewer = tuple(values[:2] for values in part)
        with pytest.raises(ValueError, match=r"unequal image sets, 3 and 2 images: .*0 and .*1"):
            analysis.check_comparable(self.records(tmp_path, (part, HEADER), (fewer, HEADER)))
        image = part[0].copy()
        image[1, 0] += np.uint64(1)
        with pytest.raises(ValueError, match="unequal image sets, 1 differ, the first is image 1"):
            analysis.check_comparable(self.records(tmp_path / "other", (part, HEADER), ((image, *part[1:]), HEADER)))

    def test_different_grids(self, tmp_path):
        other = dataclasses.replace(HEADER, grid=(3, 2))
        with pytest.raises(ValueError, match="different grids of patches, 2x3 and 3x2"):
            analysis.check_comparable(self.records(tmp_path, (rows(2), HEADER), (rows(2), other)))


@pytest.mark.parametrize("method", vits.METHODS)
def test_observed_blocks_are_all_there_is_to_know(method):
    """The blocks of the schedule are those that reduce, so a record gives the pattern after every block."""
    model = vits.reduced(vits.tiny("deit"), method)
    x = vits.images()
    seen = {}
    for block in (1, 3):
        model.blocks[block].register_forward_hook(lambda _m, _a, out, block=block: seen.update({block: out[0][:, 0]}))
    blocks = [block for block, r in enumerate(model.tokred_method.schedule(4, 36)[:4]) if r > 0]
    found = analysis.observe(model, x, blocks, (1, 3))
    np.testing.assert_array_equal(found.feature, torch.stack([seen[1], seen[3]], 1))
    with torch.inference_mode(), tokred.trace(model) as traced:
        np.testing.assert_array_equal(found.top1, model(x).argmax(1))
    every = analysis.patterns(traced.last, 1)
    step = -1
    for block in range(4):
        step += block in blocks
        want = found.pattern[:, step] if step >= 0 else np.tile(np.arange(1, 37), (2, 1))
        np.testing.assert_array_equal(every[:, block], want)


def test_a_model_without_reduction_has_no_patterns():
    model = tokred.apply(vits.tiny("gap"), "tome", r=0)
    found = analysis.observe(model, vits.images(3), (), ())
    assert found.pattern.shape == (3, 0, 36) and found.feature.shape == (3, 0, 32) and found.top1.shape == (3,)
