"""What analysis costs: `python -m benchmarks.analysis`, alone on the machine.

Recording: a forward that is observed and appended to a record, against the same forward alone; one thread, interleaved,
the median of the ratios of neighbours: a slow moment of the machine hits both. Pairs: from patterns in memory to the
mean IoU of every pair, and the memory of the process at its most.
"""

import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch

import tokred_kernels as tokred
from tokred_kernels import analysis
from tokred_kernels.cli.timing import interleave

MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224")
METHODS = {"tome": {"r": 13}, "topk": {"keep_rate": 0.7}, "evit": {"keep_rate": 0.7}}
BATCH, ROUNDS = 8, 25
SETTINGS, IMAGES, PATCHES = 10 * 4, 10_000, 196


def recording(name: str, method: str) -> tuple[float, int]:
    """Time with recording over time without, and the bytes of an image."""
    torch.manual_seed(0)
    model = tokred.apply(timm.create_model(name).eval(), method, **METHODS[method])
    blocks = [block for block, r in enumerate(model.tokred_method.schedule(12, PATCHES)[:12]) if r > 0]
    features = (3, 6, 9, 11)
    header = analysis.Header(
        dataset="noise",
        model=name,
        weights="random",
        fingerprint="",
        method=method,
        keep_rate=None,
        options=METHODS[method],
        untrained=False,
        depth=12,
        grid=(14, 14),
        prefix=1,
        blocks=blocks,
        feature_blocks=features,
        width=model.embed_dim,
    )
    pixels = torch.randn(BATCH, 3, 224, 224)
    image, label = np.zeros((BATCH, 2), np.uint64), np.zeros(BATCH)
    with tempfile.TemporaryDirectory() as folder, analysis.Writer(Path(folder) / "record", header) as writer:

        def plain() -> None:
            with torch.inference_mode():
                model(pixels)

        def recorded() -> None:
            found = analysis.observe(model, pixels, blocks, features)
            writer.append(image, label, *found)

        timings = interleave({"plain": plain, "recorded": recorded}, rounds=ROUNDS)
    return timings["recorded"].over(timings["plain"]), header.row.itemsize


def pairs() -> tuple[float, float]:
    """Seconds from patterns in memory to the mean IoU of all pairs, and the process's peak memory in GB."""
    rng = np.random.default_rng(0)
    seconds, packed = 0.0, []
    for _ in range(SETTINGS):
        pattern = np.where(rng.random((IMAGES, PATCHES)) < 0.5, 1, -1).astype(np.int16)
        start = time.perf_counter()
        packed.append(analysis.pack(analysis.kept(pattern)))
        seconds += time.perf_counter() - start
    start = time.perf_counter()
    analysis.pairwise_iou(np.stack(packed))
    seconds += time.perf_counter() - start
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    torch.set_num_threads(1)
    seconds, memory = pairs()
    print(f"IoU of all pairs of {SETTINGS} settings x {IMAGES} images: {seconds:.2f} s, {memory:.2f} GB")
    for name in MODELS:
        for method in METHODS:
            ratio, size = recording(name, method)
            print(
                f"recording {name}, {method}: {100 * (ratio - 1):+.2f} %, 50,000 images: {size * 50_000 / 1e9:.2f} GB"
            )


if __name__ == "__main__":
    main()
