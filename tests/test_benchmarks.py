"""Benchmarks and baselines: they measure the right thing, compare before they time, and report what was measured."""

import itertools
import json
import time
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

import tokred_kernels as tokred
from benchmarks import cases, goals, in_place, noise_free, readme_table, report, results
from tokred_kernels import reference, schedule
from tokred_kernels.cli import timing, variants
from tokred_kernels.cli.timing import Timing, interleave
from tokred_kernels.models import baselines

SMALL = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}
R = [9, 0, 7]
COUNTS = [(60, 51), (51, 51), (51, 44)]


@pytest.fixture(params=["token", "avg", "distilled"])
def model(request):
    torch.manual_seed(0)
    if request.param == "distilled":
        return timm.create_model("deit_tiny_distilled_patch16_224", **SMALL).eval()
    pool = {"global_pool": request.param, "class_token": request.param == "token", "init_values": 0.3, "qk_norm": True}
    return VisionTransformer(**SMALL, **pool).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def mlp_tokens(model, images) -> list[int]:
    """How many tokens reach each MLP."""
    counts = []
    blocks = model.blocks if isinstance(model, VisionTransformer) else model.model.blocks
    hooks = [block.mlp.register_forward_hook(lambda _, given, __: counts.append(given[0].shape[1])) for block in blocks]
    model(images)
    for hook in hooks:
        hook.remove()
    return counts


class TestBaselines:
    @torch.inference_mode()
    def test_every_variant_has_the_token_counts_of_the_method(self, model, images):
        reduced = tokred.apply(baselines.shared_copy(model), "tome", r=R)
        expected = [after for _, after in schedule.tokens(reduced)]
        assert mlp_tokens(reduced, images) == expected
        for attention in ("sdpa", "tokred"):
            assert (
                mlp_tokens(baselines.oracle_model(model, schedule.tokens(reduced), attention=attention), images)
                == expected
            )
        for attention in baselines.ATTENTION:
            assert mlp_tokens(baselines.plain_model(model, R, attention=attention), images) == expected

    @torch.inference_mode()
    def test_oracle_that_slices_nothing_is_the_dense_model(self, model, images):
        assert torch.equal(baselines.oracle_model(model, schedule.tokens(model))(images), model(images))

    @torch.inference_mode()
    def test_attention_of_the_oracle_changes_no_logit(self, model, images):
        vendor, ours = (baselines.oracle_model(model, COUNTS, attention=name)(images) for name in ("sdpa", "tokred"))
        torch.testing.assert_close(ours, vendor)
        with pytest.raises(ValueError, match="magic"):
            baselines.oracle_model(model, COUNTS, attention="magic")

    @pytest.mark.parametrize("attention", baselines.ATTENTION)
    @torch.inference_mode()
    def test_plain_form_equals_the_method(self, model, images, attention):
        model, images = model.double(), images.double()  # no near-tie falls the other way
        reduced = tokred.apply(baselines.shared_copy(model), "tome", r=R)
        plain = baselines.plain_model(model, R, attention=attention)
        torch.testing.assert_close(plain(images), reduced(images), rtol=1e-9, atol=1e-9)

    def test_copies_share_weights_and_leave_the_model_alone(self, model):
        before = {name: id(t) for name, t in model.named_parameters()}
        copy = baselines.oracle_model(model, COUNTS).model
        assert copy is not model and copy.blocks[0] is not model.blocks[0]
        assert {name: id(t) for name, t in copy.named_parameters()} == before
        tokred.apply(copy, "tome", r=1)
        assert type(model.blocks[0]) is not type(copy.blocks[0])

    @pytest.mark.parametrize("bad", [{"method": "magic"}, {"attention": "magic"}])
    def test_unknown_plain_form_is_refused(self, model, bad):
        with pytest.raises(ValueError, match="magic"):
            baselines.plain_model(model, R, **bad)

    def test_head_without_plain_form_is_refused(self):
        with pytest.raises(ValueError, match="map"):
            baselines.plain_model(VisionTransformer(**SMALL, global_pool="map"), R)

    @torch.inference_mode()
    def test_variants_do_without_a_plain_form_that_does_not_exist(self, images):
        torch.manual_seed(0)
        model = VisionTransformer(**SMALL, global_pool="map").eval()
        found = variants.build(model, "tome", r=9)
        assert found.keys() == {"dense", "tome", "oracle", "oracle_self"}
        checked = variants.verify(found, "tome", images, 1)
        assert checked["passed"] and checked["cosine_with"].keys() == {"reference"}
        assert checked["steps"] == 3 * len(images)

    def test_schedule_of_another_depth_is_refused(self, model):
        with pytest.raises(ValueError, match="3 entries"):
            baselines.oracle_model(model, COUNTS[:2])

    @pytest.mark.parametrize("prefix", [0, 1, 2, 5])
    @pytest.mark.parametrize(("N", "r"), [(40, 9), (41, 1), (41, 17)])
    @pytest.mark.parametrize("sized", [False, True])
    def test_eager_step_equals_the_reference(self, prefix, N, r, sized):
        generator = torch.Generator().manual_seed(N + r)
        x, keys = torch.randn(2, N, 12, generator=generator), torch.randn(2, 3, N, 16, generator=generator)
        size = torch.randint(1, 9, (2, N), generator=generator).float() if sized else None
        out, size_out = baselines.eager_tome_step(x, keys, r, prefix, size)
        want, want_size, assign = reference.match_merge(x, keys, r, prefix, size)
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(size_out, want_size, rtol=0, atol=0)
        plan = baselines.eager_match(keys, r, prefix)
        assert torch.equal(cases.rows_of_plan(*plan, N, prefix), assign)
        assert torch.equal(baselines.eager_unmerge(out, assign), reference.unmerge(out, assign))


