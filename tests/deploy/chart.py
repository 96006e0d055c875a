"""The Helm chart, rendered offline by Helm's own library."""

from collections.abc import Mapping
from typing import Any

import yaml

from tests.deploy.images import DEPLOY

CHART = DEPLOY / "helm" / "seedwire"
CASES: Mapping[str, Mapping[str, Any]] = {
    "as it is": {},
    "everything": {
        "identity": {"secret": "seedwire-keys"},
        "nats": {"replicas": 3, "service": {"type": "LoadBalancer"}},
        "edge": {"enabled": True, "ticketSecret": "ticket"},
        "proxyInference": {"keda": {"enabled": True}, "apiKeySecret": "proxy", "job": "mail"},
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "networkPolicy": {"devices": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]},
        "image": {"pullSecrets": [{"name": "registry"}]},
        "nodeSelector": {"kubernetes.io/arch": "arm64"},
    },
    "elsewhere's broker": {
        "nats": {"enabled": False, "url": "tls://nats.example:4222"},
        "proxyInference": {"enabled": False},
        "edge": {"enabled": True, "kind": "DaemonSet"},
        "networkPolicy": {"enabled": False},
    },
}


def rendered(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The manifests as a cluster would get them."""
    helm: Any = __import__("helm_python")
    with helm.Chart.load(CHART) as chart:
        texts = chart.render(dict(values), name="fleet", namespace="ml")
    documents = [
        document
        for name, text in sorted(texts.items())
        if not name.endswith("NOTES.txt")
        for document in yaml.safe_load_all(text)
    ]
    return [document for document in documents if document]
