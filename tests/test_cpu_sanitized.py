"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: random, trap and hostile cases."""

import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "sanitized"
FLAGS = ["-O1", "-g", "-std=c++17", "-fPIC", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def _library(csrc: Path = ROOT / "csrc", others: Path | None = None) -> Path:
    """_C built with the sanitizers, cached by the hash of its sources; with `others`, the folder of such a library,
    only the portable kernels are compiled and the rest is taken from there."""
    sources = sorted([*csrc.glob("*.*"), *csrc.glob("cpu/*.*")])
    digest = hashlib.sha256(b"".join(s.read_bytes() for s in sources) + " ".join(FLAGS).encode()).hexdigest()[:16]
    library = CACHE / digest / "_C.abi3.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    flags = [*FLAGS, "-DTORCH_TARGET_VERSION=0x020a000000000000", *(f"-I{path}" for path in include_paths())]

    def compile_one(source: Path) -> Path:
        target = library.parent / f"{source.stem}.o"
        subprocess.run(["g++", *flags, "-c", source, "-o", target], check=True)
        return target

    mine = [s for s in sources if s.suffix == ".cpp" and (others is None or s.stem == "isa_portable")]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, mine))
    objects += [] if others is None else [o for o in others.glob("*.o") if o.stem != "isa_portable"]
    paths = [f"-L{path}" for path in library_paths()]
    built = library.with_suffix(".tmp")
    subprocess.run(["g++", *flags, "-shared", *objects, *paths, "-ltorch", "-ltorch_cpu", "-o", built], check=True)
    built.rename(library)
    return library


def _runner(library: Path, folder: Path):
    """A function that runs Python code with the sanitized package first on its path."""
    gcc = shutil.which("gcc")
    runtime = [
        subprocess.run([gcc, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip() if gcc else ""
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    if not all(os.path.isabs(path) for path in runtime):
        pytest.skip("needs gcc with the sanitizers' runtime libraries")
    package = folder / "tokred_kernels"
    shutil.copytree(ROOT / "tokred_kernels", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(library, package)
    env = {
        **os.environ,
        "PYTHONPATH": f"{folder}:{ROOT / 'tests'}",
        "LD_PRELOAD": " ".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return lambda code: subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=folder
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return _runner(_library(), tmp_path_factory.mktemp("sanitized"))


PLANTED = [
    ("match_image.h", "na_pad = round_up(na, W)", "na_pad = na"),
    ("attention_vector.h", "return round_up(keys, kKeyRows);", "return keys;"),
    ("merge_image.h", "memset(out, 0, m.C * sizeof(E));", ";"),
]


@pytest.fixture(scope="module")
def run_planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    shutil.copytree(ROOT / "csrc", folder / "csrc", ignore=shutil.ignore_patterns("cuda"))
    for file, good, bad in PLANTED:
        kernel = folder / "csrc/cpu" / file
        assert good in kernel.read_text()
        kernel.write_text(kernel.read_text().replace(good, bad))
    return _runner(_library(folder / "csrc", _library().parent), folder)


def test_random_cases(run):
    done = run("from fuzz import fuzz; fuzz(1500, seed=77, report_every=0); print('clean')")
    assert done.returncode == 0 and "clean" in done.stdout, done.stderr[-3000:]


def test_table_of_cases(run):
    code = """
from cases import MATCH_CASES, MERGE_CASES, TWO_WAY_CASES
from fuzz import available_isas, run_match, run_merge
import tokred_kernels as tokred
for isa in available_isas():
    with tokred.use_backend("cpu", isa=isa):
        for case in MATCH_CASES + TWO_WAY_CASES:
            if case.small: run_match(case)
        for case in MERGE_CASES:
            for reduce in ("mean", "sum", "amax"): run_merge(case, reduce)
            tokred.unmerge(case.y(), case.assign())
print("clean")
"""
    done = run(code)
    assert done.returncode == 0 and "clean" in done.stdout, done.stderr[-3000:]


def test_table_of_selections(run):
    code = """
from fuzz import available_isas, run_topk
from topk_cases import TOPK_CASES, with_float64
import tokred_kernels as tokred
for n, isa in enumerate(available_isas()):
    with tokred.use_backend("cpu", isa=isa):
        for case in with_float64(TOPK_CASES)[n::2]: run_topk(case)
print("clean")
"""
    done = run(code)
    assert done.returncode == 0 and "clean" in done.stdout, done.stderr[-3000:]


def test_table_of_clusters(run):
    """A quarter of the small ones on each instruction set."""
    code = """
from fuzz import available_isas, run_cluster
from cluster_cases import CLUSTER_CASES, with_float64
import tokred_kernels as tokred
small = [case for case in with_float64(CLUSTER_CASES) if case.small]
for n, isa in enumerate(available_isas()):
    with tokred.use_backend("cpu", isa=isa):
        for case in small[n::4]: run_cluster(case)
print("clean")
"""
    done = run(code)
    assert done.returncode == 0 and "clean" in done.stdout, done.stderr[-3000:]


def test_table_of_attention_cases(run):
    """A quarter of the small ones on each instruction set, and what reaches past one block of keys."""
    code = """
from attention_cases import ATTENTION_CASES, AttentionCase
from fuzz import available_isas, run_attention
import torch, tokred_kernels as tokred
long = [AttentionCase(B=1, H=1, N=1100, Nq=20, D=24, size_kind=s, scores="mean") for s in ("none", "late")]
for n, isa in enumerate(available_isas()):
    with tokred.use_backend("cpu", isa=isa):
        for case in [c for c in ATTENTION_CASES if c.small and c.N][n::4] + long: run_attention(case)
print("clean")
"""
    done = run(code)
    assert done.returncode == 0 and "clean" in done.stdout, done.stderr[-3000:]


@pytest.mark.parametrize(
    "call, where",
    [
        # Regression: 5 rows in AVX2's 4 lanes of double were ranked with lanes of memory that was never written.
        ("tokred.match(torch.randn(1, 9, 3), 4, 0)", "rank_all"),
        ("tokred.attention(*torch.randn(3, 1, 1, 9, 8))", "logit_rows"),
    ],
    ids=["match", "attention"],
)
def test_a_planted_bug_is_found(call, where, run_planted):
    """Rows rounded up to whole tiles in the scratch's use, but not in its size."""
    done = run_planted(f"""
import torch, tokred_kernels as tokred
with tokred.use_backend("cpu", isa="portable"):
    {call}
""")
    assert done.returncode != 0
    assert "AddressSanitizer: use-after-poison" in done.stderr and where in done.stderr


def test_an_output_that_is_never_written_shows(run_planted):
    """The planted one: a row without members."""
    done = run_planted("""
import torch, tokred_kernels as tokred
x, assign = torch.randn(1, 2, 3), torch.zeros(1, 2, dtype=torch.int32)
with tokred.use_backend("cpu", isa="portable"):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        out, _ = tokred.merge(x.to(dtype), assign, 2)
        print(out.isnan().tolist())
""")
    assert done.stdout.splitlines() == ["[[[False, False, False], [True, True, True]]]"] * 4, done.stderr[-3000:]
