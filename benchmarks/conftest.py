"""One thread and no autograd for every benchmark: two threads on a shared machine quantise times to 8 ms."""

import pytest
import torch

from tokred_kernels.cli.timing import keep_freed_memory


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_freed_memory()
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)
