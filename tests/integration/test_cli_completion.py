"""Completion in a real bash: `--show-completion`, `--install-completion`, and what it then offers."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BLASTDOOR = Path(sys.executable).with_name("blastdoor")


def bash(script: str, home: Path) -> str:
    """The script's output, with a home directory of its own. The shell is the program's parent, as it looks for."""
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    environment = {"HOME": str(home), "PATH": f"{BLASTDOOR.parent}:/usr/bin:/bin", "LANG": "C.UTF-8"}
    ran = subprocess.run(
        ["bash", "--norc", "-c", f"{script}\n:"], env=environment, cwd=home, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def offered(words: str, home: Path) -> list[str]:
    """What bash would offer for the last of these words, once the completion is installed."""
    place = len(words.split(" ")) - 1
    last = words.split(" ")
    array = " ".join(f"'{word}'" for word in last)
    return bash(
        "source .bash_completions/blastdoor.sh\n"
        f"COMP_WORDS=({array}); COMP_CWORD={place}; _blastdoor_completion blastdoor\n"
        'printf "%s\\n" "${COMPREPLY[@]}"',
        home,
    ).split()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    bash("blastdoor --install-completion", tmp_path)
    return tmp_path


def test_the_installed_completion_is_the_one_that_is_shown_and_a_new_shell_reads_it(home: Path) -> None:
    shown = bash("blastdoor --show-completion", home)
    assert shown.strip() == (home / ".bash_completions" / "blastdoor.sh").read_text().strip()
    assert "complete -o default -F _blastdoor_completion blastdoor" in shown
    assert ".bash_completions/blastdoor.sh" in (home / ".bashrc").read_text()
    assert "_blastdoor_completion" in bash("source ./.bashrc; complete -p blastdoor", home)


def test_commands_their_options_and_the_words_they_take_are_offered(home: Path) -> None:
    assert {"run", "runs", "runtimes"} <= set(offered("blastdoor ru", home))
    assert set(offered("blastdoor webhooks r", home)) == {"remove", "rotate", "replay"}
    assert offered("blastdoor runs --outcome l", home) == ["limit_exceeded"]
    assert {"--json", "--junit"} <= set(offered("blastdoor run --j", home))
    assert offered("blastdoor nonsense x", home) == []
