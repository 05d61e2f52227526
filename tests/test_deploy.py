"""What is in deploy/ against Quire itself: every option is one, every path answers, whoever stops the server waits long enough."""

from __future__ import annotations

import configparser
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from quire.cli.main import build_parser
from quire.config import EngineConfig, ServerConfig, resolve
from quire.server.launch import GRACE_S
from quire.text.tokenizer import Tokenizer
from server.harness import EMBEDDED, PacedBackend, Server, http

PORT = 8000


@pytest.fixture
def deploy(root: Path) -> Path:
    return root / "deploy"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    tokenizer = Tokenizer.load(EMBEDDED)
    server = Server(tokenizer, PacedBackend(vocab_size=tokenizer.vocab_size))
    yield server
    server.stop()


def serve_config(command: list[str], toml: dict[str, Any] | None = None) -> ServerConfig:
    """Of a command line without the program's name; parsing it raises where it has an option that Quire has not."""
    arguments = build_parser().parse_args(command)
    assert command[0] == "serve"
    return resolve((EngineConfig, ServerConfig), vars(arguments), {k.replace("-", "_"): v for k, v in (toml or {}).items()}, {})[1]


def toml(text: str) -> dict[str, Any]:
    import tomllib

    return tomllib.loads(text)


def waits_for(config: ServerConfig, before_s: float = 0) -> float:
    return before_s + config.drain_timeout + GRACE_S


def asked_paths(text: str) -> set[str]:
    return set(re.findall(rf"http://127\.0\.0\.1:{PORT}(/\w+)", text))


def dockerfile(deploy: Path) -> list[tuple[str, str]]:
    """(instruction, arguments)"""
    text = re.sub(r"\\\n\s*", "", (deploy / "Dockerfile").read_text())
    return [tuple(line.split(" ", 1)) for line in text.splitlines() if line and not line.startswith("#")]  # type: ignore[misc]


def test_the_image(deploy: Path, root: Path, server: Server) -> None:
    lines = dockerfile(deploy)
    last = dict(lines)
    assert last["USER"] == "quire"
    assert last["STOPSIGNAL"] == "SIGTERM"
    assert int(last["EXPOSE"]) == PORT == ServerConfig().port
    entry, command = json.loads(last["ENTRYPOINT"]), json.loads(last["CMD"])
    assert entry == ["quire"]
    assert serve_config(command).host == "0.0.0.0"
    for path in asked_paths(last["HEALTHCHECK"]):
        assert http.get(server.url + path).status_code == 200
    assert asked_paths(last["HEALTHCHECK"]) == {"/health"}
    ignored = (deploy / "Dockerfile.dockerignore").read_text().splitlines()
    copied = set()
    for name, rest in lines:
        if name == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert (root / source).exists(), source
                assert f"!{source}" in ignored, f"{source} is not sent to the builder"
                copied.add(source)
    pyproject = toml((root / "pyproject.toml").read_text())
    project = pyproject["project"]
    packages = pyproject["tool"]["scikit-build"]["wheel"]["packages"]
    assert copied == {"pyproject.toml", "CMakeLists.txt", project["readme"], *project["license-files"], *packages}, "what the build reads"
    assert project["scripts"]["quire"]


def test_compose(deploy: Path, server: Server) -> None:
    file = yaml.safe_load((deploy / "compose.yaml").read_text())
    service = file["services"]["quire"]
    config = serve_config(service["command"], toml((deploy / "quire.toml").read_text()))
    assert config.host == "0.0.0.0"
    assert int(service["stop_grace_period"].removesuffix("s")) > waits_for(config)
    (path,) = asked_paths(" ".join(service["healthcheck"]["test"]))
    assert path == "/ready"
    assert http.get(server.url + path).status_code == 200
    assert (deploy / service["build"]["context"] / service["build"]["dockerfile"]).exists()
    mounts = dict(volume.rsplit(":", 2 if volume.endswith(":ro") else 1)[:2] for volume in service["volumes"])
    assert mounts["./quire.toml"] == "/etc/quire/quire.toml" == service["command"][-1]
    assert set(file["volumes"]) <= set(mounts)
    assert str(config.batch_dir).startswith(mounts["data"]), "batches are on the volume: the root is read-only"
    assert (deploy / "../quire/models/embedded/config.json").exists(), "the default model"


