"""The API server of a Kubernetes cluster, as far as a job needs it, through the official client.

The cluster and who asks are those of kubeconfig, which only the client reads.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

TIMEOUT_SECONDS = 60
# (group, version, plural) of the kinds that run something.
KINDS = {"JobSet": ("jobset.x-k8s.io", "v1alpha2", "jobsets"), "Job": ("batch", "v1", "jobs")}


class Refused(RuntimeError):
    """The API server's refusal.

    Attributes:
      status: of HTTP.
    """

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status

    @property
    def quota(self) -> bool:
        """Whether there would be room for it at another time."""
        return self.status == 403 and "quota" in str(self)


class Cluster:
    """One namespace of a cluster.

    Args:
      context: as kubeconfig names the cluster; empty: its current one.

    Attributes:
      context: its name.

    Raises:
      ImportError: the client is not installed.
      RuntimeError: kubeconfig has no such context, or cannot be read.
    """

    def __init__(self, context: str, namespace: str):
        try:
            from kubernetes import client, config
        except ImportError as error:
            raise ImportError("the backend gke needs kubernetes: `pip install -e .[gke]` in the checkout") from error
        try:
            contexts, current = config.list_kube_config_contexts()
            self.context = context or current["name"]
            if self.context not in (known := [each["name"] for each in contexts]):
                raise RuntimeError(f"kubeconfig has no context {context}: --context is one of {', '.join(known)}")
            asks = config.new_client_from_config(context=self.context)
        except config.ConfigException as error:
            raise RuntimeError(
                f"no cluster is known here ({_line(error)}): run `gcloud container clusters get-credentials CLUSTER`"
            ) from error
        self._namespace = namespace
        self._objects, self._core = client.CustomObjectsApi(asks), client.CoreV1Api(asks)

    def create(self, manifest: Mapping[str, Any], dry_run: bool = False) -> None:
        """Makes an object that is not there. Raises Refused for what the server does not take.

        Args:
          dry_run: the server only says whether it would.
        """
        asked: dict[str, Any] = {"_request_timeout": TIMEOUT_SECONDS, "field_validation": "Strict"}
        if dry_run:
            asked["dry_run"] = "All"
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        try:
            with _answered():
                if kind == "Service":
                    self._core.create_namespaced_service(self._namespace, dict(manifest), **asked)
                else:
                    group, version, plural = KINDS[kind]
                    self._objects.create_namespaced_custom_object(
                        group, version, self._namespace, plural, dict(manifest), **asked
                    )
        except Refused as error:
            if error.status != 409:  # it is there
                raise Refused(error.status, f"the cluster refuses {name}: {error}{_mend(error, kind)}") from error

    def read(self, kind: str, name: str) -> dict[str, Any] | None:
        """An object that runs something; None where it is not there."""
        group, version, plural = KINDS[kind]
        try:
            with _answered():
                return self._objects.get_namespaced_custom_object(
                    group, version, self._namespace, plural, name, _request_timeout=TIMEOUT_SECONDS
                )
        except Refused as error:
            if error.status != 404:
                raise
            return None

    def delete(self, kind: str, name: str) -> None:
        """Asks for the end of an object, if it is there. It stays until its pods have ended, for as long as they may take."""
        asked: dict[str, Any] = {"propagation_policy": "Foreground", "_request_timeout": TIMEOUT_SECONDS}
        try:
            with _answered():
                if kind == "Service":
                    self._core.delete_namespaced_service(name, self._namespace, **asked)
                else:
                    group, version, plural = KINDS[kind]
                    self._objects.delete_namespaced_custom_object(
                        group, version, self._namespace, plural, name, **asked
                    )
        except Refused as error:
            if error.status != 404:
                raise

    def pods(self, selector: str) -> list[dict[str, Any]]:
        """The pods with a label, as the API has them."""
        return json.loads(self._raw(self._core.list_namespaced_pod, self._namespace, label_selector=selector))["items"]

    def said(self, pod: str, lines: int = 40) -> bytes:
        """The end of what a pod's processes said. Raises Refused where they have not begun."""
        return self._raw(self._core.read_namespaced_pod_log, pod, self._namespace, tail_lines=lines)

    def warning(self, name: str) -> str:
        """The last warning about an object or those that it made, whose names begin with its own; empty if there is none."""
        told = self._raw(self._core.list_namespaced_event, self._namespace, field_selector="type=Warning")
        ours = [each for each in json.loads(told)["items"] if each["involvedObject"].get("name", "").startswith(name)]
        ours.sort(key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "")
        return _line(ours[-1].get("message", "")) if ours else ""

    def _raw(self, call: Callable[..., Any], *arguments: str, **asked: Any) -> bytes:
        """An answer as it came, because the client's own reading refuses what a newer server says."""
        with _answered():
            return call(*arguments, **asked, _preload_content=False, _request_timeout=TIMEOUT_SECONDS).data


@contextlib.contextmanager
def _answered() -> Iterator[None]:
    """Raises Refused with the server's words, and RuntimeError where it does not answer."""
    from kubernetes.client.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        try:
            message = json.loads(error.body)["message"]
        except (TypeError, ValueError, KeyError):  # of a proxy, which says something else
            message = error.reason
        raise Refused(error.status, f"{_line(message)} ({error.status})") from error
    except HTTPError as error:
        raise RuntimeError(f"the API server of the cluster cannot be reached: {_line(error)}") from error


def _mend(error: Refused, kind: str) -> str:
    if error.status == 401:
        return ". Log in again: `gcloud auth login`"
    if error.status == 404:
        return f". Has the cluster this namespace, and what runs a {kind}?"
    if error.status == 403:
        return ". Stop what runs, or ask for a larger quota" if error.quota else ". Ask for that right"
    return ""


def _line(said: object) -> str:
    return " ".join(str(said).split())
