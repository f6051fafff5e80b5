"""An engine with the node image, all of it built where it has to be."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cluster.engine import seed
from tests.cluster.engine.outside import Engine, answers, engine_of, start
from tests.cluster.engine.parts import build
from tests.cluster.engine.place import Node
from tests.cluster.lab.outside import Lab
from tests.cluster.lab.parts import Parts, Say


@contextmanager
def running_engine(state: Path, say: Say) -> Iterator[Engine]:
    """An engine with the node image, for as long as the block lasts; it ends with this process as well."""
    engine = up(state, say, with_us=True)
    try:
        yield engine
    finally:
        engine.end()


def build_all(say: Say) -> tuple[Parts, Node]:
    """-> all that engines are made of, what was missing built first."""
    parts = build(say)
    return parts, seed.node(parts, say)


def up(state: Path, say: Say, *, with_us: bool = False) -> Engine:
    """-> an engine with the node image; the one that already runs there, if one does.

    With `with_us` it ends when this process does.

    Raises NoLab, or NoParts when a part of it cannot be had here.
    """
    state = state.resolve()
    parts, node = build_all(say)
    lab = Lab(state)
    if lab.holder() and answers(engine := engine_of(lab, parts, node.name)):
        return engine
    return start(state, parts, node, with_us=with_us)
