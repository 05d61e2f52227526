"""quire run, as a process: text on stdout, one line on stderr and an exit code for what is wrong."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest


def quire(*args: str, stdin: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "quire.cli.main", *args]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, env={**os.environ, **environ}, timeout=120)


def test_a_prompt_is_completed() -> None:
    done = quire("run", "-p", "def fibonacci(n):", "--max-tokens", "12")
    assert done.returncode == 0
    assert done.stdout.startswith("def fibonacci(n):")
    assert len(done.stdout) > len("def fibonacci(n):\n")
    assert done.stderr == ""
    assert quire("run", "-p", "def fibonacci(n):", "--max-tokens", "12").stdout == done.stdout


def test_prompts_are_read_line_by_line_and_a_bad_one_does_not_end_it() -> None:
    done = quire("run", "--max-tokens", "3", stdin="import os\n\n" + "a b " * 3000 + "\nclass A:\n")
    assert done.returncode == 1
    assert done.stdout.startswith("import os")
    assert "\nclass A:" in done.stdout
    assert done.stderr.startswith("quire: the prompt has ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "environ", "code", "says"),
    [
        (["run", "--blok-size", "3"], {}, 2, "unrecognized arguments: --blok-size (did you mean --block-size?); see quire run --help"),
        (["run", "--block-siz", "16"], {}, 2, "unrecognized arguments: --block-siz"),
        (["rnu"], {}, 2, "invalid choice: 'rnu'"),
        ([], {}, 2, "the following arguments are required: COMMAND; see quire --help"),
        (["serve", "--prot=9"], {}, 2, "did you mean --port?"),
        (["serve", "--nope"], {}, 2, "unrecognized arguments: --nope; see quire serve --help"),
        (["serve", "--model", "x"], {}, 2, "unrecognized arguments: --model (the model is the argument without a name)"),
        (["serve", "-c", "2048"], {}, 2, "(it is --max-model-len here)"),
        (["serve", "--served-model-name", ","], {}, 2, "--served-model-name ',' holds no name"),
        (["run", "-p", "x", "--temperature", "warm"], {}, 2, "argument --temperature: invalid float value: 'warm'"),
        (["run", "-p", "x", "--threads", "999"], {}, 2, "--threads must be from 1 to 256, got 999"),
        (["bench", "throughput", "--requests", "1", "--json", "no/such/folder/x.json"], {}, 2, "can't write no/such/folder/x.json"),
        (["run", "-p", ""], {}, 1, "the prompt is empty"),
        (["run", "no/such/folder", "-p", "x"], {}, 1, "no/such/folder"),
        (["run", "-p", "x", "--temperature", "nan"], {}, 1, "temperature must be from 0 to 100, got nan"),
        (["run", "-p", "x", "--max-tokens", "-1"], {}, 1, "max_tokens must be from 0"),
        (["run", "-p", "x", "--max-tokens", "9999"], {}, 1, "lower max_tokens to at most 2,046"),
        (["run", "-p", "x", "--kv-memory", "10KiB"], {}, 1, "raise --kv-memory to at least 6MiB"),
        (["run", "-p", "x", "--kv-memory", "lots"], {}, 2, "'lots' is not a size"),
        (["run", "-p", "x", "--threads", "many"], {}, 2, "--threads must be an integer, got 'many'"),
        (["run", "-p", "x"], {"QUIRE_ISA": "mmx"}, 2, "instruction set 'mmx' is not available"),
        (["run", "-p", "x"], {"QUIRE_BLOCK_SIZE": "5"}, 2, "choose from: 4, 8, 16"),
        (["run", "-p", "x", "--config", "absent.toml"], {}, 2, "can't read the configuration file absent.toml"),
    ],
)
def test_wrong_use_gets_one_line_and_an_exit_code(args: list[str], environ: dict[str, str], code: int, says: str) -> None:
    done = quire(*args, **environ)
    assert done.returncode == code
    assert says in done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("quire: ")
    assert done.stderr.count("\n") == 1


def reading() -> subprocess.Popen[str]:
    """quire run that has answered its first prompt, and waits for another."""
    command = [sys.executable, "-P", "-m", "quire.cli.main", "run", "--max-tokens", "4"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("import os\n")
    process.stdin.flush()
    assert process.stdout.readline().startswith("import os")
    return process


def test_ctrl_c_leaves_no_traceback() -> None:
    with reading() as process:
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=120)
    assert (process.returncode, stderr) == (130, "")


@pytest.mark.parametrize(("key", "code"), [(b"\x04", 0), (b"\x03", 130)], ids=["ctrl-d", "ctrl-c"])
def test_a_terminal_gets_a_prompt_and_is_left_as_it_was(key: bytes, code: int) -> None:
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    command = [sys.executable, "-P", "-m", "quire.cli.main", "run", "--max-tokens", "2"]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
                               preexec_fn=lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0))  # fmt: skip
    shown = b""

    def read_until(text: bytes) -> None:
        nonlocal shown
        while text not in shown:
            shown += os.read(master, 1000)

    read_until(b"> ")
    os.write(master, b"import os\r")
    read_until(b"import os")
    shown = shown.replace(b"> ", b"", 1)
    read_until(b"> ")
    for _ in range(120):
        # Again and again: a signal that arrives just before readline's select() is seen with the next key (CPython).
        os.write(master, key)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
            break
    assert process.poll() == code
    assert termios.tcgetattr(slave) == before
    os.close(slave)
    os.close(master)


def test_a_reader_that_goes_away_leaves_no_traceback() -> None:
    with reading() as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.write("import sys\n")
        process.stdin.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_bytes_that_are_no_text_are_a_bad_prompt() -> None:
    command = [sys.executable, "-P", "-m", "quire.cli.main", "run", "--max-tokens", "2"]
    environ = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, input=b"x = \xff\nimport os\n", capture_output=True, env=environ, timeout=120)
    assert done.returncode == 1
    assert done.stdout.startswith(b"import os")
    assert done.stderr.startswith(b"quire: the prompt is not valid Unicode")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_are_empty(closed: str) -> None:
    command = f"{sys.executable} -P -m quire.cli.main run --max-tokens 2 {closed}"
    done = subprocess.run(command, shell=True, input="import os\n", capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("import os") is ("<" not in closed and ">&-" not in closed.split())


def test_a_terminal_that_is_not_utf_8_shows_what_it_can() -> None:
    done = quire("run", "-p", "é", "--max-tokens", "1", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("?")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_a_full_disk_is_reported() -> None:
    command = [sys.executable, "-P", "-m", "quire.cli.main", "run", "-p", "x", "--max-tokens", "1"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (1, "quire: No space left on device\n")


def test_options_come_from_a_file_too(tmp_path: Path) -> None:
    path = tmp_path / "quire.toml"
    path.write_text("kv-memory = '1KiB'\n")
    assert "--kv-memory 1KiB" in quire("run", "-p", "x", "--config", str(path)).stderr
    assert quire("run", "-p", "x", "--config", str(path), "--kv-memory", "8MiB", "--max-tokens", "1").returncode == 0
