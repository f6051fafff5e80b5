"""A run while it goes on, as a person watches it: phases on stderr, steps and what they print on stdout.

What a guest prints stands behind a mark at the beginning of every line on the screen (`|`, and `!` for its stderr), so
that no line of it can pass for one of ours. Each character is judged by itself: an escape sequence that comes in pieces
is as dead as one that comes whole.
"""

from types import TracebackType
from typing import Self

from rich.cells import get_character_cell_size
from rich.console import Console
from rich.status import Status
from rich.text import Text

from service.cli.printing import outcome_text, print_line, quoted, visible
from service.client import ClientError, Event, OutputEvent, PhaseEvent, ProgressEvent

PHASES = {
    "queued": "waiting for a worker",
    "provisioning": "building the wall",
    "running": "playing the scenario",
    "collecting": "collecting what it left",
    "finished": "finished",
}
_STAGES = {"boundary": PHASES["provisioning"], "collect": PHASES["collecting"]}
_MARKS = {"stdout": "  | ", "stderr": "  ! "}
_STYLES = {"stdout": "", "stderr": "yellow"}
_TAB = 4
_NARROWEST = 20


class GuestLines:
    """Text in pieces, as marked lines no wider than the terminal. `out` is the console that it goes to."""

    def __init__(self, out: Console) -> None:
        self._out = out
        self._stream: str | None = None
        self._column = 0

    def write(self, stream: str, text: str) -> None:
        """A line that the other stream left open is ended first."""
        if self._stream not in (None, stream):
            self.end_line()
        mark = _MARKS.get(stream, _MARKS["stdout"])
        width = max(self._out.width - len(mark), _NARROWEST)
        shown: list[str] = []
        for character in visible(text):
            if character == "\n":
                shown.append("\n" if self._stream else mark.rstrip() + "\n")
                self._stream, self._column = None, 0
                continue
            cells = _TAB - self._column % _TAB if character == "\t" else get_character_cell_size(character)
            if self._stream and self._column + cells > width:
                shown.append("\n")
                self._stream, self._column = None, 0
            if self._stream is None:
                shown.append(mark)
                self._stream = stream
            shown.append(" " * cells if character == "\t" else character)
            self._column += cells
        self._out.print(Text("".join(shown), style=_STYLES.get(stream, "")), end="", soft_wrap=True)

    def end_line(self) -> None:
        if self._stream is not None:
            self._out.print()
        self._stream, self._column = None, 0


class Live:
    """Use it in a `with` block; it leaves the terminal as it was."""

    def __init__(self, run_id: str, *, out: Console, errors: Console) -> None:
        self._run_id, self._out, self._errors = run_id, out, errors
        self._guest = GuestLines(out)
        self._status: Status | None = None
        self._said = ""
        self._header: tuple[int, bool] | None = None  # the step that was headed last; whether its line is still open
        self.omitted = False
        """Whether not all that was printed was shown."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_lines()

    def show(self, event: Event) -> None:
        self._rest()
        if isinstance(event, PhaseEvent):
            self.phase(event.phase, event.queue_position, event.message)
        elif isinstance(event, ProgressEvent):
            self._progress(event)
        elif isinstance(event, OutputEvent):
            self._output(event)

    def phase(self, phase: str, queue_position: int | None = None, message: str | None = None) -> None:
        """`message`: why it waits."""
        self._end_lines()
        place = f", {queue_position} in the queue" if phase == "queued" and queue_position is not None else ""
        why = f": {message}" if phase == "queued" and message else ""
        words = f"{self._run_id}: {PHASES.get(phase, phase)}{place}{why}"
        self._say(words, waits=phase not in ("running", "finished"))

    def lost(self, error: ClientError) -> None:
        """The connection; it is being made again."""
        self._end_lines()
        self._say(f"{error}; trying again", waits=True)

    def _progress(self, event: ProgressEvent) -> None:
        if event.stage == "step" and event.step is not None:
            if event.state == "started":
                self._head(event.step, event.steps, event.name)
            else:
                self._end_step(event)
        elif event.text and event.state == "started":
            self._end_lines()
            self._say(f"{self._run_id}: {_STAGES.get(event.stage, event.stage)}: {event.text}", waits=True)

    def _head(self, step: int, steps: int | None = None, name: str | None = None) -> None:
        self._end_lines()
        of = f"/{steps}" if steps is not None else ""
        header = Text.assemble((f"step {step}{of}", "bold"), quoted(f"  {name}" if name else ""))
        header.truncate(max(self._out.width - 18, _NARROWEST), overflow="ellipsis")
        self._out.print(header, end="", soft_wrap=True)
        self._header = (step, True)

    def _end_step(self, event: ProgressEvent) -> None:
        assert event.step is not None
        if self._header is None or self._header[0] != event.step:
            self._head(event.step, event.steps, event.name)
        self._guest.end_line()
        text = quoted("  " + event.text.removeprefix(f"step {event.step}: ")) if event.text else ""
        self._out.print(Text.assemble("  ", outcome_text(event.state), text), soft_wrap=True)
        self._header = (event.step, False)

    def _output(self, event: OutputEvent) -> None:
        if self._header is None or self._header[0] != event.step:
            self._head(event.step)
        if self._header is not None and self._header[1]:
            self._out.print()
            self._header = (event.step, False)
        if event.text:
            self._guest.write(event.stream, event.text)
        if event.omitted:
            self.omitted = True
            self._guest.end_line()
            print_line(self._out, f"  ({event.stream}: more than is shown live)")

    def _say(self, words: str, *, waits: bool) -> None:
        """On a terminal a spinner, while something is waited for; elsewhere a line for whatever is new."""
        if self._errors.is_terminal:
            self._rest()
            if waits:
                self._status = self._errors.status(quoted(words))
                self._status.start()
        elif words != self._said:
            self._said = words
            print_line(self._errors, visible(words, one_line=True))

    def _rest(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _end_lines(self) -> None:
        self._rest()
        self._guest.end_line()
        if self._header is not None and self._header[1]:
            self._out.print()
            self._header = (self._header[0], False)
