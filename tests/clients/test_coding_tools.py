"""Claude Code, Codex and opencode, unchanged, with the settings that ``quire launch --write`` makes: each has the model write a file, read
it, and say so. The model is one that says what it is told to, so that there is something to run. Where a tool is not on the PATH
(npm install -g @anthropic-ai/claude-code @openai/codex opencode-ai), its test is skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clients.chain_model import write_chain_model
from server.harness import DEADLINE_S, Process

SAID = "The file says what I wrote."
CODEX = ("exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", "-c", "check_for_update_on_startup=false")
OFFLINE = {
    # Nothing but the server is reached: all else would go to a port at which nobody listens.
    "HTTP_PROXY": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1,localhost",
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1", "OPENCODE_DISABLE_AUTOUPDATE": "1",
    "OPENCODE_DISABLE_MODELS_FETCH": "1",
}  # fmt: skip


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


READ = "cat note.txt"
SCRIPTS = {
    "Write": ["I write." + call("Write", file_path="note.txt", content="from the model"), call("Bash", command=READ)],
    "exec_command": ["I write." + call("exec_command", cmd="echo from the model > note.txt"), call("exec_command", cmd=READ)],
    "write": ["I write." + call("write", filePath="note.txt", content="from the model"), call("bash", command=READ, description="x")],
}  # fmt: skip
"""A tool by which a client is known → what is said until it has sent so many results."""

TEMPLATE = """{%- for tool in tools or [] %}{{ tool | tojson }}{% endfor %}
Write <tool_call>{"name": ..., "arguments": ...}</tool_call>.
{%- for message in messages %}[{{ message.role }}]
{%- if message.role == 'system' and not loop.first %}{{ raise_exception('System message must be at the beginning.') }}{% endif %}
{{- message.content or '' }}{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}
{%- endfor %}
{%- set results = messages | selectattr('role', 'equalto', 'tool') | list %}
{%- set client = (tools or []) | map(attribute='function.name') | select('in', ['Write', 'exec_command', 'write']) | first | default('') %}
{%- if not client %}<|say title|>{% elif results | length < 2 %}{{ '<|say ' ~ client ~ (results | length) ~ '|>' }}
{%- elif 'from the model' in results[1].content %}<|say done|>{% else %}<|say wrong|>{% endif %}"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    texts = {"title": "A short title", "done": SAID, "wrong": "The file says something else."}
    texts |= {f"{client}{number}": text for client, said in SCRIPTS.items() for number, text in enumerate(said)}
    folder = write_chain_model(tmp_path_factory.mktemp("model") / "chain", texts, TEMPLATE, context=65_536)
    process = Process(str(folder), "--kv-memory", "256MiB")
    yield process.url
    process.stop()


@pytest.mark.parametrize(("tool", "arguments"), [
    ("claude", ("-p", "--allowedTools", "Write,Bash", "--", "go on")),
    ("codex", (*CODEX, "-c", "model_provider=quire", "-c", "model_context_window=65536", "-m", "chain", "go on")),
    ("opencode", ("run", "-m", "quire/chain", "go on")),
])  # fmt: skip
def test_the_whole_round(url: str, tmp_path: Path, tool: str, arguments: tuple[str, ...]) -> None:
    program = shutil.which(tool)
    if program is None:
        pytest.skip(f"{tool} is not on the PATH")
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "PYTHONPATH") if name in os.environ}
    environment = {**kept, **OFFLINE, "HOME": str(home)}

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=work, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE_S
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-P", "-m", "quire.cli.main", "launch", tool, "--url", url, "--write")
    assert SAID in run(program, *arguments)
    assert (work / "note.txt").read_text().strip() == "from the model"
