"""The static tables of the GPU kernels: `python -m benchmarks.static` checks them, with --update it writes them.

cuda_launches.csv and triton_launches.csv hold the launches of every call: grid, registers, spills, shared memory,
occupancy; *_steps.csv what a call launches and moves, beside the bytes that it cannot do without; methods.csv
what a method adds to a block.
"""

import argparse
import sys

from . import machine_code, methods, rows, tables


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write what is found")
    args = parser.parse_args()
    if reason := machine_code.missing():
        parser.error(reason)
    faults = []
    for backend in tables.BACKENDS:
        found = tables.compute(backend)
        if args.update:
            tables.write(backend, found)
        faults += tables.faults(found) + tables.differences(found, tables.read(backend))
    added = methods.compute()
    if args.update:
        methods.write(added)
    faults += rows.differences(added, methods.read())
    print("\n".join(faults) or "nothing got worse")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
