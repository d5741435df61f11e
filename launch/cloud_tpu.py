"""The Cloud TPU service, as far as a job needs it: a queued resource is made, looked at and deleted, and a machine looked at.

Requests are JSON of the service's own form, so that they can be shown where Google's client is not installed. Credentials are
the client's own (`gcloud auth application-default login`) and are never read here.
"""

import contextlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

# How long the service may take to delete a slice with its machines.
DELETE_SECONDS = 1800


def client() -> Any:
    """Google's client of the service.

    Raises:
      ImportError: it is not installed.
      RuntimeError: there are no credentials.
    """
    try:
        from google.auth.exceptions import DefaultCredentialsError
        from google.cloud import tpu_v2
    except ImportError as error:
        raise ImportError(
            "the backend tpu_vm needs google-cloud-tpu: `pip install -e .[gcp]` in the checkout"
        ) from error
    try:
        return tpu_v2.TpuClient()
    except DefaultCredentialsError as error:
        raise RuntimeError("no Google Cloud credentials: run `gcloud auth application-default login`") from error


def passing() -> tuple[type[Exception], ...]:
    """Errors of the service, of buckets and of credentials that may pass: worth asking again, which costs nothing.

    An expired login is one of them, because whoever sees it can log in again while the question is repeated.
    """
    import aiohttp
    import gcsfs.retry
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError

    service = (exceptions.ServerError, exceptions.RetryError, exceptions.Unauthenticated, GoogleAuthError)
    return (*service, gcsfs.retry.HttpError, aiohttp.ClientError, OSError)


class Failed(RuntimeError):
    """The service has given up on a resource, or the run on it."""


def refusals() -> tuple[type[Exception], ...]:
    """All errors that the service answers with."""
    from google.api_core import exceptions

    return (exceptions.GoogleAPICallError,)


class CloudTpu:
    """One queued resource, `name`, of a project in a zone. Raises what `client` raises."""

    def __init__(self, project: str, zone: str, name: str):
        self._place = f"projects/{project}/locations/{zone}"
        self.name = name
        self._creation = None
        self.renew()

    def renew(self) -> None:
        """Takes the credentials that there are now: a client never looks for newer ones than it began with."""
        self._client = client()

    def create(self, request: Mapping[str, Any]) -> None:
        """Asks for the resource, which may be there already. Raises what the service refuses it with."""
        from google.api_core import exceptions
        from google.cloud import tpu_v2

        asked = tpu_v2.CreateQueuedResourceRequest.from_json(json.dumps(request))
        with contextlib.suppress(exceptions.AlreadyExists):
            self._creation = self._client.create_queued_resource(asked)

    def look(self) -> tuple[str, str] | None:
        """(its state by the service's name, why it failed if it did); None where there is no such resource.

        Raises:
          Failed: it was asked for and could not be made, for the reason given.
        """
        from google.api_core import exceptions
        from google.cloud import tpu_v2

        if self._creation is not None and self._creation.done():
            error, self._creation = self._creation.exception(), None
            if error is not None:
                raise Failed(f"Cloud TPU could not make it: {getattr(error, 'message', None) or error}")
        try:
            found = self._client.get_queued_resource(name=self._resource, retry=None).state
        except exceptions.NotFound:
            return None if self._creation is None else ("CREATING", "")
        return tpu_v2.QueuedResourceState.State(found.state).name, found.failed_data.error.message

    def delete(self) -> None:
        """Deletes it with its machines, if it is there, and waits until they are gone, so that its name is free."""
        from google.api_core import exceptions
        from google.cloud import tpu_v2

        asked = tpu_v2.DeleteQueuedResourceRequest(name=self._resource, force=True)
        with contextlib.suppress(exceptions.NotFound):
            self._client.delete_queued_resource(asked).result(timeout=DELETE_SECONDS)

    def node(self, name: str) -> tuple[str, str] | None:
        """(accelerator type, state) of a TPU VM; None where there is no such machine."""
        from google.api_core import exceptions
        from google.cloud import tpu_v2

        try:
            found = self._client.get_node(name=f"{self._place}/nodes/{name}")
        except exceptions.NotFound:
            return None
        return found.accelerator_type, tpu_v2.Node.State(found.state).name

    @property
    def _resource(self) -> str:
        return f"{self._place}/queuedResources/{self.name}"


class FlexStart(CloudTpu):
    """A queued resource on flex-start capacity, which gcloud can ask for and the client cannot. `create` takes gcloud's line."""

    def create(self, request: Sequence[str]) -> None:
        """Raises Failed with gcloud's words where there is no such resource after it."""
        answer = subprocess.run(request, capture_output=True, text=True, check=False)
        if answer.returncode and self.look() is None:
            raise Failed(f"Cloud TPU could not make it: {' '.join(answer.stderr.split())}")
