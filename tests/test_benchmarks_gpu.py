"""`make gpu` without a GPU: its steps, and every part that it measures, on a CPU with a clock of its own."""

import functools
import itertools
import json
import sys
import time

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from benchmarks import cases, goals, gpu, gpu_measure, gpu_models, gpu_ops, readme_table, results, roofline, sanitize
from benchmarks.gpu_device import Gpu, Watched, best, by_sdpa
from benchmarks.static.calls import Call, Shape
from tokred_kernels._backend import OPS
from tokred_kernels.cli.timing import Timing


class Cpu(Gpu):
    """Runs every call once, on models of 257 tokens of width 32, and says that it took a second, or what `seconds` says
    of its name."""

    name, dtype, backends = "cpu", torch.float32, ("cpu", "reference")
    sets, cached, image = 2, 1 << 12, (64, 64)

    def __init__(self, **seconds: float):
        self.seconds = seconds

    def batch(self, B):
        return min(B, 2)

    def create(self, model):
        torch.manual_seed(0)
        return VisionTransformer(
            img_size=64, patch_size=4, embed_dim=32, depth=24 if "large" in model else 12, num_heads=2, num_classes=5
        ).eval()

    def compile(self, call, **options):
        torch._dynamo.utils.counters["stats"]["unique_graphs"] += 1
        return call

    def replay(self, call):
        return call

    def time(self, calls, **options):
        for call in calls.values():
            call()
        return {name: Timing([self.seconds.get(name.replace(" ", "_"), 1.0)]) for name in calls}

    def peak(self, call):
        call()
        return 100

    def watch(self, call):
        call()
        return Watched(100, 0)

    def free(self):
        pass


class TestGpuDriver:
    """The parts of `make gpu` that need no GPU."""

    @staticmethod
    def step(script: str, limit: float = 20.0, needs: float = 1.0) -> gpu.Step:
        return gpu.Step("step", (sys.executable, "-c", script), limit, needs)

    def test_a_step_says_how_it_went(self):
        outcome = gpu.run_step(self.step("print('hello', {seconds})"), 99)
        assert outcome["status"] == "ok" and outcome["tail"] == "hello 20\n"

    def test_a_failure_is_recorded_with_its_output(self):
        outcome = gpu.run_step(self.step("import sys; print('why', file=sys.stderr); sys.exit(3)"), 99)
        assert outcome["status"] == "exit status 3" and "why" in outcome["tail"]

    def test_a_step_that_hangs_is_stopped_and_recorded(self):
        outcome = gpu.run_step(self.step("import time; print('here', flush=True); time.sleep(60)", limit=1), 99)
        assert outcome["status"] == "stopped after 1 s" and outcome["tail"] == "here\n"

    def test_nothing_that_a_step_started_outlives_it(self, tmp_path):
        """xdist's workers would still be on the GPU while the next step measures."""
        child = f"import time; time.sleep(3); open({str(tmp_path / 'alive')!r}, 'w')"
        gpu.run_step(
            self.step(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])", limit=1), 99
        )
        time.sleep(3.5)
        assert not list(tmp_path.iterdir())

    def test_what_failed_or_was_stopped_before_is_done_again(self, tmp_path):
        path, later = tmp_path / "gpu.json", time.monotonic() + 60
        script = "import sys; print(sys.argv[1:], {seconds}); sys.exit(len(sys.argv) == 1)"
        step = gpu.Step("tests", (sys.executable, "-c", script), 10, 0, again=("--lf",))
        gpu.carry_out(path, [step], ["tests", "build"], False, later)
        again = gpu.carry_out(path, [step], ["tests", "build"], True, later)["steps"]["tests"]
        assert again["status"] == "ok" and again["tail"] == "['--lf'] 10\n"
        gpu.save(path, results.commit(), {"tests": {"status": "stopped after 10 s"}})
        again = gpu.carry_out(path, [step], ["tests", "build"], True, later)["steps"]["tests"]
        assert again["status"] == "exit status 1" and again["tail"].startswith("[] 5")  # all the time that is left

    def test_a_missing_program_is_recorded(self):
        outcome = gpu.run_step(gpu.Step("step", ("/nowhere/nvcc",), 5, 1), 99)
        assert outcome["status"].startswith("not started")

    def test_a_step_without_time_is_not_started(self):
        outcome = gpu.run_step(self.step("", needs=30), 29)
        assert outcome == {"status": "not started: 29 s left", "seconds": 0.0, "tail": ""}

    def test_plan_builds_tests_and_measures(self, tmp_path, monkeypatch):
        monkeypatch.setattr(gpu, "find_sanitizer", lambda: "/opt/compute-sanitizer")
        steps = gpu.plan(tmp_path / "out")
        assert tuple(step.name for step in steps) == gpu.STEPS
        assert steps[3].command[-2:] == ("--only", "") and gpu.plan(tmp_path, "row", True)[3].command[-1] == "--resume"
        before = sum(step.limit for step in steps[:3])
        assert before + steps[3].needs <= gpu.SECONDS  # a slow build and slow tests leave some time for measuring

    def test_the_two_steps_of_tests_have_every_test_for_a_gpu(self):
        tests = results.ROOT / "tests"
        marked = {f"tests/{path.name}" for path in tests.glob("*.py") if "mark.gpu" in path.read_text()}
        ops, models = (set(gpu.test_files(step)) for step in gpu.TESTS)
        assert ops | models == marked - {"tests/test_benchmarks_gpu.py"} and not ops & models
        assert "tests/test_gpu_triton.py" in ops and "tests/test_models_device.py" in models

    def test_pytest_summary(self):
        tail = "FAILED tests/x.py::test_3 passed\n3 failed, 41 passed, 2 skipped, 900 deselected, 1 error in 61.20s\n"
        assert gpu.outcomes(tail) == {"failed": 3, "passed": 41, "skipped": 2, "deselected": 900, "error": 1}
        assert gpu.outcomes("Segmentation fault") == {}

    def test_failed_steps_are_named(self):
        steps = {"build": {"status": "ok"}, "tests": {"status": "exit status 1"}}
        assert gpu.failures({"steps": steps}) == ["tests"]

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
    def test_without_a_gpu_it_says_so(self, capsys):
        with pytest.raises(SystemExit, match="2"):
            gpu.main([])
        assert "sees no NVIDIA GPU" in capsys.readouterr().err

    def test_merge_bytes_of_the_goals_shape(self):
        # 38.7 MB in and 36.2 MB out in bfloat16, and 5 bytes in a thousand for assign and sizes.
        assert gpu_ops.merge_bytes(256, 197, 184, 384, 2) == pytest.approx(75.5e6, rel=0.01)


