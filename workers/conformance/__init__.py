"""The corpus of attacks as product code: the tests and `blastdoor doctor --attack` play the very same cases.

`programs.py` is what runs in a boundary, `corpus.py` says what must be true of it as seen from the host (in the words
of `cases.py`), `stage.py` plants what must not leak, `host.py` looks at this machine, `run.py` plays, `report.py`
tells.
"""
