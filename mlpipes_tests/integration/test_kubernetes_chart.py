"""The Helm chart: refused by name if its values are wrong; a whole desk if they are not, changed and taken away again."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlpipes.store.layout import Store
from mlpipes.store.messages import Progressed, Stopping
from mlpipes.workloads.catalog import CATALOG
from mlpipes_tests import evidence
from mlpipes_tests.browser import browser_page, picture
from mlpipes_tests.chaos.runs import Trainings
from mlpipes_tests.cluster import conftest
from mlpipes_tests.cluster.chart import CHART, RELEASE, USER, Desk, database, helm
from mlpipes_tests.cluster.cluster import Cluster, lacking
from mlpipes_tests.cluster.conftest import Namespace
from mlpipes_tests.cluster.kubectl import in_phase
from mlpipes_tests.conftest import missing
from mlpipes_tests.sandbox import CHECKOUT, graphql
from mlpipes_tests.training.harness import make_job, run_here
from mlpipes_tests.waiting import until

pytestmark = pytest.mark.cluster
cluster, namespace = conftest.cluster, conftest.namespace
ONE, TWO = "w1-b128-e30-g0", "w2-b128-e30-g0"
GOOD = {"image": "registry.example.com/mlpipes:1.0"}


@pytest.fixture(autouse=True)
def programs() -> None:
    os.environ["PATH"] += ":/usr/sbin:/sbin:/usr/local/go/bin"
    if lacks := lacking():
        missing(lacks)


def rendered(values: dict[str, Any]) -> list[dict[str, Any]]:
    done = helm("template", RELEASE, str(CHART), "--namespace=ml", values=values)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"image": ""}, "image: name the image with this package"),
        ({"image": 3}, "/image"),
        ({**GOOD, "imagePullPolicy": "Sometimes"}, "imagePullPolicy"),
        ({**GOOD, "user": 0}, "/user"),
        ({**GOOD, "store": {"mountPath": "shared"}}, "/store/mountPath"),
        ({**GOOD, "store": {"size": "lots"}}, "/store/size"),
        ({**GOOD, "store": {"claims": "x"}}, "claims"),
        ({**GOOD, "training": {"image": "other:1"}}, "/training"),
        ({**GOOD, "environment": {"A-B": "1"}}, "A-B"),
        ({**GOOD, "environment": {"TOKEN": {"secret": "s"}}}, "/environment/TOKEN"),
        ({**GOOD, "dagster": {"maxConcurrentRuns": 0}}, "/dagster/maxConcurrentRuns"),
        ({**GOOD, "dagster": {"module": "my module"}}, "/dagster/module"),
        ({**GOOD, "mlflow": {"enabled": False}}, "mlflow.uri: name the server"),
        ({**GOOD, "mlflow": {"uri": "mlflow:5000"}}, "/mlflow/uri"),
        ({**GOOD, "postgres": {"enabled": False}}, "postgres.host: name the server"),
        ({**GOOD, "postgres": {"database": "my-db"}}, "/postgres/database"),
        ({**GOOD, "postgres": {"nodeSelector": {"pool": 1}}}, "/postgres/nodeSelector/pool"),
        ({**GOOD, "serve": {"models": {"my-model": {}}}}, "my-model"),
        ({**GOOD, "serve": {"models": {"digits": {"replicas": 0}}}}, "/serve/models/digits/replicas"),
        ({**GOOD, "serve": {"models": {"digits": {"port": 80}}}}, "port"),
        ({**GOOD, "serve": {"defaults": {"drainSeconds": 0}}}, "/serve/defaults/drainSeconds"),
        ({**GOOD, "serve": {"token": "in-the-open"}}, "token"),
        ({**GOOD, "serve": {"tls": "Not a name"}}, "/serve/tls"),
        ({**GOOD, "rbac": {"clusterAdmin": True}}, "clusterAdmin"),
        ({**GOOD, "replicas": 3}, "replicas"),
    ],
)
def test_wrong_values_are_refused_by_name(wrong: dict[str, Any], said: str) -> None:
    done = helm("template", RELEASE, str(CHART), values=wrong)
    assert done.returncode != 0, done.stdout[:500]
    assert said in done.stderr


def test_whatever_is_chosen_it_renders_and_stays_without_rights() -> None:
    assert "1 chart(s) linted, 0 chart(s) failed" in helm("lint", "--strict", str(CHART), values=GOOD).stdout
    foreign = {"enabled": False, "host": "db.example.com", "secret": "db"}
    for values in (
        GOOD,
        {**GOOD, "imagePullSecrets": ["one", "two"], "environmentFrom": ["tokens"], "environment": {"A": 1}},
        {**GOOD, "postgres": foreign, "mlflow": {"enabled": False, "uri": "https://mlflow.example.com"}},
        {**GOOD, "monitoring": {"enabled": True, "labels": {"release": "prometheus"}}, "rbac": {"clusterRead": True}},
        {**GOOD, "store": {"claim": "have", "subPath": "team"}, "nodeSelector": {"pool": "cpu"}},
        {**GOOD, "serve": {"models": {"digits": {}, "video_sr": {"replicas": 5}}}, "monitoring": {"enabled": True}},
        {**GOOD, "serve": {"models": {"digits": {}}, "secret": "own"}, "networkPolicies": {"enabled": False}},
    ):
        made = rendered(values)
        kinds = [document["kind"] for document in made]
        assert ("ClusterRole" in kinds) == ("clusterRead" in values.get("rbac", {}))
        for document in made:
            assert document["metadata"].get("namespace", "ml") == "ml"
            assert document["metadata"]["name"].startswith((RELEASE, f"ml-{RELEASE}"))
            if "template" in document.get("spec", {}):
                pod = document["spec"]["template"]["spec"]
                for container in pod["containers"] + pod.get("initContainers", []):
                    security = container["securityContext"]
                    assert security["readOnlyRootFilesystem"]
                    assert security["runAsNonRoot"]
                    assert security["capabilities"] == {"drop": ["ALL"]}
        boards = [m for m in made if "grafana_dashboard" in m["metadata"].get("labels", {})]
        titles = [json.loads(text)["title"] for board in boards for text in board["data"].values()]
        assert sorted(titles) == (["mlpipes: serving", "mlpipes: trainings"] if "monitoring" in values else [])
        text = yaml.safe_dump_all(made)
        assert "emptyDir" in text
        assert "<no value>" not in text
        assert "%!" not in text
        assert not re.search(r"verbs: *\[?.*\*", text), "no right is given as a whole"


def test_the_database_may_have_nodes_of_its_own_and_is_waited_for() -> None:
    stays = {"nodeSelector": {"pool": "system"}, "tolerations": [{"key": "system", "operator": "Exists"}]}
    made = rendered({**GOOD, "nodeSelector": {"pool": "spot"}, "tolerations": [{"key": "spot"}], "postgres": stays})
    pods = {m["metadata"]["name"]: m["spec"]["template"]["spec"] for m in made if "template" in m.get("spec", {})}
    for name, pod in pods.items():
        keys = [toleration["key"] for toleration in pod["tolerations"]]
        is_database = name == f"{RELEASE}-postgres"
        assert pod["nodeSelector"] == {"pool": "system" if is_database else "spot"}
        assert keys[2:] == (["spot", "system"] if is_database else ["spot"])
        command = pod["containers"][0].get("command", [])
        assert is_database or command[3:5] == [f"{RELEASE}-postgres", "5432"]
        assert is_database or command[5] in ("dagster-webserver", "dagster-daemon", "dagster", "mlflow")


def test_numbers_reach_pods_as_they_were_written() -> None:
    made = rendered({**GOOD, "environment": {"BYTES": 8388608, "SHARE": 0.25, "YES": True, "TEXT": "007"}})
    (pod,) = [
        m["spec"]["template"]["spec"]
        for m in made
        if (m["kind"], m["metadata"]["name"]) == ("Deployment", f"{RELEASE}-code")
    ]
    variables = {variable["name"]: variable.get("value") for variable in pod["containers"][0]["env"]}
    assert [variables[name] for name in ("BYTES", "SHARE", "YES", "TEXT")] == ["8388608", "0.25", "true", "007"]


def test_dagsters_settings_take_the_sites_own() -> None:
    (settings,) = [
        document
        for document in rendered({**GOOD, "dagster": {"settings": {"run_retries": {"max_retries": 9}}}})
        if document["kind"] == "ConfigMap" and document["metadata"]["name"].endswith("-settings")
    ]
    dagster = yaml.safe_load(settings["data"]["dagster.yaml"])
    assert dagster["run_retries"] == {"enabled": True, "max_retries": 9, "retry_on_asset_or_op_failure": False}
    launcher = dagster["run_launcher"]["config"]
    assert launcher["volume_mounts"][-1] == {"name": "settings", "mountPath": "/etc/mlpipes"}


def test_models_are_served_only_if_named_each_with_what_differs_from_the_defaults() -> None:
    def of_serving(**values: Any) -> dict[tuple[str, str], dict[str, Any]]:
        found = {(made["kind"], made["metadata"]["name"]): made for made in rendered({**GOOD, **values})}
        return {key: made for key, made in found.items() if "-serve" in key[1]}

    assert of_serving() == {}
    own = {
        "replicas": 5,
        "drainSeconds": 40,
        "options": ["--alias", "staging"],
        "resources": {"requests": {"cpu": "2"}},
    }
    source = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress"}}}
    made = of_serving(
        serve={"models": {"digits": {}, "video_sr": own}},
        monitoring={"enabled": True},
        networkPolicies={"serveFrom": [source]},
    )
    kinds = ("Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy", "PodMonitor")
    names = [f"{RELEASE}-serve-{model}" for model in ("digits", "video-sr")]
    assert set(made) == {(kind, name) for kind in kinds for name in names} | {("Secret", f"{RELEASE}-serve")}
    for name, workload, drain, replicas, asked in zip(
        names, ("digits", "video_sr"), (15, 40), ((2, 4), (5, 5)), ("1", "2"), strict=True
    ):
        deployment = made["Deployment", name]["spec"]
        assert "replicas" not in deployment, "an upgrade would take back what the autoscaler has done"
        assert deployment["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
        pod = deployment["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] > drain + 20, "what is in flight after the drain has 20 s"
        (container,) = pod["containers"]
        command = " ".join(container["command"])
        assert command.startswith(f"mlpipes serve {workload} --host 0.0.0.0 --port 8100 --behind-proxy")
        assert command.endswith(f"--drain {drain}")
        assert container["resources"]["requests"] == {"cpu": asked, "memory": "1Gi"}
        (token,) = [variable for variable in container["env"] if variable["name"] == "MLPIPES_SERVE_TOKEN"]
        assert token["valueFrom"] == {"secretKeyRef": {"name": f"{RELEASE}-serve", "key": "token"}}
        scaler = made["HorizontalPodAutoscaler", name]["spec"]
        assert (scaler["minReplicas"], scaler["maxReplicas"]) == replicas
        assert scaler["scaleTargetRef"]["name"] == name
        assert made["NetworkPolicy", name]["spec"]["ingress"][0]["from"] == [source]
        chosen = deployment["selector"]["matchLabels"]
        for selector in (
            made["Service", name]["spec"]["selector"],
            *(made[kind, name]["spec"]["selector"]["matchLabels"] for kind in ("PodDisruptionBudget", "PodMonitor")),
        ):
            assert selector == chosen
    assert made["Deployment", names[1]]["spec"]["template"]["spec"]["containers"][0]["args"] == ["--alias", "staging"]
    theirs = of_serving(serve={"models": {"digits": {}}, "secret": "have"})
    assert ("Secret", f"{RELEASE}-serve") not in theirs
    assert "have" in yaml.safe_dump(theirs["Deployment", names[0]])
    encrypted = of_serving(serve={"models": {"digits": {}}, "tls": "certificate"}, monitoring={"enabled": True})
    pod = encrypted["Deployment", names[0]]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert "--behind-proxy" not in container["command"]
    given = dict(zip(container["command"][3:-1:2], container["command"][4::2], strict=True))
    assert (given["--tls-cert"], given["--tls-key"]) == ("/etc/serve-tls/tls.crt", "/etc/serve-tls/tls.key")
    probes = [value["httpGet"]["scheme"] for key, value in container.items() if key.endswith("Probe")]
    assert probes == ["HTTPS"] * len(probes)
    assert len(probes) >= 2
    assert container["volumeMounts"][-1]["mountPath"] == "/etc/serve-tls"
    assert pod["volumes"][-1] == {"name": "serve-tls", "secret": {"secretName": "certificate"}}
    assert encrypted["PodMonitor", names[0]]["spec"]["podMetricsEndpoints"][0]["scheme"] == "https"


@pytest.fixture
def desk(cluster: Cluster, namespace: Namespace) -> Iterator[Desk]:
    made = Desk(cluster, namespace)
    evidence.collect_from(namespace.store)
    yield made
    cluster.kubectl("delete", "persistentvolume", f"{namespace.name}-data-{RELEASE}-postgres-0", "--wait=false")


def mlpipes(desk: Desk, *arguments: str) -> str:
    """Run our command here, as the pods' user, on the store that the pods see."""
    user = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
    rights = ["--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search"]  # the test's folders are root's
    done = subprocess.run(
        [*user, *rights, str(CHECKOUT / ".venv" / "bin" / "mlpipes"), *arguments],
        env=os.environ | {"MLPIPES_HOME": str(desk.home), "HOME": str(desk.home), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_desk_is_installed_trains_is_changed_and_is_taken_away(
    cluster: Cluster, namespace: Namespace, desk: Desk, tmp_path: Path
) -> None:
    before = set(cluster.kubectl.everything(namespace.name))
    notes = desk.install()
    assert f"service/{RELEASE}-webserver" in notes
    desk.until_up()
    with desk.forwarded("webserver", 3000) as ui:
        print(mlpipes(desk, "backfill", "digits", f"--scale={TWO}", f"--ui={ui}"))
        with browser_page(900) as page:
            page.goto(f"{ui}/assets/digits/eval_report?partition={TWO}")
            page.wait_for_load_state("networkidle")
            picture(page, "kubernetes_evaluation")
    outcome = outcome_of(desk)
    reference = run_here(make_job(tmp_path / "reference", ONE, CATALOG[0].implementation))
    for name in ("weights_digest", "order_digest", "loss_digest", "steps"):
        assert outcome[name] == reference[name], name
    print("weights digest", outcome["weights_digest"])
    with desk.forwarded("mlflow", 5000) as uri:
        from mlflow.tracking import MlflowClient

        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name("mlpipes/digits")
        assert experiment is not None
        assert {run.info.status for run in client.search_runs([experiment.experiment_id])} == {"FINISHED"}
        assert client.get_model_version_by_alias("mlpipes-digits", "champion").version == "1"

    # Changed, and back: the settings' pods are new, the database and its password are those that were.
    password = cluster.kubectl.find("secret", f"{RELEASE}-postgres", namespace.name)
    desk.upgrade(dagster={"maxConcurrentRuns": 3})
    desk.until_up()
    settings = cluster.kubectl.find("configmap", f"{RELEASE}-settings", namespace.name)
    assert settings is not None
    assert "max_concurrent_runs: 3" in settings["data"]["dagster.yaml"]
    desk.helm("rollback", RELEASE, "1")
    desk.until_up()
    again = cluster.kubectl.find("secret", f"{RELEASE}-postgres", namespace.name)
    assert password is not None
    assert again is not None
    assert again["data"] == password["data"]
    with desk.forwarded("webserver", 3000) as ui:
        assert "Fresh, nothing to do" in mlpipes(desk, "backfill", "digits", f"--scale={TWO}", f"--ui={ui}")

    kept = {f"persistentvolumeclaim/data-{RELEASE}-postgres-0", f"secret/{RELEASE}-postgres"}

    def uninstall() -> None:
        desk.helm("uninstall", RELEASE, "--wait")
        left = f"nothing is left but {kept}"
        until(lambda: set(cluster.kubectl.everything(namespace.name)) - before <= kept, left, every=1)

    uninstall()
    desk.install()  # it finds the database, and the password that it has
    desk.until_up()
    with desk.forwarded("webserver", 3000) as ui:
        assert "Fresh, nothing to do" in mlpipes(desk, "backfill", "digits", f"--scale={TWO}", f"--ui={ui}")
    uninstall()


def test_who_installs_it_looks_backfills_and_cancels_as_the_documents_say(
    cluster: Cluster, namespace: Namespace, desk: Desk
) -> None:
    long, scales = "w2-b128-e2000-g0", namespace.store / "scales.yaml"
    scales.write_text(yaml.safe_dump({"digits": [ONE, long]}))
    desk.install(environment=desk.values["environment"] | {"MLPIPES_SCALES": str(scales)})
    desk.until_up()
    program = str(CHECKOUT / ".venv" / "bin" / "mlpipes")

    def within(part: str, *arguments: str) -> str:
        (pod,) = desk.pods(part)
        name = pod["metadata"]["name"]
        return cluster.kubectl.execute(name, program, *arguments, namespace=namespace.name)

    said = within("code", "doctor", "kubernetes", "--probe")
    assert "missing" not in said, said
    assert re.search(r"good +a pod: read here:", said), said
    print(within("webserver", "backfill", "digits", f"--scale={ONE}", "--ui=http://localhost:3000"))
    assert outcome_of(desk)["attempt"] == 1

    with desk.forwarded("webserver", 3000) as ui:
        trainings = At(ui, desk, long)
        run = trainings.launch()
        folder = trainings.folder_of(run)
        until(lambda: any(isinstance(m, Progressed) for m in trainings.messages(folder)), "it trains", every=1)
        trainings.cancel(run)
        until(lambda: trainings.family(run) == ["CANCELED"], "it is cancelled", every=1)
    assert any(isinstance(m, Stopping) for m in trainings.messages(folder)), "a last checkpoint was asked for and made"
    assert cluster.kubectl.objects("rayjobs", namespace.name) == []
    runs = "app.kubernetes.io/component=run_worker"
    until(lambda: not working(cluster, namespace, runs), "no pod of a run works any more", every=1)
    until(lambda: not working(cluster, namespace, "ray.io/node-type"), "no pod of Ray is left", every=1)
    desk.helm("uninstall", RELEASE, "--wait")


class At(Trainings):
    """Trainings of a scale of digits at a desk whose webserver is forwarded."""

    workload = "digits"

    def __init__(self, ui: str, desk: Desk, scale: str) -> None:
        self.ui, self.scale, self.store = ui, scale, Store(desk.home / "store")

    def ask(self, query: str, **variables: Any) -> Any:
        return graphql(self.ui, query, **variables)


def working(cluster: Cluster, namespace: Namespace, selector: str) -> list[str]:
    """Pods that have not ended."""
    found = cluster.kubectl.objects("pods", namespace.name, selector=selector)
    return [pod["metadata"]["name"] for pod in found if pod["status"].get("phase") in ("Pending", "Running")]


def test_a_desk_with_a_database_and_a_password_of_the_sites_own_trains(
    cluster: Cluster, namespace: Namespace, desk: Desk
) -> None:
    user, databases, password = "ml", ("history", "tracking"), "pass@of%41the/site:1"
    where = [f"--namespace={namespace.name}"]
    made = database("site", user, databases, password)
    cluster.kubectl("create", *where, "-f", "-", text=yaml.safe_dump_all(made))
    runs, over = in_phase("Running"), in_phase("Failed", "Succeeded")
    found = cluster.kubectl.wait_for(
        "pod", "site", lambda pod: runs(pod) or over(pod), "runs", namespace=namespace.name
    )
    assert runs(found)
    names = dict(zip(("database", "mlflowDatabase"), databases, strict=True))
    server = {"enabled": False, "host": "site", "secret": "site", "username": user, **names}
    notes = desk.install(postgres=server)
    assert password not in notes
    desk.until_up()
    assert cluster.kubectl.objects("statefulsets", namespace.name) == []
    with desk.forwarded("webserver", 3000) as ui:
        print(mlpipes(desk, "backfill", "digits", f"--scale={ONE}", f"--ui={ui}"))
    assert outcome_of(desk)["attempt"] == 1

    def rows(database: str, table: str) -> int:
        program = f"PATH=$(ls -d /usr/lib/postgresql/*/bin | tail -1):$PATH PGPASSWORD='{password}' psql"
        query = f"{program} -h 127.0.0.1 -U {user} -d {database} -Atc 'SELECT count(*) FROM {table}'"  # noqa: S608
        return int(cluster.kubectl.execute("site", "bash", "-c", query, namespace=namespace.name))

    assert rows(databases[0], "event_logs") > 0
    assert rows(databases[1], "model_versions") == 1
    desk.helm("uninstall", RELEASE, "--wait")
    assert rows(databases[0], "event_logs") > 0, "it is the site's"


def outcome_of(desk: Desk) -> dict[str, Any]:
    """The outcome of the only training in a desk's store."""
    (folder,) = Store(desk.home / "store").root.glob("trainings/*/")
    return json.loads((folder / "result.json").read_text())["content"]
