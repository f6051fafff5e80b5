"""`python -m tests.cluster.engine`: build, up, down."""

import argparse
import sys
from pathlib import Path

from tests.cluster.engine.outside import default_state, down
from tests.cluster.engine.run import build_all, up
from tests.cluster.lab.outside import NoLab
from tests.cluster.lab.toolchain import NoParts


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.engine", description="A Docker engine with kind.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="build what is missing, the node image among it")
    for name, what in {
        "up": "start an engine and print what docker and kind have to be told",
        "down": "end an engine with all its containers, without a trace",
    }.items():
        command = commands.add_parser(name, help=what)
        command.add_argument("--state", type=Path, default=default_state(), help="the engine's folder (%(default)s)")
    chosen = parser.parse_args()
    try:
        match chosen.command:
            case "build":
                print(build_all(say)[1].name)
            case "up":
                engine = up(chosen.state, say)
                for name, value in {
                    "DOCKER_HOST": engine.docker_host,
                    "DOCKER": engine.docker,
                    "KIND": engine.kind,
                    "NODE_IMAGE": engine.node_image,
                    "PID": engine.pid,
                }.items():
                    print(f"{name}={value}")
            case "down":
                down(chosen.state)
    except (NoLab, NoParts) as why:
        raise SystemExit(f"engine: {why}") from why


if __name__ == "__main__":
    main()