def test_the_unit(deploy: Path) -> None:
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(deploy / "quire.service")
    unit = parser["Service"]
    program, *command = shlex.split(unit["ExecStart"].replace("%S", "/var/lib"))
    assert program.endswith("/bin/quire")
    config = serve_config(command, toml((deploy / "quire.toml").read_text()))
    assert config.batch_dir == "/var/lib/quire/batches"
    assert unit["StateDirectory"] == "quire"
    assert int(unit["TimeoutStopSec"]) > waits_for(config)
    variables = dict(line.split("=", 1) for line in (deploy / "quire.env").read_text().splitlines() if line and line[0] != "#")
    engine, _ = resolve((EngineConfig, ServerConfig), {}, {}, variables)
    assert engine.model == "/srv/models/name", "the variable is one that Quire reads"
    assert all(name.startswith("QUIRE_") and name[6:].lower() in EngineConfig.__dataclass_fields__ for name in variables)


def test_kubernetes(deploy: Path, server: Server) -> None:
    folder = deploy / "kubernetes"
    listed = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    assert {*listed, "kustomization.yaml"} == {path.name for path in folder.iterdir()}
    objects = {each["kind"]: each for name in listed for each in yaml.safe_load_all((folder / name).read_text())}
    assert set(objects) == {"ConfigMap", "PersistentVolumeClaim", "Deployment", "Service"}
    deployment = objects["Deployment"]["spec"]
    pod = deployment["template"]["spec"]
    (container,) = pod["containers"]
    config = serve_config(container["args"], toml(objects["ConfigMap"]["data"]["quire.toml"]))
    assert config.host == "0.0.0.0"
    assert container["ports"] == [{"name": "http", "containerPort": config.port}]
    for probe, path in (("startupProbe", "/health"), ("livenessProbe", "/health"), ("readinessProbe", "/ready")):
        assert container[probe]["httpGet"] == {"path": path, "port": "http"}
        assert http.get(server.url + path).status_code == 200
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > waits_for(config, pause)
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"] == labels == objects["Service"]["spec"]["selector"]
    assert objects["Service"]["spec"]["ports"][0]["targetPort"] == "http"
    assert (deployment["replicas"], deployment["strategy"]["type"]) == (1, "Recreate")
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(volumes) == set(mounts)
    assert volumes["config"]["configMap"]["name"] == objects["ConfigMap"]["metadata"]["name"]
    assert volumes["data"]["persistentVolumeClaim"]["claimName"] == objects["PersistentVolumeClaim"]["metadata"]["name"]
    assert container["args"][-1] == f"{mounts['config']}/quire.toml"
    assert str(config.batch_dir).startswith(mounts["data"])
    assert f"--uid {pod['securityContext']['runAsUser']} " in (deploy / "Dockerfile").read_text()


def test_the_words_say_what_the_files_do(deploy: Path) -> None:
    text = (deploy / "README.md").read_text()
    for name in re.findall(r"\]\(([\w./]+)\)", text):
        assert (deploy / name).exists(), name
    for name, words in (("quire.service", r"TimeoutStopSec=\d+"), ("compose.yaml", r"stop_grace_period: \d+s"),
                        ("kubernetes/deployment.yaml", r"terminationGracePeriodSeconds: \d+")):  # fmt: skip
        found = re.search(words, (deploy / name).read_text())
        assert found is not None
        assert f"`{found[0]}`" in text
    assert f"`drain-timeout` seconds ({ServerConfig().drain_timeout})" in text
    waits = re.findall(r"docker run .*--stop-timeout (\d+)", text)
    assert waits
    assert all(int(wait) > waits_for(ServerConfig()) for wait in waits)
