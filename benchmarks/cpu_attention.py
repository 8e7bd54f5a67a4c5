"""Attention on the CPU against torch's (C4, C5), with one thread.

    python -m benchmarks.cpu_attention avx2 --rounds 40     one instruction set, as JSON

In a process of its own so that torch can be held to the same instruction set: MKL_ENABLE_INSTRUCTIONS=AVX2 and
ATEN_CPU_CAPABILITY=avx2 make both run AVX2 code, as they do on a processor that has no more.
"""

import argparse
import json
import os
import subprocess
import sys

import torch
import torch.nn.functional as F

import tokred_kernels as tokred
from tokred_kernels.cli.timing import interleave, keep_freed_memory

SHAPES = {"B=1": (1, 6, 197, 64), "B=8": (8, 6, 197, 64), "N=577": (1, 6, 577, 64)}  # DeiT-S


def measure(isa: str, rounds: int, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, float]]:
    """For each shape: how much faster attention with sizes and scores is than SDPA with a mask, and without either
    than SDPA; by how many per cent the scores slow it down."""
    figures = {"masked": {}, "plain": {}, "cls": {}, "mean": {}}
    with tokred.use_backend("cpu", isa=isa), torch.inference_mode():
        for case, (B, H, N, D) in SHAPES.items():
            q, k, v = torch.randn(B, N, 3, H, D).to(dtype).permute(2, 0, 3, 1, 4).unbind(0)
            size = torch.randint(1, 5, (B, N)).float()
            mask = size.log().to(dtype)[:, None, None]
            calls = {
                "sdpa": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v),
                "sdpa_mask": lambda q=q, k=k, v=v, m=mask: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
                "plain": lambda q=q, k=k, v=v: tokred.attention(q, k, v),
                "none": lambda q=q, k=k, v=v, s=size: tokred.attention(q, k, v, s),
                "cls": lambda q=q, k=k, v=v, s=size: tokred.attention(q, k, v, s, scores="cls"),
                "mean": lambda q=q, k=k, v=v, s=size: tokred.attention(q, k, v, s, scores="mean"),
            }
            tolerance = 16 * torch.finfo(dtype).eps  # of two roundings of N terms
            torch.testing.assert_close(calls["cls"]()[0], calls["sdpa_mask"](), rtol=tolerance, atol=tolerance)
            t = interleave(calls, rounds=rounds)
            figures["masked"][case] = t["sdpa_mask"].over(t["cls"])
            figures["plain"][case] = t["sdpa"].over(t["plain"])
            for scores in ("cls", "mean"):
                figures[scores][case] = 100 * (t[scores].over(t["none"]) - 1)
    return figures


def measure_apart(isa: str, rounds: int, dtype: str = "float32") -> dict[str, dict[str, float]] | None:
    """`measure` in a process whose torch uses the same instruction set; None where this machine lacks it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if isa == "avx2":
        environment |= {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    command = [sys.executable, "-m", "benchmarks.cpu_attention", isa, "--rounds", str(rounds), "--dtype", dtype]
    result = subprocess.run(command, env=environment, text=True, capture_output=True)
    if result.returncode == 3:
        return None
    if result.returncode:
        raise RuntimeError(f"{' '.join(command[1:])}: {result.stderr.strip()}")
    return json.loads(result.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_attention", description=__doc__.splitlines()[0])
    parser.add_argument("isa", choices=("amx", "avx512", "avx2", "portable"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()
    try:
        figures = measure(args.isa, args.rounds, getattr(torch, args.dtype))
    except RuntimeError as error:
        if "cpu_isa" not in str(error):
            raise
        print(error, file=sys.stderr)
        return 3
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
