"""`python -m tests.fuzz`: damaged archives by the hundred thousand, each put to the oracle of tests/mutants.py.

`--engine random` damages the sound archives there; `--engine atheris` (when it is installed: `pip install atheris`)
starts from the same ones and is guided by the coverage of service.intake. A finding is written to a file, whose path
is printed, and the exit code is 1.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.mutants import TARS, WRAP, ZIPS, Wrapping, damaged, judge, with_checksums


class Bench:
    """Judges archives in one scratch directory and keeps count."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.counts: Counter[str] = Counter()
        self.started = time.monotonic()

    def put(self, data: bytes) -> None:
        self.counts["runs"] += 1
        try:
            self.counts["accepted" if judge(data, self.scratch) else "refused"] += 1
        except BaseException:
            with tempfile.NamedTemporaryFile(prefix="finding-", delete=False) as file:
                file.write(data)
            print(f"FINDING: {file.name}", file=sys.stderr)
            raise

    def report(self, engine: str) -> None:
        seconds = time.monotonic() - self.started
        runs, accepted = self.counts["runs"], self.counts["accepted"]
        rate = runs / max(seconds, 0.001)
        print(f"fuzz ({engine}): {runs} archives in {seconds:.0f} s ({rate:.0f}/s), {accepted} accepted, no finding")


def fuzz_randomly(bench: Bench, *, runs: int, seconds: float, seed: int) -> None:
    dice = random.Random(seed)
    until = time.monotonic() + seconds
    while bench.counts["runs"] < runs and time.monotonic() < until:
        edits = [
            (dice.randrange(7), dice.randrange(2**14), dice.randrange(2**14), dice.randbytes(dice.randrange(24)))
            for _ in range(dice.choice((1, 1, 1, 2, 2, 3, 5)))
        ]
        wrapping = dice.choice(list(Wrapping))
        match dice.randrange(4):
            case 0:
                bench.put(damaged(dice.choice(ZIPS), edits))
            case 1:
                bench.put(damaged(WRAP[wrapping](dice.choice(TARS)), edits))
            case 2:
                bench.put(WRAP[wrapping](damaged(dice.choice(TARS), edits)))
            case _:
                bench.put(WRAP[wrapping](with_checksums(damaged(dice.choice(TARS), edits))))


def fuzz_with_atheris(bench: Bench, *, runs: int, seconds: float, seed: int) -> None:
    import atheris  # type: ignore[import-not-found]

    import service.intake.archive
    import service.intake.members
    import service.intake.tape
    import service.intake.tar
    import service.intake.zip

    intake = service.intake
    for module in (intake.archive, intake.members, intake.tape, intake.tar, intake.zip):
        for name, item in vars(module).items():
            if callable(item) and getattr(item, "__module__", None) == module.__name__ and not isinstance(item, type):
                setattr(module, name, atheris.instrument_func(item))
            elif isinstance(item, type) and item.__module__ == module.__name__ and name != "ArchiveCaps":
                for method, function in list(vars(item).items()):
                    if type(function).__name__ == "function" and not method.startswith("__"):
                        setattr(item, method, atheris.instrument_func(function))

    def one(data: bytes) -> None:
        """The first byte says how the rest is wrapped; a fuzzer cannot guess checksums or compress."""
        how, rest = (data[0], data[1:]) if data else (0, b"")
        wrapping = list(Wrapping)[how % 3]
        bench.put(WRAP[wrapping](with_checksums(rest) if how & 0x40 else rest))
        if bench.counts["runs"] % 20_000 == 0:
            bench.report("atheris, so far")

    with tempfile.TemporaryDirectory(prefix="corpus-") as corpus:
        for number, data in enumerate((*TARS, *ZIPS, *(WRAP[Wrapping.GZIP](t) for t in TARS))):
            (Path(corpus) / str(number)).write_bytes(b"@" + data)
        options = [f"-runs={runs}", f"-max_total_time={int(seconds)}", f"-seed={seed}", "-max_len=8192"]
        atheris.Setup([sys.argv[0], corpus, *options], one)
        atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--runs", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--engine", choices=("random", "atheris"), default="random")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    engine = fuzz_with_atheris if options.engine == "atheris" else fuzz_randomly
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        bench = Bench(Path(name))
        print(f"seed {options.seed}", flush=True)
        engine(bench, runs=options.runs, seconds=options.seconds, seed=options.seed)
        bench.report(options.engine)


if __name__ == "__main__":
    main()