def part(name: str):
    return next(measure for part, _, measure in gpu_measure.parts() if part == name)


class TestParts:
    """What is measured on a GPU, run on a CPU."""

    @torch.no_grad()
    def test_steps(self):
        slow = {"eager_match": 16.0, "eager_match_merge": 12.0, "eager_whole": 14.0, "copy": 0.5}
        figures, raw = part("steps")(Cpu(cpu_merge=2.0, **slow))
        assert figures["G4"] == {"cpu": 16.0}
        assert figures["G7 eager"] == {"cpu match_merge": 12.0, "cpu with add and norm": 14.0}
        # A merge moves 0.97 of what copying x moves, in four times the time.
        assert figures["G5"]["cpu"] == pytest.approx(100 * 0.97 / 4, rel=0.01)
        assert "reference merge" in raw["steps"]

    @torch.no_grad()
    def test_attention_against_the_best_of_torch(self, monkeypatch):
        monkeypatch.setattr(gpu_ops, "LENGTHS", (40, 577))
        figures, _ = part("attention")(Cpu(cpu_cls=0.5, cpu_mean=0.55, cpu_none=0.49))
        assert figures["G1"] == {"cpu N=40": 2.0} and figures["G1 N=577"] == {"cpu N=577": 2.0}
        assert figures["G2"] == {"cpu N=40": 2.0, "cpu N=577": 2.0}
        assert figures["G3 cls"]["cpu N=40"] == pytest.approx(100 / 49)
        assert figures["G3 mean"].keys() == {"cpu N=40"}

    @torch.no_grad()
    def test_compiled_steps(self):
        figures, _ = part("compiled steps")(Cpu(fused=0.9, plain_match_merge=3.0, plain_whole=4.0))
        assert figures["G6"] == {"B=256": 0.9}
        assert figures["G7 compiled"] == {"match_merge": 3.0, "with add and norm": 4.0}

    @torch.no_grad()
    def test_a_row_of_a_goal(self):
        name = f"row {gpu_models.DEIT_S} tome r=13 B=64"
        seconds = {"dense": 3.0, "dense,_cudnn": 2.0, "oracle": 1.0, "tome": 1.25, "plain_sdpa": 2.5}
        figures, more = part(name)(Cpu(**seconds))
        assert figures == {
            "G8 DeiT-S B=64": {"B=64": 0.8}, "G10 explicit": {"B=64": 0.8}, "G10 sdpa": {"B=64": 0.8},
        } | {"G10 sdpa": {"B=64": 1 / 1.25}}  # fmt: skip
        row = more["models"][0]["variants"]
        assert row.keys() == {"dense", "tome", "oracle", "oracle_self", "plain_sdpa", "plain_explicit"}
        assert row["tome"]["images_per_second"] == 64 / 1.25

    @torch.no_grad()
    def test_latency_of_small_batches(self):
        figures, _ = part(f"row {gpu_models.DEIT_S} tome r=13 B=1")(Cpu(tome=1.2))
        assert figures == {"G11": {"B=1": 1.2}}

    @torch.no_grad()
    def test_compiled_models(self):
        name = f"compiled {gpu_models.DEIT_S} tome r=13 B=256 against "
        figures, _ = part(name + "dense")(Cpu(dense=3.0, tome=2.0))  # compiled: a second each
        assert figures == {"G9 DeiT-S r=13": {"B=256": 1.0}}
        figures, _ = part(name + "plain_sdpa")(Cpu(tome=0.5))
        assert figures == {"G10 compiled": {"plain_sdpa": 2.0}}

    @torch.no_grad()
    def test_training_mctf_and_what_is_counted(self):
        gpu = Cpu(tome=1.25, evit=1.0, exact=1.03)
        figures, _ = part("training")(gpu)
        assert figures == {"G12": {"tome": 0.8, "evit": 1.0}, "G12 memory": {"tome": 1.0, "evit": 1.0}}
        assert part("mctf")(gpu)[0]["G14"]["B=256"] == pytest.approx(3)
        figures, _ = part("noise free")(gpu)
        assert {name: figure["tome"] for name, figure in figures.items()} == {
            "G13 kernels": 0, "G13 host": 0, "G13 replay": 1, "G13 graphs": 1, "G13 matrices": 0,
        }  # fmt: skip

    def test_a_matrix_of_tokens_is_seen(self):
        with gpu_models._Shapes() as seen:
            torch.ones(2, 5, 3) @ torch.ones(2, 3, 5)
        assert gpu_models.matrices(seen.found, {5}) == 1

    def test_kernels_and_their_roofline(self, monkeypatch, tmp_path):
        call = Call("merge", "size", Shape(64, 197, 6), self.merge_arguments(), floor=1 << 11)
        module = type("Module", (), {"all_calls": staticmethod(lambda: iter([call])), "is_counted": lambda _: True})
        monkeypatch.setattr(gpu_ops, "cuda", module)
        monkeypatch.setattr(gpu_ops, "triton", module)
        _, more = part("kernels")(Cpu(merge=2e-4))
        assert [row["backend"] for row in more["kernels"]] == ["cpu", "reference"] and not more["kernels that failed"]
        assert {row["seconds"] for row in more["kernels"]} == {1e-4} and not more["kernels"][0]["warm"]
        for row, backend in zip(more["kernels"], ("cuda", "triton"), strict=True):
            row["backend"] = backend
        result = {
            "kernels": more["kernels"],
            "gpus": [{"name": "NVIDIA H200"}], "raw": {"bytes/s": 4e12}, "commit": "0", "date": "2026-01-01",
        }  # fmt: skip
        path = tmp_path / "result.json"
        path.write_text(json.dumps(result))
        assert roofline.main([str(path)]) == 0 and (tmp_path / "result.png").stat().st_size > 10_000
        point = roofline.points(result)[0]
        assert point["name"] == "cuda merge size B64-N197-H6-bfloat16"
        assert point["bytes"] == pytest.approx(1.89e11, rel=0.01)  # as counted, in 1e-4 s

    @staticmethod
    def merge_arguments() -> tuple:
        i = cases.inputs(cases.Shape("deit_small", 2, 33, 2, 7))
        return torch.zeros(2, 33, 128), i.assign, i.m, i.size

    def test_every_goal_has_its_part(self):
        """A goal that no part measures would read "not measured" for ever."""
        source = "".join((results.ROOT / f"benchmarks/{name}.py").read_text() for name in ("gpu_ops", "gpu_models"))
        for goal in goals.GPU:
            assert f'"{goal.id}' in source or (goal.id.startswith(("G3", "G13")) and goal.id.split()[1] in source)

    def test_the_grid_is_whole(self):
        names = [name for name, *_ in gpu_measure.parts()]
        assert len(set(names)) == len(names)
        # 4 models, 4 batch sizes, 5 options; ViT-L loses every patch at r = 13 and 16.
        assert sum(name.startswith("row ") for name in names) == 4 * 4 * 5 - 4 * 2
        assert names == [name for name, *_ in gpu_measure.parts()]

    def test_a_baseline_that_does_not_run_here_is_left_out(self):
        def masked():
            with_mask = torch.nn.functional.scaled_dot_product_attention
            return with_mask(*(torch.ones(1, 1, 4, 8),) * 3, attn_mask=torch.ones(4, 4).bool())

        assert "masked" in by_sdpa("masked", masked)
        assert best({"a": Timing([2.0]), "a, flash": Timing([1.0]), "ab": Timing([0.5])}, "a").median == 1.0


