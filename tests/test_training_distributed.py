"""Two processes (gloo) against one: gradients, evaluation, resuming, DTensor. distributed_checks.py does the work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import distributed_checks
import pytest
import training_folder

import tokred_kernels

TESTS = Path(__file__).parent
ROOT = Path(tokred_kernels.__file__).parent.parent


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of the two processes found."""
    out, folder = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("data")
    training_folder.write(folder)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join([str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*run, str(TESTS / "distributed_checks.py"), str(out), str(folder)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((out / "results.json").read_text())


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", distributed_checks.METHODS)
def test_gradients_are_those_of_one_process(method, wrapper, results):
    """In float64; the sums are in another order."""
    for own in results:
        assert own["gradients"][f"{method} {wrapper}"] < 1e-12


def test_ops_on_sharded_tensors_stay_sharded_and_give_the_same(results):
    for own in results:
        assert own["shardings"] == dict.fromkeys(own["shardings"], True) and len(own["shardings"]) == 18


def test_sharded_evaluation_is_that_of_one_process(results):
    for own in results:
        shared, alone = own["evaluation"]
        assert shared == alone and shared["images"] == 11


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
@pytest.mark.parametrize("run", ["both", "then"])
def test_two_processes_train_as_one_also_where_one_began(run, wrapper, results):
    """Weights and their average; with FSDP2 those that are compiled. Six updates in float32 at a learning rate of 1e-3
    move weights by up to 6e-3."""
    assert results[0]["resumed"][f"{wrapper} {run}"] < 1e-5
