"""`tokred visualize`: the picture of a real run, and every bad input in one line."""

import contextlib
import io

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tokred_kernels import apply, draw, trace
from tokred_kernels.cli import images, main, visualize
from tokred_kernels.trace import Forward

MODEL = "test_vit"  # timm's smallest: 6 blocks of 100 patches, width 64


class TestSteps:
    """Block by block, from assignments made by hand: the class token and six patches."""

    def forward(self, *blocks):
        assign = [None if rows is None else torch.tensor([rows], dtype=torch.int32) for rows, _ in blocks]
        tokens = [7]
        for rows in assign:
            tokens.append(tokens[-1] if rows is None else int(rows.max()) + 1)
        return Forward(torch.arange(7, dtype=torch.int32)[None], tokens, assign, [fused for _, fused in blocks])

    def steps(self, *blocks):
        return [
            (s.block, s.tokens, s.source.tolist(), set(s.fused)) for s in visualize._steps(self.forward(*blocks), 1)
        ]

    def test_blocks_that_reduce_nothing_have_no_panel(self):
        assert self.steps((None, None), ([0, 1, 2, 3, 4, 5, 6], None)) == []
        assert self.steps((None, None), ([0, 1, 1, 2, -1, 2, 3], None), (None, None)) == [
            (1, 4, [1, 1, 2, -1, 2, 3], set())
        ]

    def test_dropped_patches_stay_dropped(self):
        found = self.steps(([0, 1, -1, 2, 3, -1, 4], None), ([0, -1, 1, 2, 2], None))
        assert found == [(0, 5, [1, -1, 2, 3, -1, 4], set()), (1, 3, [-1, -1, 1, 2, -1, 2], set())]

    def test_fused_tokens_are_followed(self):
        first = ([0, 4, 1, 2, 4, 3, 4], 4)
        kept = ([0, 1, 3, 3, 2], 3)  # the fused token is row 2 now, beside a new one
        fused_again = ([0, 3, 1, 2, 3], 3)
        dropped = ([0, 1, 2, 3, -1], None)
        assert self.steps(first, kept)[1] == (1, 4, [2, 1, 3, 2, 3, 2], {2, 3})
        assert self.steps(first, fused_again)[1] == (1, 4, [3, 3, 1, 3, 2, 3], {3})
        assert self.steps(first, dropped)[1] == (1, 4, [-1, 1, 2, -1, 3, -1], set())
        moved = ([0, 1, 2, -1, 3], None)
        assert self.steps(first, moved)[1] == (1, 4, [3, 1, 2, 3, -1, 3], {3})


@pytest.mark.parametrize("model", ["test_vit", "vit_base_patch16_224.augreg_in21k", "vit_base_patch16_clip_224.openai"])
def test_the_photograph_shown_is_the_crop_that_the_model_sees(model, tmp_path):
    """Exactly, whatever mean and deviation a model wants."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    net = timm.create_model(model, img_size=160, depth=1)
    _, pixels = images.load([str(tmp_path / "a.png")], net)
    (shown,) = images.photographs(pixels, net)
    config = timm.data.resolve_model_data_config(net)
    transform = timm.data.create_transform(**{**config, "mean": (0,) * 3, "std": (1,) * 3}, is_training=False)
    seen = (transform(Image.fromarray(noise)) * 255).round().byte().permute(1, 2, 0)
    np.testing.assert_array_equal(shown, seen)


DEIT = "deit_tiny_patch16_224"
RUNS = {
    "tome": (["--r", "0,0,40,0,0,30"], {"r": [0, 0, 40, 0, 0, 30]}),
    "topk": (["--keep-rate", "0.5", "--stages", "2,5"], {"keep_rate": 0.5, "stages": (2, 5)}),
    "evit": (["--keep-rate", "0.6", "--stages", "2,5"], {"keep_rate": 0.6, "stages": (2, 5)}),
}


def draw_to(path, method: str) -> str:
    """Runs the command on the sample photographs; what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["visualize", "--model", DEIT, "--method", method, *RUNS[method][0], "-o", str(path)]) == 0
    return printed.getvalue()


@pytest.fixture(scope="module", params=RUNS)
def drawn(request, tmp_path_factory):
    """The method, its picture and what was printed."""
    path = tmp_path_factory.mktemp("visualize") / "out.png"
    return request.param, path, draw_to(path, request.param)


def test_panels_show_what_the_trace_says(drawn):
    method, path, _ = drawn
    torch.manual_seed(0)
    model = timm.create_model(DEIT).eval()
    _, pixels = images.load([], model)
    apply(model, method, **RUNS[method][1])
    with torch.inference_mode(), trace(model) as traced:
        model(pixels)  # both at once: the command draws one at a time
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        sheet = np.asarray(picture.convert("RGB"))
    assert sheet.shape[1] == 4 * 224 + 5 * draw.GAP
    end = 0
    for n, photograph in enumerate(images.photographs(pixels, model)):
        source = traced.source[n, 1:].numpy()
        fused = set(source[traced.in_fused[n, 1:]])
        assert bool(fused) == (method == "evit")
        panels = {0: photograph, 2: draw.panel(photograph, source, (14, 14), fused)}
        panels[3] = draw.tokens(photograph, source, (14, 14), fused)
        for column, panel in panels.items():
            left = draw.GAP + column * (224 + draw.GAP)
            top = next(y for y in range(end, len(sheet)) if (sheet[y, left : left + 224] == np.asarray(panel)[0]).all())
            np.testing.assert_array_equal(sheet[top : top + 224, left : left + 224], panel)
        end = top + 224