class TestCollect:
    TODO = (
        ("broken", 0, lambda _: 1 / 0),
        ("one", 0, lambda _: ({"G4": {"cuda": 2.0}}, {"models": [], "ops": {"a": 1}})),
        ("slow", 1e9, lambda _: 1 / 0),
        ("two", 0, lambda _: ({"G4": {"triton": 3.0}}, {})),
    )

    def test_a_part_that_fails_hides_no_other(self, tmp_path):
        path = tmp_path / "out.json"
        result = gpu_measure.collect(path, 60, self.TODO, Cpu())
        assert json.loads(path.read_text()) == result
        assert result["figures"] == {"G4": {"cuda": 2.0, "triton": 3.0}} and result["raw"] == {"ops": {"a": 1}}
        assert result["parts"] == {
            "broken": "ZeroDivisionError: division by zero", "one": "ok", "slow": "no time left", "two": "ok",
        }  # fmt: skip

    def test_it_goes_on_where_it_stopped(self, tmp_path):
        path, calls = tmp_path / "out.json", []
        row = {"model": "m", "method": "tome", "options": {}, "batch_size": 1}
        gpu_measure.collect(path, 60, [("rows", 0, lambda _: ({}, {"models": [row | {"x": 1}]}))], Cpu())
        again = [("rows", 0, lambda _: (calls.append(1), ({}, {"models": [row | {"x": 2}]}))[1])]
        assert gpu_measure.collect(path, 60, again, Cpu(), resume=True)["models"] == [row | {"x": 1}] and not calls
        assert gpu_measure.collect(path, 60, again, Cpu())["models"] == [row | {"x": 2}]  # in place of the old one
        path.write_text(json.dumps({**json.loads(path.read_text()), "commit": "another"}))
        assert gpu_measure.collect(path, 60, [], Cpu(), resume=True)["models"] == []

    def test_list_and_only(self, capsys):
        assert gpu_measure.main(["--list", "--only", "^(steps|mctf)$"]) == 0
        assert capsys.readouterr().out.split() == ["steps", "mctf"]
        with pytest.raises(SystemExit):
            gpu_measure.main(["--only", "no such part", "file"])

    def test_the_driver_keeps_what_other_commands_found(self, tmp_path):
        path = tmp_path / "gpu.json"
        steps = [gpu.Step(name, (sys.executable, "-c", "pass"), 20, 0) for name in ("build", "tests")]
        later = time.monotonic() + 60
        run = functools.partial(gpu.carry_out, path, steps, resume=False, deadline=later)
        assert run(chosen=["build"])["steps"].keys() == {"build"}
        result = json.loads(path.read_text())
        path.write_text(json.dumps({**result, "figures": {"G4": {"cuda": 9.0}}}))
        result = run(chosen=["tests"])
        assert result["steps"].keys() == {"build", "tests"} and result["figures"] == {"G4": {"cuda": 9.0}}
        path.write_text(json.dumps({**result, "commit": "another"}))
        assert (
            run(chosen=["tests"])["steps"].keys() == {"tests"} and "G4" not in json.loads(path.read_text())["figures"]
        )

    def test_readme_has_a_line_a_model(self):
        variant = {"images_per_second": 1000.0, "speedup": 1.5, "re_sdpa": 0.97}
        row = {
            "model": "m",
            "method": "tome",
            "options": {"r": 13},
            "ideal_speedup": 1.7,
            "variants": {"tome": variant},
        }
        text = readme_table._grid({"models": [{**row, "batch_size": B} for B in (64, 8)]})
        assert text.splitlines()[2] == (
            "| m | tome | r=13 | 1.70x | 1e+03/s, 1.50x, RE 0.970 | 1e+03/s, 1.50x, RE 0.970 |"
        )


def test_the_sanitizer_sees_every_op_and_its_results_are_compared(monkeypatch):
    few: dict[str, list] = {}
    for step in sanitize.steps():
        few[step[0]] = [*few.get(step[0], []), step][:2]
    monkeypatch.setattr(sanitize, "steps", lambda: itertools.chain(*few.values()))
    with torch.no_grad():
        assert sanitize.run("cpu", ("cpu",)) == set(OPS)
        wrong = [(op, case, (args[0] + 1, *args[1:]), kwargs) for op, case, args, kwargs in few["unmerge"]]
        monkeypatch.setattr(sanitize, "steps", lambda: iter(wrong))
        monkeypatch.setattr(sanitize.tokred.reference, "unmerge", lambda y, assign: y * 0)
        with pytest.raises(AssertionError, match="cpu unmerge"):
            sanitize.run("cpu", ("cpu",))
