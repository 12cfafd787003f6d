"""What deploy/ promises: manifests for clusters with strict rules, images that find their kernels, a dashboard of real metrics.

`make check-chart` checks the same manifests by the schemas of Kubernetes and checkov's rules.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).parent.parent / "deploy"
VALUES = sorted(path.name.removesuffix("-values.yaml") for path in (DEPLOY / "chart" / "ci").glob("*-values.yaml"))
IMAGES = ["cpu", "cuda"]
WRITABLE = {"/tmp", "/dev/shm", "/home/sparsify/.cache"}


def program(name: str) -> ModuleType:
    """A script of deploy/ as a module."""
    specification = importlib.util.spec_from_file_location(name, DEPLOY / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def chart() -> ModuleType:
    module = program("render_chart")
    if module.renderer() is None:
        pytest.skip("no renderer of charts: neither helm nor helm-python-sdk is installed")
    return module


def values_of(name: str) -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "chart" / "ci" / f"{name}-values.yaml").read_text())


def image(device: str) -> Any:
    """The last stage of a Dockerfile, with what its instructions set."""
    module = program("try_image")
    stage = module.read_dockerfile(DEPLOY / f"Dockerfile.{device}")[-1]
    made = module.Image(Path("/root-of-the-image"))
    for instruction, text in stage.steps:
        made.note(instruction, text)
    return made


def pods(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [document["spec"]["template"] for document in documents if document["kind"] in ("Deployment", "Job")]


def check_pod(pod: dict[str, Any]) -> None:
    """Kubernetes' standard `restricted`, and what the image needs beside."""
    spec = pod["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == spec["securityContext"]["fsGroup"] == 10001
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False and security["readOnlyRootFilesystem"] is True
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert set(container["resources"]) == {"requests", "limits"}
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert {mount["name"] for mount in mounts.values()} <= set(volumes)
        assert "valueFrom" not in str(container.get("env")), "secrets come as files"
        if container["name"] != "model":
            assert set(mounts) >= WRITABLE
            kernels = Path(image("cpu").environment["SPARSIFY_KERNELS"])
            hiding = [path for path in mounts if kernels.is_relative_to(path)]
            assert not hiding, "a volume hides the kernels of the image"
    used = {
        mount["name"]
        for container in [*spec.get("initContainers", []), *spec["containers"]]
        for mount in container["volumeMounts"]
    }
    assert used == set(volumes), "a volume that nobody mounts"


def check_documents(documents: list[dict[str, Any]]) -> None:
    kinds = [document["kind"] for document in documents]
    assert len({(document["kind"], document["metadata"]["name"]) for document in documents}) == len(documents)
    assert pods(documents)
    for pod in pods(documents):
        check_pod(pod)
        labels = pod["metadata"]["labels"].items()
        policies = [document["spec"] for document in documents if document["kind"] == "NetworkPolicy"]
        selected = [policy for policy in policies if policy["podSelector"]["matchLabels"].items() <= labels]
        assert len(selected) == 1 and selected[0]["policyTypes"] == ["Ingress", "Egress"]
        if "Deployment" in kinds:
            for kind in ("Service", "PodDisruptionBudget"):
                (found,) = (document["spec"]["selector"] for document in documents if document["kind"] == kind)
                assert found.get("matchLabels", found).items() <= labels


def test_the_plain_manifest_is_as_strict_as_the_chart() -> None:
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    check_documents(documents)
    assert documents[0]["kind"] == "Namespace"


@pytest.mark.parametrize("name", VALUES)
def test_the_chart_renders(name: str, chart: ModuleType) -> None:
    documents = [yaml.safe_load(text) for text in chart.render(values_of(name))]
    check_documents(documents)
    if name == "cpu-volume":
        assert chart.plain(values_of(name)) == (DEPLOY / "kubernetes.yaml").read_text(), "run make manifests"


def test_what_the_values_change(chart: ModuleType) -> None:
    gpu = [yaml.safe_load(text) for text in chart.render(values_of("gpu-hub"))]
    (server,) = pods(gpu)[0]["spec"]["containers"]
    assert server["resources"]["limits"]["nvidia.com/gpu"] == server["resources"]["requests"]["nvidia.com/gpu"] == 2
    assert server["args"][3:7] == ["example/llama-3.1-8b-sparse24", "--", "--port", "8000"]
    assert server["args"][server["args"].index("--tensor-parallel-size") + 1] == "2"
    assert {"name": "HF_HUB_OFFLINE", "value": "0"} in server["env"]

    queue = [yaml.safe_load(text) for text in chart.render(values_of("cpu-init"))]
    (scaler,) = (document["spec"] for document in queue if document["kind"] == "HorizontalPodAutoscaler")
    assert scaler["metrics"][0]["pods"]["metric"]["name"] == "vllm_num_requests_waiting"
    (served,) = (document["spec"] for document in queue if document["kind"] == "Deployment")
    assert "replicas" not in served, "the autoscaler sets them"
    assert "--config" in served["template"]["spec"]["containers"][0]["args"]
    (shown,) = (document["data"] for document in queue if document["kind"] == "ConfigMap")
    assert json.loads(shown["sparsify.json"]) == json.loads((DEPLOY / "chart/dashboards/sparsify.json").read_text())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"modle": {}}, "modle"),
        ({"model": {"source": "torrent"}}, "source"),
        ({"model": {"source": "hub"}}, "model.hub.id: name the model"),
        ({"image": {"digest": "latest"}}, "digest"),
    ],
    ids=str,
)
def test_values_that_are_wrong_are_refused(values: dict[str, Any], said: str, chart: ModuleType) -> None:
    with pytest.raises(Exception, match=re.escape(said)):
        chart.render(values)


