"""The Helm chart: what Helm and Kubernetes' own schemas say of it, and what must hold of it."""

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import pytest

from shared import nats_bus, subjects
from shared.broker import find_binary
from shared.log import ensure_streams
from tests.deploy.chart import CASES, CHART, rendered
from tests.deploy.containers import free_port

helm: Any = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed")

OF_OTHERS = {"ScaledObject", "ServiceMonitor"}
"""Kinds of KEDA and the Prometheus operator, whose schemas are not Kubernetes'."""

Documents = list[dict[str, Any]]


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "-"))
def documents(request: pytest.FixtureRequest) -> Documents:
    return rendered(CASES[request.param])


def one(documents: Documents, kind: str, name: str) -> dict[str, Any]:
    (found,) = (
        document
        for document in documents
        if (document["kind"], document["metadata"]["name"]) == (kind, name)
    )
    return found


def pods(documents: Documents) -> dict[str, dict[str, Any]]:
    """The pods' specs, by the name of what makes them."""
    return {
        document["metadata"]["name"]: document["spec"]["template"]["spec"]
        for document in documents
        if "template" in document.get("spec", {})
    }


@pytest.mark.parametrize("case", CASES)
def test_helm_lint_finds_no_fault(case: str) -> None:
    report = helm.chart.lint(CHART, dict(CASES[case]), strict=True, kube_version="v1.30.0")
    grave = [message for message in report["messages"] if message["severity"] > 1]
    assert (grave, report["errors"]) == ([], [])


def test_every_manifest_is_of_kubernetes_schema(documents: Documents) -> None:
    validate: Any = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed"
    )
    checked = [document for document in documents if document["kind"] not in OF_OTHERS]
    assert len(checked) >= 5
    for document in checked:
        validate.validate(document, validate.latest_version(), strict=True)


def test_no_pod_has_rights_that_it_does_not_need(documents: Documents) -> None:
    for name, pod in pods(documents).items():
        assert pod["securityContext"]["runAsNonRoot"], name
        assert pod["automountServiceAccountToken"] is False, name
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"], name
            assert security["capabilities"] == {"drop": ["ALL"]}, name
            assert security["allowPrivilegeEscalation"] is False, name
            assert container["resources"]["limits"]["memory"], name
            assert {"readinessProbe", "livenessProbe"} <= container.keys(), name


def test_the_log_never_has_two_writers(documents: Documents) -> None:
    spec = one(documents, "Deployment", "fleet-seedwire-aggregator")["spec"]
    assert (spec["replicas"], spec["strategy"]["type"]) == (1, "Recreate")


