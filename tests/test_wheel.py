"""The wheel: one build for every torch >= 2.10 and Python >= 3.10, checked by the auditors and under a second torch."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import tokred_kernels as tokred
from benchmarks.wheel import ROOT, built

OTHER_TORCH = "2.13.0+cpu"
SMOKE = """
import sys, types, torch
import tokred_kernels as tokred
assert "site-packages" in tokred.__file__, tokred.__file__
x, k, size = torch.randn(3, 197, 64, requires_grad=True), torch.randn(3, 2, 197, 32), torch.ones(3, 197)
out, size_out, assign = tokred.match_merge(x, k, 13, 1, size)
with tokred.use_backend("reference"):
    want = tokred.match_merge(x, k, 13, 1, size)
torch.testing.assert_close((out, size_out, assign), want)
assert torch.equal(torch.compile(tokred.match, backend="eager", fullgraph=True)(k, 13), assign)
out.sum().backward()
print("torch", torch.__version__, "runs", tokred.info()["match"]["cpu"])
"""


def run(*command, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, **kwargs)


@pytest.fixture(scope="module")
def wheel() -> Path:
    return built()


def test_tag_and_size(wheel):
    assert re.fullmatch(rf"tokred_kernels-{tokred.__version__}-cp310-abi3-linux_\w+\.whl", wheel.name)
    assert wheel.stat().st_size < 3 * 2**20


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    package = {"_C.abi3.so", "py.typed", "analysis/page.html"}
    assert {f"tokred_kernels/{name}" for name in package} <= set(names)
    assert not [n for n in names if n.startswith(("tests", "benchmarks", "csrc")) or n.endswith((".cpp", ".cu"))]
    with zipfile.ZipFile(wheel) as archive:
        libraries = [archive.read(n) for n in names if n.endswith(".so")]
    assert not any(str(ROOT).encode() in library for library in libraries)  # no path of the build machine


@pytest.mark.parametrize(
    "auditor", [("abi3audit", "--strict", "--assume-minimum-abi3", "3.10"), ("torch-abi-audit", "--check", "both")]
)
def test_auditors(wheel, auditor, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    for library in tmp_path.glob("tokred_kernels/*.so"):
        tool = Path(sys.executable).with_name(auditor[0])
        audited = run(tool, *auditor[1:], library)
        assert audited.returncode == 0, audited.stdout + audited.stderr
        if auditor[0] == "torch-abi-audit":
            assert "STABLE" in audited.stdout and "2.10" in audited.stdout


def test_runs_under_another_torch(wheel, tmp_path):
    """The same file under CPU-only torch 2.13, in an environment of its own."""
    python = ROOT / ".cache" / f"torch-{OTHER_TORCH}" / "bin" / "python"
    if run(python, "-c", "import torch").returncode if python.exists() else True:
        run(sys.executable, "-m", "venv", python.parent.parent, check=True)
        installed = run(python, "-m", "pip", "install", "-q", f"torch=={OTHER_TORCH}", "numpy")
        if installed.returncode:
            pytest.skip(f"torch {OTHER_TORCH} cannot be installed here: {installed.stderr.strip().splitlines()[-1]}")
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", wheel, check=True)
    done = run(python, "-c", SMOKE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"torch {OTHER_TORCH} runs cpu (" in done.stdout
    if "tokred_kernels/_cuda.abi3.so" in zipfile.ZipFile(wheel).namelist():  # a torch that brings no such CUDA runtime
        refused = run(python, "-c", "import torch; torch.version.cuda = '12.6'; import tokred_kernels", cwd=tmp_path)
        assert re.search(r"_cuda\.abi3\.so does not load \(lib.+\); rebuild it for this torch", refused.stderr)


def test_cuda_library_loads_and_registers_without_a_gpu():
    if "cuda" in tokred.info()["reasons"]:
        pytest.skip(f"no CUDA kernels in this build: {tokred.info()['reasons']['cuda']}")
    for op in ("match", "merge", "unmerge", "match_merge"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tokred::{op}", "CUDA")
        assert tokred.info()[op]["cuda"] == "cuda"


def setup(**env: str) -> subprocess.CompletedProcess:
    return run(sys.executable, "setup.py", "-q", "--name", cwd=ROOT, env={**os.environ, **env})


def test_build_modes():
    assert "tokred_kernels: CUDA kernels left out: TOKRED_BUILD=cpu" in setup(TOKRED_BUILD="cpu").stdout
    refused = setup(TOKRED_BUILD="gpu")
    assert refused.returncode and "TOKRED_BUILD must be cpu or cuda, got 'gpu'" in refused.stderr


def test_cuda_is_insisted_on_or_left_out_with_the_reason(tmp_path):
    """Asks setup.py itself: an nvcc elsewhere on this machine would be found whatever PATH says."""
    code = """
import types, setup_under_test
torch = types.SimpleNamespace(__version__="2.11.0+cpu", version=types.SimpleNamespace(cuda=None))
print(setup_under_test.why_no_cuda(torch, "/usr/local/cuda"))
torch.version.cuda = "13.0"
print(setup_under_test.why_no_cuda(torch, None))
"""
    source = (ROOT / "setup.py").read_text().split("ext_modules, cmdclass = extensions()")[0]
    (tmp_path / "setup_under_test.py").write_text(
        source.replace("Path(__file__).resolve().parent", f"Path({str(ROOT)!r})")
    )
    shown = run(sys.executable, "-c", code, cwd=tmp_path)
    assert shown.stdout.splitlines() == [
        "torch 2.11.0+cpu has no CUDA",
        "no nvcc on PATH, in CUDA_HOME or /usr/local/cuda*",
    ], shown.stderr


def test_intermediate_code_for_one_generation(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "build_backend")
    import toolkit

    one = ["-gencode=arch=compute_80,code=[sm_80,sm_90,sm_100,sm_120,compute_80]"]
    assert toolkit.gencode("8.0;9.0;10.0;12.0+PTX") == one
    assert toolkit.gencode("8.0;9.0;10.0;12.0+PTX", 90) == [
        "-gencode=arch=compute_80,code=[sm_80]",
        "-gencode=arch=compute_90,code=[sm_90,sm_100,sm_120,compute_90]",
    ]
    assert toolkit.gencode("7.5 8.6+PTX", 90) == toolkit.gencode("7.5 8.6+PTX")
    assert toolkit.gencode("7.5 8.6+PTX")[1] == "-gencode=arch=compute_80,code=[sm_86,compute_80]"
    assert toolkit.gencode("Ampere") == toolkit.gencode("") == []  # torch's to choose


def test_metadata_and_sdist_need_no_torch(tmp_path):
    """Regression: in an environment without torch pip failed before it could install one to build with."""
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    made = run(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path, cwd=ROOT, env=env)
    assert made.returncode == 0, made.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    names = run("tar", "tzf", archive).stdout
    assert all(f"/{part}" in names for part in ("csrc/ops.cpp", "csrc/cuda/match.cuh", "build_backend/backend.py"))
    code = "import backend; print(backend.get_requires_for_build_wheel())"
    asked = run(sys.executable, "-c", code, cwd=ROOT / "build_backend", env=env)
    assert asked.stdout.strip() == "['ninja']", asked.stderr  # this environment does have one


def test_no_compiler_says_what_to_install(tmp_path):
    refused = setup(PATH=str(tmp_path), CXX="")
    assert refused.returncode
    assert "no C++ compiler found; install one (Debian, Ubuntu: apt-get install g++)" in refused.stderr
