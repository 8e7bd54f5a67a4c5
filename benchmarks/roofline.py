"""Where each GPU kernel stands below its roof: `python -m benchmarks.roofline RESULT.json [-o PICTURE.png]`.

Seconds are those of the result; bytes and FLOPs those of benchmarks/static, counted from the code. Left, FLOP/s over
FLOPs a byte, below the copy bandwidth that was measured and the peak of dense bfloat16 products that the maker states;
right, bytes/s of every call, as a share of that bandwidth. Calls whose inputs fit a cache are left out.
"""

import argparse
import json
from pathlib import Path

from .static import tables

# Dense bfloat16 FLOP/s, from the data sheets.
PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}


def points(result: dict) -> list[dict]:
    """Each measured call with what the tables count for it: name, intensity, flops and bytes per second."""
    steps = {(backend, *row.name): row for backend in tables.BACKENDS for row in tables.read(backend)[1]}
    found = []
    for timed in result["kernels"]:
        row = steps.get((timed["backend"], timed["op"], timed["form"], timed["shape"]))
        if row is None or timed["warm"]:
            continue
        name = " ".join(filter(None, (timed["backend"], timed["op"], timed["form"], timed["shape"])))
        per_second = {"flops": row.flops / timed["seconds"], "bytes": row.moved / timed["seconds"]}
        found.append({"name": name, "backend": timed["backend"], "intensity": row.flops / row.moved, **per_second})
    return found


def draw(result: dict, path: Path) -> int:
    """Writes the picture; the number of calls in it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = sorted(points(result), key=lambda point: point["name"])
    name, bandwidth = result["gpus"][0]["name"], result["raw"]["bytes/s"]
    peak = next((flops for gpu, flops in PEAK.items() if gpu in name), None)
    colours = dict(zip(tables.BACKENDS, ("tab:blue", "tab:orange"), strict=True))
    figure, (roof, bars) = plt.subplots(1, 2, figsize=(16, 3 + 0.16 * len(found)), width_ratios=(3, 2))

    intensities = [0.1, 1e4]
    roof.plot(intensities, [min(bandwidth * i, peak or bandwidth * i) for i in intensities], alpha=0)  # the limits
    knee = peak / bandwidth if peak else intensities[1]
    roof.plot([intensities[0], knee], [bandwidth * intensities[0], bandwidth * knee], "k", label="copy bandwidth")
    if peak:
        roof.plot([knee, intensities[1]], [peak, peak], "k--", label="bfloat16 products, as stated")
    for backend, colour in colours.items():
        own = [point for point in found if point["backend"] == backend and point["flops"]]
        roof.scatter([p["intensity"] for p in own], [p["flops"] for p in own], s=14, color=colour, label=backend)
    roof.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="FLOP/s")
    roof.legend()
    bars.barh(
        [point["name"] for point in found],
        [100 * point["bytes"] / bandwidth for point in found],
        color=[colours[point["backend"]] for point in found],
    )
    bars.invert_yaxis()
    bars.tick_params(axis="y", labelsize=6)
    bars.set_xlabel(f"% of the copy bandwidth, {bandwidth / 1e12:.2f} TB/s")
    figure.suptitle(f"{name}, commit {result['commit']}, {result['date']}")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return len(found)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("-o", "--output", type=Path, help="default: RESULT.png")
    args = parser.parse_args(argv)
    result = json.loads(args.result.read_text())
    if "bytes/s" not in result.get("raw", {}):
        parser.error(f"{args.result} has no kernels: measure them with --only kernels")
    path = args.output or args.result.with_suffix(".png")
    print(f"{draw(result, path)} calls in {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