@pytest.mark.parametrize("device", IMAGES)
def test_images(device: str, repository: Path) -> None:
    """Built as root from files that exist, served as another user that finds its kernels and can write its caches."""
    made = image(device)
    assert made.user == "10001:10001" and made.healthcheck[0] == "python"
    home = made.environment["HOME"]
    caches = [value for name, value in made.environment.items() if "CACHE" in name or name.endswith("_ROOT")]
    assert caches and all(value.startswith(f"{home}/.cache/") for value in caches)
    assert not Path(made.environment["SPARSIFY_KERNELS"]).is_relative_to(home)
    stages = program("try_image").read_dockerfile(DEPLOY / f"Dockerfile.{device}")
    for instruction, text in (step for stage in stages for step in stage.steps):
        if instruction == "COPY" and not text.startswith("--from="):
            assert all((repository / source).exists() for source in text.split()[:-1])
        if instruction == "USER":
            assert text == "10001:10001"


def test_the_cuda_image_has_code_for_every_listed_gpu() -> None:
    listed = re.search(r"kernels build --arch ([\d,]+)", (DEPLOY.parent / "docs" / "install.md").read_text())
    built = re.search(r"build\('cuda/sparse24', \(([\d, ]+)\)\)", (DEPLOY / "Dockerfile.cuda").read_text())
    assert listed is not None and built is not None
    assert built[1].replace(" ", "") == listed[1] == "80,86,89,90,100,120"


def test_compose_names_what_exists() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for service in compose["services"].values():
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source.startswith("${") or source in compose["volumes"] or (DEPLOY / source).exists(), source
    target = yaml.safe_load((DEPLOY / "monitoring/prometheus.yml").read_text())["scrape_configs"][0]["static_configs"][
        0
    ]
    assert target["targets"] == ["sparsify:8000"]


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    """Ours are those of the plugin; vLLM's are asked of a server by deploy/monitoring/check_dashboard.py."""
    metrics = pytest.importorskip(
        "sparsify.runtime.vllm_metrics", reason="vLLM is not installed; make setup installs it"
    )
    dashboard = json.loads((DEPLOY / "chart/dashboards/sparsify.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    asked = " ".join(target["expr"] for panel in panels for target in panel.get("targets", []))
    assert set(re.findall(r"sparsify_\w+", asked)) == set(metrics.DESCRIPTIONS)


def test_units_of_systemd_are_sound(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed (Debian: systemd)")
    units = []
    for unit in (DEPLOY / "systemd").iterdir():
        copy = tmp_path / unit.name.replace("@", "@x")  # the program need not be installed here
        copy.write_text(unit.read_text().replace("/opt/sparsify/bin/sparsify", "/bin/true"))
        units.append(str(copy))
    run = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    assert run.returncode == 0 and len(units) == 2, run.stderr