def test_each_pod_gets_its_own_credentials_and_no_others() -> None:
    made = pods(rendered(CASES["everything"]))
    seen = {
        name: {
            item["key"]
            for volume in pod["volumes"]
            for item in volume.get("secret", {}).get("items", [])
            if volume.get("secret", {}).get("secretName") == "seedwire-keys"
        }
        for name, pod in made.items()
    }
    short = {name.removeprefix("fleet-seedwire-"): keys for name, keys in seen.items()}
    assert short == {
        "aggregator": {"aggregator.creds", "cert.pem"},
        "scheduler": {"scheduler.creds", "cert.pem"},
        "telemetry": {"telemetry.creds", "cert.pem"},
        "registrar": {"registrar.creds", "cert.pem", "registrar.json", "system.creds"},
        "proxy-inference": {"proxy_inference.creds", "cert.pem"},
        "nats": {"server.conf", "cert.pem", "key.pem"},
        "edge": set(),
    }


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"nats": {"replicas": 2}}, "/nats/replicas"),
        ({"nats": {"streamReplicas": 3}}, "nats.streamReplicas"),
        ({"nats": {"enabled": False}}, "/nats/url"),
        ({"aggregators": {}}, "aggregators"),
        ({"edge": {"kind": "CronJob"}}, "/edge/kind"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(values: Mapping[str, Any], words: str) -> None:
    with helm.Chart.load(CHART) as chart, pytest.raises(helm.errors.HelmError) as refused:
        chart.render(dict(values), name="fleet")
    assert words in str(refused.value)


def test_the_autoscaler_asks_for_metrics_that_the_proxy_has() -> None:
    scaled = one(rendered(CASES["everything"]), "ScaledObject", "fleet-seedwire-proxy-inference")
    query: str = scaled["spec"]["triggers"][0]["metadata"]["query"]
    (source,) = CHART.parents[2].glob("services/proxy_inference/metrics.py")
    text = source.read_text(encoding="utf-8")
    for name in ("requests_in_flight", "requests_waiting"):
        assert f'seedwire_proxy_{name}{{namespace="ml"}}' in query
        assert f'"{name}"' in text


def replicas_of(documents: Documents) -> int:
    """What the aggregator is told of the streams' copies, and the scheduler alike."""
    made = pods(documents)
    said = {
        variable["value"]
        for name in ("aggregator", "scheduler")
        for variable in made[f"fleet-seedwire-{name}"]["containers"][0]["env"]
        if variable["name"] == f"SEEDWIRE_{name.upper()}_STREAM_REPLICAS"
    }
    return int(said.pop()) if len(said) == 1 else 1


@pytest.mark.parametrize(
    ("values", "copies"),
    [
        ({"replicas": 1}, 1),
        ({"replicas": 3}, 3),
        ({"replicas": 5, "streamReplicas": 5}, 5),
        ({"enabled": False, "url": "nats://elsewhere:4222"}, 1),
        ({"enabled": False, "url": "nats://elsewhere:4222", "streamReplicas": 3}, 3),
    ],
)
def test_a_cluster_keeps_three_copies_of_each_stream(
    values: Mapping[str, Any], copies: int
) -> None:
    assert replicas_of(rendered({"nats": dict(values)})) == copies


@contextlib.contextmanager
def cluster(config: str, folder: Path, servers: int) -> Generator[list[str], None, None]:
    """The servers of a rendered configuration, on ports of this machine; their addresses."""
    ports = [{port: free_port() for port in (4222, 6222, 8222)} for _ in range(servers)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(servers):
            text = config.replace("/data/jetstream", str(folder / f"store-{number}"))
            for port, here in ports[number].items():
                text = text.replace(f"0.0.0.0:{port}", f"127.0.0.1:{here}")
            for peer in range(servers):
                name = f"fleet-seedwire-nats-{peer}.fleet-seedwire-nats-peers:6222"
                text = text.replace(name, f"127.0.0.1:{ports[peer][6222]}")
            path = folder / f"{number}.conf"
            path.write_text(text, encoding="utf-8")
            process = subprocess.Popen(
                [find_binary(), "--config", path],
                env={**os.environ, "POD_NAME": f"fleet-seedwire-nats-{number}"},
                stderr=subprocess.DEVNULL,
            )
            processes.append(process)
        yield [f"nats://127.0.0.1:{one[4222]}" for one in ports]
    finally:
        for process in processes:
            process.kill()
            process.wait()


async def test_three_servers_of_the_chart_are_one_broker_that_has_our_streams(
    tmp_path: Path,
) -> None:
    documents = rendered({"nats": {"replicas": 3}})
    config: str = one(documents, "ConfigMap", "fleet-seedwire-nats")["data"]["nats-server.conf"]
    with cluster(config, tmp_path, 3) as servers:
        async with asyncio.timeout(60):
            first = await nats_bus.connect(servers[:1], name="first")
            await ensure_streams(first, replicas_of(documents))
            last = await nats_bus.connect(servers[2:], name="last")
            assert await last.last_sequence(subjects.LOG_STREAM) == 0
            await last.append(subjects.log("job"), b"x", stream=subjects.LOG_STREAM)
            assert await first.last_sequence(subjects.LOG_STREAM) == 1
        await first.close()
        await last.close()


@pytest.mark.parametrize("replicas", [1, 3])
def test_the_broker_takes_the_configuration_that_is_rendered(replicas: int, tmp_path: Path) -> None:
    documents = rendered({"nats": {"replicas": replicas}})
    config = tmp_path / "nats-server.conf"
    text: str = one(documents, "ConfigMap", "fleet-seedwire-nats")["data"]["nats-server.conf"]
    config.write_text(text, encoding="utf-8")
    assert ("routes" in text) == (replicas > 1)
    ran = subprocess.run(
        [find_binary(), "-t", "--config", config],
        env={**os.environ, "POD_NAME": "fleet-seedwire-nats-0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
