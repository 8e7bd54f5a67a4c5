"""Show versions, devices, what runs each op, and why the other backends do not run."""

import argparse
import json

from .. import info as backend_info
from . import machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    ops = backend_info()
    reasons = ops.pop("reasons")
    report = {
        "versions": machine.versions(),
        "cpu": machine.cpu(),
        "gpus": machine.gpus(),
        "ops": ops,
        "not_running": reasons,
    }
    print(json.dumps(report, indent=2) if args.json else _text(report))
    return 0


def _text(report: dict) -> str:
    cpu = report["cpu"]
    lines = [f"{name:<16}{version or 'not installed'}" for name, version in report["versions"].items()]
    lines += ["", f"{'cpu':<16}{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads, kernels for {cpu['isa']}"]
    lines += [f"{'gpu':<16}{gpu['name']} (compute capability {gpu['capability']})" for gpu in report["gpus"]]
    lines += ["", f"{'op':<16}{'on cpu':<20}on cuda"]
    lines += [f"{op:<16}{runs['cpu']:<20}{runs['cuda']}" for op, runs in report["ops"].items()]
    if report["not_running"]:
        lines += ["", "not running"]
        lines += [f"{backend:<16}{reason}" for backend, reason in report["not_running"].items()]
    return "\n".join(lines)