class TestCases:
    SHAPE = cases.Shape("tiny", 2, 33, 2, 7)

    @pytest.mark.parametrize("op", cases.OPS)
    def test_eager_and_op_pass_the_gate(self, op):
        given = cases.inputs(self.SHAPE)
        for call in cases.OPS[op]:
            cases.check(op, given, call(given))

    @pytest.mark.parametrize("op", cases.OPS)
    def test_wrong_result_does_not_pass_the_gate(self, op):
        given, other = cases.inputs(self.SHAPE), cases.inputs(self.SHAPE, seed=1)
        with pytest.raises(AssertionError):
            cases.check(op, given, cases.OPS[op][0](other))

    def test_ids_name_the_shape(self):
        assert str(cases.SHAPES[3]) == "deit_small-B8-N197-r13"

    def test_backend_is_restored_after_a_benchmark(self):
        before = tokred.info()
        with cases.implementation("reference", "match", "cpu"):
            assert tokred.info() != before
        assert tokred.info() == before


class TestInPlace:
    @torch.inference_mode()
    def test_every_call_of_an_op_within_a_forward(self, images, monkeypatch):
        torch.manual_seed(0)
        reduced = tokred.apply(VisionTransformer(**SMALL).eval(), "tome", r=R)
        steps = sum(r > 0 for r in R)
        before = torch.ops.tokred.match
        ticks = itertools.count()  # a second passes between two looks at the clock
        monkeypatch.setattr(in_place, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
        forward, calls = in_place.measure(reduced, images, ("match", "add_merge_norm", "topk"), rounds=3)
        assert calls == {"match": [1.0] * steps, "add_merge_norm": [1.0] * steps, "topk": []}
        assert forward == 1 + 2 * 2 * steps
        assert torch.ops.tokred.match is before
        monkeypatch.setattr(in_place, "measure", lambda *given: (0.5, {"match": [0.01, 0.04]}))
        assert in_place.share(reduced, images, "match", rounds=3) == pytest.approx(10)


class TestTiming:
    def test_every_candidate_once_a_round_in_another_order(self):
        order = []

        def call(name):
            return lambda: (order.append(name), time.sleep(0.002))

        timings = interleave({name: call(name) for name in "abc"}, rounds=4)
        assert [len(timing.seconds) for timing in timings.values()] == [4, 4, 4]
        pairs = order[-24:]  # of each candidate a call that is not timed, then one that is
        assert pairs[::2] == pairs[1::2]
        rounds = ["".join(pairs[i : i + 6 : 2]) for i in range(0, 24, 6)]
        assert all(sorted(names) == list("abc") for names in rounds) and len(set(rounds)) > 1

    def test_stops_after_the_time_with_three_rounds_at_least(self):
        done = []
        timings = interleave(
            {"a": lambda: time.sleep(0.002)}, rounds=99, max_seconds=0, on_round=lambda: done.append(1)
        )
        assert len(timings["a"].seconds) == len(done) == 3

    def test_short_calls_are_repeated_within_a_sample(self):
        calls = []
        interleave({"a": lambda: calls.append(1)}, rounds=2)
        assert len(calls) > 100

    def test_as_many_calls_before_a_sample_are_not_timed(self, monkeypatch):
        asked = []
        monkeypatch.setattr(timing, "_sample_cpu", lambda call, repeats: asked.append(repeats) or len(asked) * 1e-4)
        found = interleave({"a": lambda: None}, rounds=2)
        assert asked == [1, 1, 10, 10, 10, 10]  # the shortest sample is a millisecond
        assert found["a"].seconds == pytest.approx([4e-4, 6e-4])

    def test_a_ratio_is_the_median_of_the_ratios_within_the_rounds(self):
        slow, fast = Timing([4.0, 3.0, 40.0]), Timing([2.0, 1.0, 8.0])
        assert (slow.median, slow.best, slow.over(fast)) == (4.0, 3.0, 3.0)

    def test_figures_of_a_model_are_such_ratios(self):
        timings = {"dense": [4.0, 3.0, 40.0], "oracle": [2.0, 2.0, 4.0], "tome": [2.0, 1.0, 8.0]}
        rows = variants.rows({name: Timing(seconds) for name, seconds in timings.items()}, "tome", 6)
        tome = rows["tome"]
        assert (tome["speedup"], tome["re_sdpa"], tome["re_self"], tome["images_per_second"]) == (3.0, 1.0, None, 3.0)
        assert (rows["dense"]["speedup"], rows["dense"]["re_sdpa"], rows["oracle"]["speedup"]) == (1.0, None, 2.0)


class TestNoiseFree:
    """C10 of the goals: holds on every machine, so it is a test and not only a figure."""

    @torch.inference_mode()
    def test_a_step_adds_two_ops_where_plain_pytorch_adds_nineteen(self, images):
        dense = VisionTransformer(**SMALL).eval()
        reduced = tokred.apply(baselines.shared_copy(dense), "tome", r=5)
        plain = baselines.plain_model(dense, [5, 5, 5], attention="sdpa")
        assert noise_free.ops_per_step(dense, reduced, images, 3) <= 2
        assert noise_free.ops_per_step(dense, plain, images, 3) >= 19

    @pytest.mark.parametrize("op", ["match", "merge", "match_merge"])
    def test_ops_allocate_their_outputs_and_little_else(self, op):
        given = cases.inputs(cases.Shape("deit_small", 2, 197, 6, 13))
        allocated = noise_free.allocated_bytes(lambda: cases.OPS[op][0](given))
        outputs = noise_free.nbytes(cases.OPS[op][0](given))
        assert outputs <= allocated <= outputs + 64 * 2 * 197

    @pytest.mark.parametrize("op", cases.OPS)
    def test_bits_do_not_depend_on_threads_or_runs(self, op):
        given = cases.inputs(cases.Shape("deit_small", 3, 197, 6, 13))
        assert noise_free.bitwise_equal(lambda: cases.OPS[op][0](given))

    def test_unequal_bits_are_noticed(self):
        assert not noise_free.bitwise_equal(lambda: torch.rand(3))


def recorded() -> dict:
    """A result as benchmarks.report saves it."""
    row = {"seconds_min": 0.1, "seconds_median": 0.12, "rounds": 15, "images_per_second": 10.0, "speedup": 1.6}
    return {
        "cpu": {"name": "Example CPU", "isa": "avx2", "cores": 2, "threads": 1},
        "gpus": [],
        "versions": {"tokred_kernels": "0.1.0", "torch": "2.11.0", "timm": "1.0.31", "triton": None},
        "commit": "0123456789ab",
        "date": "2026-01-02",
        "rounds": 15,
        "figures": {"C1": {"B=1": 9.0, "B=8": 5.0}, "C6": {"B=1": 0.3}, "C7": {"B=1": 0.9}},
        "models": [
            {
                "model": "deit_small_patch16_224",
                "method": "tome",
                "options": {"r": 13},
                "batch_size": 8,
                "ideal_speedup": 1.7,
                "variants": {
                    "dense": {**row, "re_sdpa": None, "re_self": None},
                    "tome": {**row, "re_sdpa": 0.97, "re_self": 0.98},
                },
            }
        ],
    }


class TestReport:
    def test_verdicts(self):
        rises = goals.Goal("X", "", 4, 8)
        falls = goals.Goal("Y", "", 1, 0.4, "%", lower_is_better=True)
        assert rises.verdict({"a": 8, "b": 9}) == "target"
        assert rises.verdict({"a": 8, "b": 4}) == "gate"
        assert rises.verdict({"a": 99, "b": 3.99}) == "FAIL"
        assert rises.verdict({"a": float("nan")}) == "FAIL"
        assert falls.verdict({"a": 0.4}) == "target"
        assert falls.verdict({"a": 1.0}) == "gate"
        assert falls.verdict({"a": 1.01}) == "FAIL"
        assert rises.verdict(None) == rises.verdict({}) == "not measured"

    def test_text_of_a_recorded_result(self):
        text = report.text(recorded(), {})
        lines = {line.split("  ")[0]: line for line in text.splitlines()}
        assert lines["C1"].endswith("gate") and "B=1 9x, B=8 5x" in lines["C1"]
        assert lines["C6"].endswith("target")
        assert lines["C7"].endswith("FAIL")
        assert lines["C2"].endswith("not measured") and lines["G4"].endswith("not measured")
        assert "commit 0123456789ab" in text

    def test_gpu_goals_come_from_the_newest_gpu_result(self):
        old = {**recorded(), "figures": {"G4": {"cuda": 1.0}}}
        new = {**old, "date": "2026-03-01", "figures": {"G4": {"cuda": 9.0}}}
        assert results.gpu_figures([recorded(), new, old]) == {"G4": {"cuda": 9.0}}
        assert results.gpu_figures([recorded()]) == {}

    def test_ids_are_unique(self):
        ids = [goal.id for goal in (*goals.CPU, *goals.GPU)]
        assert len(set(ids)) == len(ids)

    def test_show_prints_what_was_saved(self, tmp_path, capsys):
        path = tmp_path / "machine.json"
        path.write_text(json.dumps(recorded()))
        assert report.main(["--show", "--json", str(path)]) == 1  # C7 fails its gate
        assert "Example CPU" in capsys.readouterr().out

    def test_slug_is_a_file_name(self):
        assert results.slug("Intel(R) Xeon(R) Platinum 8488C") == "intel-xeon-platinum-8488c"
        assert results.slug("NVIDIA H200") == "nvidia-h200"


class TestReadmeTable:
    def test_holds_models_goals_machine_and_commit(self):
        text = readme_table.table([recorded()])
        assert "Example CPU (avx2), 1 thread; torch 2.11.0, timm 1.0.31; commit 0123456789ab, 2026-01-02:" in text
        assert "| deit_small_patch16_224, tome r=13 | 8 | **ToMe, tokred** | 10 | 1.60x | 0.970 | 0.980 |" in text
        assert "| C1: match_merge against the eager PyTorch step | B=1: 9x, B=8: 5x | ≥ 4x | ≥ 8x |" in text
        assert "On a GPU: **not measured**" in text

    def test_gpu_result_is_not_called_unmeasured(self):
        result = {
            **recorded(),
            "gpus": [{"name": "NVIDIA H200", "capability": "9.0"}],
            "figures": {"G4": {"cuda": 9.0}},
        }
        text = readme_table.table([result])
        assert text.startswith("NVIDIA H200; ") and "not measured" not in text

    def test_only_the_text_between_the_markers_changes(self):
        readme = "# a\n<!-- table:begin -->\nold\n<!-- table:end -->\n# b\n"
        once = readme_table.insert(readme, "new")
        assert once == "# a\n<!-- table:begin -->\nnew\n<!-- table:end -->\n# b\n"
        assert readme_table.insert(once, "new") == once

    def test_our_readme_has_the_markers(self):
        assert "\nnew\n" in readme_table.insert(readme_table.README.read_text(), "new")

    @pytest.mark.parametrize("readme", ["", "<!-- table:begin -->", "<!-- table:end --><!-- table:begin -->"])
    def test_readme_without_a_pair_of_markers_is_refused(self, readme):
        with pytest.raises(ValueError, match="table:begin"):
            readme_table.insert(readme, "new")

    def test_holds_every_method_that_was_compared(self):
        row = {
            "method": "dpcknn",
            "keep_rate": 0.7,
            "untrained": True,
            "macs": 2_880_000_000,
            "images_per_second": 22.5,
        }
        text = readme_table.table([{**recorded(), "methods": [{**row, "speedup": 1.561, "re_sdpa": 0.9618}]}])
        assert "| dpcknn \\*, 0.7 | 2.88 | 22.5 | 1.56x | 0.962 |" in text
        assert "|" not in text.split("has learned parts")[1].splitlines()[0]
