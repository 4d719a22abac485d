"""What the API server can answer, as types. The message names the verb, the object, the server's words and the status.

HafniumError (contract)
└── KubernetesError      the API server refused, or could not be asked; `status` is HTTP's (0: no answer)
    ├── NotFound         no such object, or no such kind (its CRD isn't installed)
    ├── Conflict         somebody wrote in between (resourceVersion), owns the field, or the name is taken: observe again
    ├── Invalid          the object is not as its schema wants it, or a webhook refuses it: repeating changes nothing
    ├── Forbidden        RBAC or a policy says no, or the credentials are not known
    ├── Gone             a watch or a list's next page asks for a version that is too old: list anew
    ├── Unavailable      429, 5xx or no answer, and the retries are used up: try again at the next look
    ├── Unreadable       an answer that isn't JSON, or too large
    └── LeaseLost        nothing was sent: this process is not the leader (any more); also a NotLeading
"""

from __future__ import annotations

from hafnium_contract.errors import HafniumError
from hafnium_rollout.errors import NotLeading


class KubernetesError(HafniumError):
    def __init__(self, message: str, *, status: int = 0, retry_after_s: float | None = None) -> None:
        self.status = status
        self.retry_after_s = retry_after_s
        super().__init__(message)


class NotFound(KubernetesError):  # noqa: N818 - HTTP's own words
    pass


class Conflict(KubernetesError):  # noqa: N818
    pass


class Invalid(KubernetesError):  # noqa: N818
    pass


class Forbidden(KubernetesError):  # noqa: N818
    pass


class Gone(KubernetesError):  # noqa: N818
    pass


class Unavailable(KubernetesError):  # noqa: N818
    pass


class Unreadable(KubernetesError):  # noqa: N818
    pass


class LeaseLost(KubernetesError, NotLeading):  # noqa: N818
    pass


BY_STATUS: dict[int, type[KubernetesError]] = {
    400: Invalid, 401: Forbidden, 403: Forbidden, 404: NotFound, 409: Conflict, 410: Gone, 412: Conflict, 413: Invalid, 415: Invalid,
    422: Invalid, 429: Unavailable,
}


def error_type(status: int) -> type[KubernetesError]:
    return BY_STATUS.get(status, Unavailable if status >= 500 else KubernetesError)
