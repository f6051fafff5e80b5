"""`python -m tests.cluster.lab`: build, up, load, down."""

import argparse
import sys
from pathlib import Path

from tests.cluster.lab.outside import Lab, NoLab, default_state, down, up
from tests.cluster.lab.parts import NoParts, build


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.lab", description="A one-node Kubernetes for tests.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="build the parts that are missing; GOMAXPROCS=1 leaves the other cores alone")
    for name, what in {
        "up": "start a lab and print the path of its kubeconfig",
        "load": "make the images of an OCI archive known to the node",
        "down": "end a lab, without a trace",
    }.items():
        command = commands.add_parser(name, help=what)
        command.add_argument("--state", type=Path, default=default_state(), help="the lab's folder (%(default)s)")
        if name == "load":
            command.add_argument("archive", type=Path)
    chosen = parser.parse_args()
    try:
        match chosen.command:
            case "build":
                build(say)
            case "up":
                print(up(chosen.state, say).kubeconfig)
            case "load":
                Lab(chosen.state.resolve()).load(chosen.archive.resolve())
            case "down":
                down(chosen.state)
    except (NoLab, NoParts) as why:
        raise SystemExit(f"lab: {why}") from why


if __name__ == "__main__":
    main()
