"""Writes README's tables from benchmarks/results/*.json: `python -m benchmarks.readme_table [--check]`."""

import argparse

from . import goals, results

README = results.ROOT / "README.md"
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"
NAMES = {
    "dense": "dense",
    "oracle": "oracle: tokens sliced, for free",
    "tome": "**ToMe, tokred**",
    "evit": "**EViT, tokred**",
    "plain_sdpa": "in PyTorch, SDPA",
    "plain_explicit": "in PyTorch, explicit attention",
}


def table(measured: list[dict]) -> str:
    """Markdown: for each result its provenance, models and goals."""
    parts = [part for result in measured for part in _parts(result) if part]
    if not results.gpu_figures(measured):
        parts.append("On a GPU: **not measured** (`make gpu` measures it).")
    return "\n\n".join(parts)


def insert(readme: str, markdown: str) -> str:
    """The README with the text between its two markers replaced.

    Raises:
        ValueError: not exactly one pair of markers.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"README needs one {BEGIN} followed by one {END}")
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n{markdown}\n{END}{rest.partition(END)[2]}"


def _parts(result: dict) -> tuple[str, ...]:
    models = _grid(result) if "parts" in result else _models(result)
    return _provenance(result), models, _methods(result), _goals(result)


def _provenance(result: dict) -> str:
    cpu, versions = result["cpu"], result["versions"]
    where = ", ".join(gpu["name"] for gpu in result["gpus"])
    where = where or f"{cpu['name']} ({cpu['isa']}), {cpu['threads']} thread{'s' * (cpu['threads'] != 1)}"
    used = ", ".join(f"{name} {versions[name]}" for name in ("torch", "timm", "triton") if versions.get(name))
    return f"{where}; {used}; commit {result['commit']}, {result['date']}:"


def _models(result: dict) -> str:
    rows = [
        "| model | images a call | variant | images/s | speed-up | RE_sdpa | RE_self |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in result.get("models", ()):
        options = ", ".join(f"{option}={value}" for option, value in case["options"].items())
        title = f"{case['model']}, {case['method']} {options}"
        for name, label in NAMES.items():
            row = case["variants"].get(name)
            if row is None:
                continue
            efficiency = ("" if row[key] is None else f"{row[key]:.3f}" for key in ("re_sdpa", "re_self"))
            # Three significant digits: a clean ratio still moves by 4 %.
            cells = (f"{row['images_per_second']:.3g}", f"{row['speedup']:.2f}x", *efficiency)
            rows.append(f"| {title} | {case['batch_size']} | {label} | {' | '.join(cells)} |")
    return "\n".join(rows) if len(rows) > 2 else ""


def _methods(result: dict) -> str:
    rows = [
        "| method, keep rate | GMACs an image | images/s | speed-up | RE_sdpa |",
        "|---|---|---|---|---|",
    ]
    for row in result.get("methods", ()):
        name = row["method"] + " \\*" * row["untrained"]
        speed = f"{row['images_per_second']:.3g} | {row['speedup']:.2f}x | {row['re_sdpa']:.3f}"
        rows.append(f"| {name}, {row['keep_rate']:g} | {row['macs'] / 1e9:.2f} | {speed} |")
    return "\n".join(rows) + "\n\n\\* has learned parts, random here" if len(rows) > 2 else ""


def _grid(result: dict) -> str:
    """The many rows of a GPU: a line a model and method, a column a batch size."""
    batches = sorted({case["batch_size"] for case in result["models"]})
    cells: dict[tuple, dict[int, str]] = {}
    for case in result["models"]:
        row = case["variants"][case["method"]]
        options = ", ".join(f"{option}={value}" for option, value in case["options"].items())
        line = cells.setdefault((case["model"], case["method"], options, f"{case['ideal_speedup']:.2f}x"), {})
        line[case["batch_size"]] = f"{row['images_per_second']:.3g}/s, {row['speedup']:.2f}x, RE {row['re_sdpa']:.3f}"
    titles = ["model", "method", "options", "speed-up of the MACs", *(f"B={B}" for B in batches)]
    rows = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for key, line in cells.items():
        rows.append(f"| {' | '.join((*key, *(line.get(B, 'not measured') for B in batches)))} |")
    return "\n".join(rows) if cells else ""


def _goals(result: dict) -> str:
    rows = ["| goal | measured | gate | target |", "|---|---|---|---|"]
    for goal in (*goals.CPU, *goals.GPU):
        figure = result["figures"].get(goal.id)
        if figure:
            measured = ", ".join(f"{case}: {value:.3g}{goal.unit}" for case, value in figure.items())
            sign = "≤" if goal.lower_is_better else "≥"
            bounds = " | ".join(f"{sign} {bound:g}{goal.unit}" for bound in (goal.gate, goal.target))
            rows.append(f"| {goal.id}: {goal.what} | {measured} | {bounds} |")
    return "\n".join(rows) if len(rows) > 2 else ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme_table", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if README is out of date")
    args = parser.parse_args(argv)
    before = README.read_text()
    after = insert(before, table(results.saved()))
    if not args.check:
        README.write_text(after)
    elif after != before:
        print("README's tables are out of date: python -m benchmarks.readme_table")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