def test_says_what_was_drawn_and_that_weights_are_random(drawn):
    method, path, printed = drawn
    assert printed.count("\n") == 2
    for said in (str(path), "china.jpg, flower.jpg", DEIT, f"{method} ", "random (seed 0)", "weights are random"):
        assert said in printed


def test_same_bytes_again(drawn, tmp_path):
    draw_to(tmp_path / "again.png", drawn[0])
    assert (tmp_path / "again.png").read_bytes() == drawn[1].read_bytes()


def test_files_folders_and_options_in_any_order(tmp_path, capsys):
    for name in ("b.png", "a.JPG"):
        Image.effect_noise((80, 60), 50).save(tmp_path / name)  # greyscale: becomes RGB
    out = tmp_path / "out" / "picture.PNG"
    out.parent.mkdir()
    assert (
        main(["visualize", "--model", MODEL, "--r", "40,0", "-o", str(out), str(tmp_path), str(tmp_path / "b.png")])
        == 0
    )
    printed = capsys.readouterr().out
    assert [printed.count(name) for name in ("a.JPG", "b.png")] == [1, 2]
    with Image.open(out) as picture:
        assert picture.width == 3 * 320 + 4 * draw.GAP  # 160 pixels, doubled
        assert picture.height > 3 * 320


@pytest.mark.parametrize(
    ("model", "size", "grid", "prefix"),
    [
        ("vit_small_patch14_reg4_dinov2", (112, 84), (8, 6), 5),
        ("deit_small_distilled_patch16_224", (80, 112), (5, 7), 2),
    ],
)
def test_prefix_tokens_are_not_drawn_on_a_grid_that_is_not_square(model, size, grid, prefix, monkeypatch, tmp_path):
    create = timm.create_model
    options = dict(img_size=size, depth=1, pretrained_cfg_overlay={"input_size": (3, *size)})
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name, pretrained, **options))
    seen = []
    panels = draw.panels
    monkeypatch.setattr(draw, "panels", lambda *args: seen.append(args) or panels(*args))
    assert main(["visualize", "--model", model, "--r", "1", "-o", str(tmp_path / "a.png")]) == 0
    for photograph, (source,), drawn_grid, _ in seen:
        assert photograph.size == size[::-1]
        assert tuple(drawn_grid) == grid
        assert source.shape == (grid[0] * grid[1],)
        assert len(np.unique(source)) == len(source) - 1
        assert source.min() == prefix


BAD = {
    "no model": (["-o", "a.png"], "--model"),
    "no output": (["--model", MODEL], "--output"),
    "unknown option": (["--model", MODEL, "-o", "a.png", "--fast"], "--fast"),
    "unknown model": (["--model", "deit_smal_patch16_224", "-o", "a.png"], "deit_small_patch16_224"),
    "no VisionTransformer": (["--model", "resnet18", "-o", "a.png"], "ResNet"),
    "unknown method": (["--model", MODEL, "--method", "magic", "-o", "a.png"], "magic"),
    "option of another method": (["--model", MODEL, "--method", "topk", "--r", "5", "-o", "a.png"], "no option 'r'"),
    "keep rate is no number": (["--model", MODEL, "--keep-rate", "half", "-o", "a.png"], "--keep-rate"),
    "stages are no numbers": (["--model", MODEL, "--stages", "early", "-o", "a.png"], "--stages"),
    "r is negative": (["--model", MODEL, "--r", "-1", "-o", "a.png"], "-1"),
    "nothing reduced": (["--model", MODEL, "--r", "0", "-o", "a.png"], "101 tokens"),
    "missing image": (["/nowhere/cat.jpg", "--model", MODEL, "-o", "a.png"], "/nowhere/cat.jpg"),
    "output in no folder": (["--model", MODEL, "-o", "/nowhere/a.png"], "/nowhere/a.png"),
    "output is a folder": (["--model", MODEL, "-o", "/"], "folder"),
    "output is no PNG": (["--model", MODEL, "-o", "a.jpg"], "a.jpg"),
}


def refused(argv, named, capsys) -> None:
    """One line on stderr that says `named`, nothing on stdout, status 2."""
    assert main(["visualize", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tokred: ") and err.count("\n") == 1, err
    assert named in err


@pytest.mark.parametrize(("argv", "named"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_status_2(argv, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(argv, named, capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["folder", "text.png", "empty.jpg", "cut.png"])
def test_broken_image_is_one_line_and_status_2(name, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.jpg").touch()
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    out = tmp_path / "out.png"
    refused([str(tmp_path / "whole.png"), str(tmp_path / name), "--model", MODEL, "-o", str(out)], name, capsys)
    assert not out.exists()


def test_full_disk_is_one_line_and_status_2(tmp_path, capsys):
    (tmp_path / "full.png").symlink_to("/dev/full")
    refused(["--model", MODEL, "-o", str(tmp_path / "full.png")], "No space left", capsys)


def test_missing_package_is_one_line_and_status_2(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "PIL" else object())
    refused(["--model", MODEL, "-o", "a.png"], "tokred visualize needs PIL", capsys)
