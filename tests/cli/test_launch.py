"""quire launch: what is printed and written for each tool, and what of the user's own settings survives it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quire.cli.settings_files import change_json, change_toml, write
from quire.errors import ConfigError
from quire.text.tokenizer import Tokenizer
from server.harness import DEADLINE_S, EMBEDDED, PacedBackend, Process, Server


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    tokenizer = Tokenizer.load(EMBEDDED)
    server = Server(tokenizer, PacedBackend(vocab_size=tokenizer.vocab_size))
    yield server
    server.stop()


def launch(home: Path, *arguments: str, **environ: str) -> tuple[int, str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("XDG_CONFIG_HOME", "CODEX_HOME", "CLAUDE_CONFIG_DIR")}
    done = subprocess.run([sys.executable, "-P", "-m", "quire.cli.main", "launch", *arguments], capture_output=True, text=True,
                          env={**kept, "HOME": str(home), **environ}, timeout=DEADLINE_S)  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def test_claude(server: Server, tmp_path: Path) -> None:
    code, out, err = launch(tmp_path, "claude", "--url", server.url + "/v1")
    assert code == 0
    assert "context of 512 tokens" in err, "too small to be of use, and said"
    shell = subprocess.run(["bash", "-c", out.removesuffix("claude\n") + "env"], capture_output=True, text=True, check=True).stdout
    variables = dict(line.partition("=")[::2] for line in shell.splitlines())
    assert variables["ANTHROPIC_BASE_URL"] == server.url, "claude adds /v1/messages itself"
    assert variables["ANTHROPIC_MODEL"] == variables["ANTHROPIC_DEFAULT_HAIKU_MODEL"] == "fake"
    assert variables["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] == "128"
    assert variables["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "512", (
        "without it Claude Code takes a model that it does not know for a large one"
    )
    assert list(tmp_path.iterdir()) == [], "nothing is written unless asked"
    settings = tmp_path / ".claude" / "settings.json"
    assert launch(tmp_path, "claude", "--url", server.url, "--write")[0] == 0
    assert settings.stat().st_mode & 0o777 == 0o600, "it holds a key"
    own = {"permissions": {"allow": ["Bash"]}, "env": {"ANTHROPIC_BASE_URL": "https://elsewhere", "MINE": "é"}}
    settings.write_text(json.dumps(own))
    code, _, err = launch(tmp_path, "claude", "--url", server.url, "--write")
    assert code == 2
    assert "has another env.ANTHROPIC_BASE_URL already" in err
    assert json.loads(settings.read_text()) == own
    code, out, _ = launch(tmp_path, "claude", "--url", server.url, "--write", "--overwrite", QUIRE_API_KEY="sk-secret")
    assert code == 0
    assert "settings.json.before-quire" in out
    made = json.loads(settings.read_text())
    assert made["env"].items() >= {"ANTHROPIC_BASE_URL": server.url, "ANTHROPIC_AUTH_TOKEN": "sk-secret", "MINE": "é"}.items()
    assert made["permissions"] == own["permissions"]
    assert json.loads((tmp_path / ".claude" / "settings.json.before-quire").read_text()) == own


def test_a_name_of_anthropics(tmp_path: Path) -> None:
    """Claude Code then goes by what it knows of that model, whatever it is told."""
    server = Process("--kv-memory", "32MiB", "--served-model-name", "mine,claude-sonnet-4-5")
    try:
        for arguments, warned in ((("--model", "claude-sonnet-4-5"), True), ((), False)):
            code, out, err = launch(tmp_path, "claude", "--url", server.url, *arguments)
            assert (code, "takes claude-sonnet-4-5 for a model of Anthropic's" in err) == (0, warned)
            assert f"ANTHROPIC_MODEL={arguments[1] if arguments else 'mine'}\n" in out
        assert "Anthropic's" not in launch(tmp_path, "opencode", "--url", server.url, "--model", "claude-sonnet-4-5")[2]
    finally:
        server.stop()


def test_codex(server: Server, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    own = '# mine\nmodel = "gpt-5"\n\n[model_providers.other]\nname = "Other" # kept\nbase_url = "x"\n'
    config.write_text(own)
    code, out, _ = launch(tmp_path, "codex", "--url", server.url, "--write", CODEX_HOME=str(tmp_path))
    assert code == 0
    assert "codex -c model_provider=quire -c model_context_window=512 -m fake" in out
    text = config.read_text()
    assert text.startswith(own.rstrip()), "the user's lines stay as they are"
    provider = tomllib.loads(text)["model_providers"]["quire"]
    assert provider == {"name": "Quire", "base_url": f"{server.url}/v1", "wire_api": "responses"}
    _, out, _ = launch(tmp_path, "codex", "--url", server.url, CODEX_HOME=str(tmp_path))
    assert tomllib.loads(out.partition("# and then")[0]) == {"model_providers": {"quire": provider}}
    launch(tmp_path, "codex", "--url", server.url, "--write", CODEX_HOME=str(tmp_path))
    assert config.read_text() == text, "again changes nothing"
    code, _, err = launch(tmp_path, "codex", "--url", server.url, "--write", "--api-key", "sk-x", CODEX_HOME=str(tmp_path))
    assert (code, "has another model_providers.quire" in err) == (2, True)
    launch(tmp_path, "codex", "--url", server.url, "--write", "--api-key", "sk-x", "--overwrite", CODEX_HOME=str(tmp_path))
    found = tomllib.loads(config.read_text())
    assert found["model_providers"]["quire"] == provider | {"env_key": "QUIRE_API_KEY"}
    assert (found["model"], found["model_providers"]["other"]["name"]) == ("gpt-5", "Other")
    assert "sk-x" not in config.read_text(), "it names the variable, and not the key"


def test_opencode(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "opencode" / "opencode.json"
    code, out, _ = launch(tmp_path, "opencode", "--url", server.url, XDG_CONFIG_HOME=str(tmp_path))
    assert code == 0
    provider = json.loads(out)["provider"]["quire"]
    assert provider["npm"] == "@ai-sdk/openai-compatible"
    assert provider["options"] == {"baseURL": f"{server.url}/v1"}
    assert provider["models"] == {"fake": {"name": "fake", "limit": {"context": 512, "output": 128}}}
    code, out, _ = launch(tmp_path, "opencode", "--url", server.url, "--write", XDG_CONFIG_HOME=str(tmp_path))
    assert "opencode -m quire/fake" in out
    assert json.loads(path.read_text()) == {"provider": {"quire": provider}}
    path.write_text('{\n  // mine\n  "theme": "dark"\n}\n')
    code, _, err = launch(tmp_path, "opencode", "--url", server.url, "--write", XDG_CONFIG_HOME=str(tmp_path))
    assert code == 2
    assert "is not plain JSON" in err
    assert "// mine" in path.read_text()


def test_wrong_use(server: Server, tmp_path: Path) -> None:
    for arguments, words in (
        (("emacs",), "invalid choice"),
        (("claude", "--url", "http://127.0.0.1:1"), "Connection refused. Is it running?"),
        (("claude", "--url", server.url, "--model", "gpt-5"), "has no model 'gpt-5'; it has fake"),
    ):
        code, out, err = launch(tmp_path, *arguments)
        assert code != 0
        assert out == ""
        assert words in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(("text", "words"), [
    ("[", "not valid TOML"),
    ("[a]\nb = 1\n", "has another a.b"),
    ("a = 1\n", "can't be changed here"),
    ('[a.b.c]\nd = 1\n', "has another a.b"),
])  # fmt: skip
def test_toml_that_is_not_understood(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        change_toml(text, {"a.b": {"x": "1"}}, False)


@pytest.mark.parametrize("text", [
    "", "[a.b]\nx = '0'\n", "[a.b] # ours\nx = '0'\n# end\n[c]\nd = 1\n", "[c]\nd = '''\n[a.c]\n'''\n\n[a.b]\nx = '0'",
])  # fmt: skip
def test_a_table_is_replaced_and_nothing_else(text: str) -> None:
    expected: dict[str, Any] = tomllib.loads(text)
    expected.setdefault("a", {})["b"] = {"x": 'é"\\'}
    made = change_toml(text, {"a.b": {"x": 'é"\\'}}, True)
    assert tomllib.loads(made) == expected


def test_text_that_looks_like_the_table_is_too_much() -> None:
    with pytest.raises(ConfigError, match="by hand"):
        change_toml("c = '''\n[a.b]\n'''\n[a.b]\nx = '0'\n", {"a.b": {"x": "1"}}, True)


def test_files_are_changed_whole_or_not_at_all(tmp_path: Path) -> None:
    real = tmp_path / "real.json"
    real.write_text("{}")
    real.chmod(0o640)
    link = tmp_path / "link.json"
    link.symlink_to(real)
    for number in range(3):
        backup = write(link, lambda text, number=number: change_json(text, {"a.b": number}, True))  # type: ignore[misc]
        assert backup is not None
    assert link.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    assert json.loads(real.read_text()) == {"a": {"b": 2}}
    assert (tmp_path / "real.json.before-quire").read_text() == "{}", "the first one is not lost to the next"
    for text, words in (("[]", "does not hold a JSON object"), ('{"a": 1}', "a is not an object")):
        real.write_text(text)
        with pytest.raises(ConfigError, match=words):
            write(link, lambda text: change_json(text, {"a.b": 1}, True))
        assert real.read_text() == text
    with pytest.raises(ConfigError, match="can't be changed"):
        write(tmp_path / "real.json" / "x", lambda text: "{}")
