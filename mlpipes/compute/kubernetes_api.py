"""The API server: requests by the official client, patient with one that is away, and its refusals as errors of ours."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

from mlpipes.compute.kubernetes_manifest import GROUP, PLURAL, VERSION
from mlpipes.compute.kubernetes_settings import SETTINGS_VARIABLE, KubernetesSettings
from mlpipes.errors import ConfigError, PreflightError
from mlpipes.store.environment import value_of

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

KUEUE = "kueue.x-k8s.io"
_VISIBLE = "visibility.kueue.x-k8s.io"
_TIMEOUTS = (5, 30)
"""Seconds to connect, and to answer."""
_LOG_TIMEOUTS = (5, 10)
"""The API server asks the pod's node for what it printed."""
_EXECUTE_SECONDS = 120
_PASSING = (408, 429, 500, 502, 503, 504)
"""Answers of an API server, a proxy before it or a webhook behind it, that is in trouble."""


class RefusedError(PreflightError):
    """The API server understood, and refused."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class KubernetesApi:
    """Requests in one namespace. All raise ConnectionError if nobody answers for long, and RefusedError for a refusal."""

    def __init__(self, settings: KubernetesSettings, patience_seconds: float = 180) -> None:
        self.settings, self.patience_seconds = settings, patience_seconds
        self._client: ApiClient | None = None
        self._versions: dict[str, str | None] = {}

    # -- paths ---------------------------------------------------------------------------------------------------------
    def core(self, plural: str, name: str = "", more: str = "") -> str:
        """The path of a kind of Kubernetes' own, or of one thing of that kind."""
        return "/".join(filter(None, ("/api/v1/namespaces", self.settings.namespace, plural, name, more)))

    def ray_jobs(self, name: str = "") -> str:
        """The path of RayJobs, or of one."""
        return "/".join(filter(None, (f"/apis/{GROUP}/{VERSION}/namespaces", self.settings.namespace, PLURAL, name)))

    def ray_clusters(self, name: str) -> str:
        """The path of a RayCluster."""
        return f"/apis/{GROUP}/{VERSION}/namespaces/{self.settings.namespace}/rayclusters/{name}"

    def kueue(self, plural: str, name: str = "") -> str | None:
        """The path of a kind of Kueue's in the namespace; None where there is no Kueue."""
        version = self.version_of(KUEUE)
        spaces = f"namespaces/{self.settings.namespace}" if plural in ("localqueues", "workloads") else ""
        return version and "/".join(filter(None, (f"/apis/{KUEUE}", version, spaces, plural, name)))

    def visible_queue(self, name: str) -> str | None:
        """The path at which Kueue tells who waits in a LocalQueue; None where it does not."""
        if self._versions.get(_VISIBLE) is None:  # it may only have been away
            found = self.glimpse(f"/apis/{_VISIBLE}")
            self._versions[_VISIBLE] = found["preferredVersion"]["version"] if found else None
        version, space = self._versions[_VISIBLE], self.settings.namespace
        return version and f"/apis/{_VISIBLE}/{version}/namespaces/{space}/localqueues/{name}/pendingworkloads"

    def version_of(self, group: str) -> str | None:
        """The preferred version of a group of kinds; None if the cluster does not know the group."""
        if group not in self._versions:
            found = self.find(f"/apis/{group}")
            self._versions[group] = found["preferredVersion"]["version"] if found else None
        return self._versions[group]

    # -- requests ------------------------------------------------------------------------------------------------------
    def find(self, path: str) -> dict[str, Any] | None:
        """What is at a path; None if there is nothing."""
        try:
            return self.request("GET", path)
        except RefusedError as error:
            if error.status == 404:
                return None
            raise

    def glimpse(self, path: str, **query: str) -> dict[str, Any] | None:
        """What is at a path, for what one can do without; None if it is not to be had at once."""
        try:
            return self._request("GET", path, query)
        except (RefusedError, ConnectionError):
            return None

    def items(self, path: str, labels: str = "", fields: str = "") -> list[dict[str, Any]]:
        """All things of a kind, or those with such labels and fields."""
        chosen = {"labelSelector": labels, "fieldSelector": fields}
        return self.request("GET", path, {name: value for name, value in chosen.items() if value}).get("items", [])

    def delete(self, path: str, **options: Any) -> None:
        """Delete what is at a path, if it is there; what it owns goes with it, in the background."""
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background", **options}
        try:
            self.request("DELETE", path, body=body)
        except RefusedError as error:
            if error.status != 404:
                raise

    def replace(self, path: str, field: str, value: Any) -> None:
        """Replace one field of what is at a path; `field` is a JSON pointer (RFC 6901)."""
        change = [{"op": "replace", "path": field, "value": value}]
        self.request("PATCH", path, body=change, content="application/json-patch+json")

    def allows(self, verb: str, group: str, resource: str, name: str = "", *, everywhere: bool = False) -> bool:
        """Whether we may do something in the namespace, with what has this name, or in the whole cluster."""
        space, (kind, _, sub) = "" if everywhere else self.settings.namespace, resource.partition("/")
        asked = {"namespace": space, "verb": verb, "group": group, "resource": kind, "subresource": sub, "name": name}
        review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview"}
        answer = self.request(
            "POST",
            "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews",
            body={**review, "spec": {"resourceAttributes": {name: value for name, value in asked.items() if value}}},
        )
        return bool(answer["status"]["allowed"])

    def request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content: str = "application/json",
    ) -> Any:
        """What the API server answers: JSON, or text where it is none. Asks again while it is away."""
        return Retrying(
            retry=retry_if_exception_type(ConnectionError),
            stop=stop_after_delay(self.patience_seconds),
            wait=wait_exponential(multiplier=0.2, max=5),
            reraise=True,
        )(self._request, method, path, query or {}, body, content)

    def log(self, pod: str, lines: int) -> str:
        """The last lines that a pod printed, or why they are not to be had: its node may be away, and is asked once only."""
        try:
            return str(
                self._request("GET", self.core("pods", pod, "log"), {"tailLines": str(lines)}, timeouts=_LOG_TIMEOUTS)
            )
        except (RefusedError, ConnectionError) as error:
            return str(error)

    def execute(self, pod: str, command: Sequence[str]) -> str:
        """What a command prints in a pod's first container. Raises RefusedError or ConnectionError."""
        from kubernetes import client, stream
        from kubernetes.client.exceptions import ApiException

        core = client.CoreV1Api(_connect(self.settings.context))  # it makes a web socket of its client, so not ours
        try:
            return stream.stream(
                core.connect_get_namespaced_pod_exec,
                pod,
                self.settings.namespace,
                command=list(command),
                **dict.fromkeys(("stdout", "stderr"), True),
                _request_timeout=_EXECUTE_SECONDS,
            )
        except ApiException as error:
            raise self._translated(error, f"exec in {pod}") from error

    def stream(self, path: str, labels: str, seconds: int) -> Iterator[bytes]:
        """Nothing as soon as it listens, then something whenever things of a kind with such labels change.

        It ends after so many seconds. Unlike all others it does not ask again while the API server is away.
        """
        from urllib3.exceptions import HTTPError

        query = {"watch": "1", "labelSelector": labels, "timeoutSeconds": str(seconds)}
        answer = self._call("GET", path, query, None, "application/json", (_TIMEOUTS[0], seconds + _TIMEOUTS[1]))
        try:
            yield b""
            yield from answer.stream()
        except (HTTPError, OSError) as error:
            raise ConnectionError(f"the API server does not answer any more: {error}") from error
        finally:
            answer.close()

    def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Any = None,
        content: str = "application/json",
        timeouts: tuple[int, int] = _TIMEOUTS,
    ) -> Any:
        from urllib3.exceptions import HTTPError

        answer = self._call(method, path, query, body, content, timeouts)
        try:
            text = answer.data.decode(errors="replace")
            return json.loads(text) if "json" in answer.headers.get("Content-Type", "") else text
        except (HTTPError, OSError, ValueError) as error:  # it died, or a proxy did, within the answer
            raise ConnectionError(f"the API server broke off within an answer: {error}") from error

    def _call(
        self, method: str, path: str, query: Mapping[str, str], body: Any, content: str, timeouts: tuple[int, int]
    ) -> Any:
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        client: Any = self._connected()
        try:
            return client.call_api(
                path,
                method,
                query_params=list(query.items()),
                header_params={"Accept": "application/json", "Content-Type": content},
                body=body,
                auth_settings=["BearerToken"],
                _preload_content=False,
                _return_http_data_only=True,
                _request_timeout=timeouts,
            )
        except HTTPError as error:
            raise ConnectionError(f"the API server {client.configuration.host} does not answer: {error}") from error
        except (ApiException, AttributeError) as error:
            # Of a certificate that it does not trust, the client means to decode the answer, which is none.
            refusal = error if isinstance(error, ApiException) else error.__context__
            if not isinstance(refusal, ApiException):
                raise
            raise self._translated(refusal, f"{method} {path}") from error

    def _translated(self, error: Any, what: str) -> Exception:
        said = _message(error)
        if error.status == 401:
            self._client = None  # credentials may have been renewed: they are read again
            return ConnectionError(
                f"the API server does not know us ({said}): has a token expired? Log in again, or renew the kubeconfig"
            )
        if "CERTIFICATE_VERIFY_FAILED" in said:
            return ConnectionError(
                f"the API server's certificate is not one that the kubeconfig trusts: {said}. Set its "
                "`certificate-authority` to the cluster's"
            )
        if error.status in _PASSING or not error.status:
            return ConnectionError(f"the API server is in trouble: {said}")
        if error.status == 403:
            return RefusedError(
                f"Kubernetes forbids {what}: {said}. `mlpipes doctor kubernetes` says which rights are missing", 403
            )
        old = ". KubeRay's own kinds are older than 1.6 where it is no field of the settings: upgrade its CRDs and operator"
        return RefusedError(f"Kubernetes refuses {what}: {said}{old if 'unknown field' in said else ''}", error.status)

    def _connected(self) -> "ApiClient":
        if self._client is None:
            self._client = _connect(self.settings.context)
        return self._client


def _connect(context: str | None) -> "ApiClient":
    """A client by the kubeconfig, or by the pod's service account. Raises ConfigError if neither is usable."""
    from kubernetes import client, config

    loaded: Any = client.Configuration()
    place = value_of("KUBECONFIG") or "~/.kube/config"
    try:
        if context is None and "KUBERNETES_SERVICE_HOST" in os.environ and not Path(place).expanduser().exists():
            config.load_incluster_config(client_configuration=loaded)
        else:
            config.load_kube_config(config_file=place, context=context, client_configuration=loaded)
    except Exception as error:  # ConfigException, and whatever a file of another form brings about
        why = " ".join(str(error).split())
        raise ConfigError(
            f"{SETTINGS_VARIABLE} is set, but the kubeconfig {place} is of no use: {why}. Set KUBECONFIG to one that "
            "`kubectl` works with, and `context` in the settings to one of its contexts"
        ) from error
    loaded.retries = False  # ours ask again
    return client.ApiClient(loaded)


def _message(error: Any) -> str:
    """What an error of the API server says."""
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return str(error.reason or error.body or error.status)
