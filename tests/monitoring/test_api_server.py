"""Evidence as objects of the API server: what is asked, what is tried again, and what is said when it doesn't work."""

from __future__ import annotations

import ipaddress
import json
import ssl
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from hafnium_contract.errors import InputError
from hafnium_contract.evidence import EvidenceSpec, EvidenceValue
from hafnium_monitoring.api_server import ATTEMPTS_MAX, OBJECTS_MAX, ApiServer, this_pod
from hafnium_monitoring.errors import ApiServerError, ForbiddenError, WrittenError
from hafnium_monitoring.evidence_places import ClusterEvidence, FolderEvidence, evidence_object, evidence_place

NOW = datetime(2026, 1, 15, 13, 0, tzinfo=UTC)
SPEC = EvidenceSpec(
    model_digest="sha256:" + "ab" * 32, kind="drift", window_start=NOW - timedelta(hours=1), window_end=NOW, verdict="Pass", samples=1_000,
    values=(EvidenceValue(name="amount", statistic="psi", value=0.01, threshold=0.1),), message="nothing moved", created_at=NOW,
)


@dataclass
class Scripted:
    """Answers in order, (status, body, headers); the last one stays. `None` closes the connection."""

    answers: list[tuple[int, Any, dict[str, str]] | None]
    asked: list[tuple[str, str, str, Any]] = field(default_factory=list)

    def next(self) -> tuple[int, Any, dict[str, str]] | None:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def certificate(folder: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "api")])
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
        .not_valid_before(datetime(2020, 1, 1, tzinfo=UTC)).not_valid_after(datetime(2100, 1, 1, tzinfo=UTC))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True).sign(key, hashes.SHA256())
    )
    (folder / "ca.crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))


@contextmanager
def serving(folder: Path, script: Scripted) -> Generator[ApiServer]:
    """A TLS server on loopback, and a pod's account that trusts it. Nothing sleeps."""
    certificate(folder)
    (folder / "token").write_text("t1\n")
    (folder / "namespace").write_text("risk")

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            script.asked.append((self.command, self.path, self.headers["authorization"], json.loads(body) if body else None))
            found = script.next()
            if found is None:
                self.close_connection = True
                return
            status, said, headers = found
            data = json.dumps(said).encode()
            self.send_response(status)
            for k, v in {**headers, "content-length": str(len(data))}.items():
                self.send_header(k, v)
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = answer  # noqa: N815 - the library's names

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(folder / "ca.crt", folder / "key.pem")
    server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        env = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(server.server_port)}
        yield replace(this_pod(env, folder), sleep=lambda _: None)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def refusal(status: int, message: str, reason: str = "", **headers: str) -> tuple[int, Any, dict[str, str]]:
    return status, {"kind": "Status", "message": message, "reason": reason}, headers


CONFLICT = refusal(409, 'Operation cannot be fulfilled on resourcequotas "q": the object has been modified', "Conflict")


def test_evidence_is_created_once_in_the_pods_namespace(tmp_path: Path) -> None:
    script = Scripted([(201, {}, {}), refusal(409, "exists", "AlreadyExists")])
    with serving(tmp_path, script) as server:
        place = ClusterEvidence(server)
        assert place.write(SPEC) == "ModelEvidence risk/drift-abababab-20260115t130000000z"
        (tmp_path / "token").write_text("t2\n")
        with pytest.raises(WrittenError, match="evidence is never changed"):
            place.write(SPEC)
    (method, path, who, item), (_, _, then, _) = script.asked
    assert (method, path.partition("?")[0]) == ("POST", "/apis/hafnium.dev/v1alpha1/namespaces/risk/modelevidences")
    assert (who, then) == ("Bearer t1", "Bearer t2"), "the kubelet replaces tokens"
    assert item["apiVersion"] == "hafnium.dev/v1alpha1"
    assert item["spec"]["modelDigest"] == SPEC.model_digest
    assert "pValue" not in item["spec"]["values"][0], "the schema of the API server knows no null"


@pytest.mark.parametrize("fault", [
    None, refusal(500, "etcd"), refusal(503, "starting", **{"Retry-After": "1"}), refusal(429, "busy"), CONFLICT,
])
def test_a_fault_that_passes_is_tried_again(tmp_path: Path, fault: Any) -> None:
    script = Scripted([fault, fault, (201, {}, {})])
    with serving(tmp_path, script) as server:
        ClusterEvidence(server).write(SPEC)
    assert len(script.asked) == 3


def test_a_create_that_arrived_though_its_answer_was_lost_counts_as_written(tmp_path: Path) -> None:
    script = Scripted([None, refusal(409, "already exists", "AlreadyExists")])
    with serving(tmp_path, script) as server, pytest.raises(WrittenError):
        ClusterEvidence(server).write(SPEC)


@pytest.mark.parametrize(("answer", "error", "words", "tries"), [
    (refusal(503, "down"), ApiServerError, "down .503. .tried 5 times", ATTEMPTS_MAX),
    (CONFLICT, ApiServerError, "has been modified .409. .tried 5 times", ATTEMPTS_MAX),
    (refusal(409, "who knows"), ApiServerError, "who knows .409. .tried 5 times", ATTEMPTS_MAX),
    (refusal(403, "not allowed"), ForbiddenError, "not allowed; see kustomize/base/monitoring", 1),
    (refusal(404, "no such type"), ApiServerError, "kubectl apply --server-side -k kustomize/crds", 1),
    (refusal(422, "spec.kind: wrong"), ApiServerError, "spec.kind: wrong", 1),
    ((201, [1], {}), ApiServerError, "expected an object", 1),
])
def test_what_does_not_pass_is_said(
    tmp_path: Path, answer: Any, error: type[Exception], words: str, tries: int,
) -> None:
    script = Scripted([answer])
    with serving(tmp_path, script) as server, pytest.raises(error, match=words):
        ClusterEvidence(server).write(SPEC)
    assert len(script.asked) == tries


def test_an_api_server_that_waits_for_long_is_given_up_within_the_deadline(tmp_path: Path) -> None:
    script, slept, now = Scripted([refusal(503, "later", **{"Retry-After": "50"})]), list[float](), [0.0]

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    clock: Callable[[], float] = lambda: now[0]  # noqa: E731
    with serving(tmp_path, script) as server, pytest.raises(ApiServerError, match="tried 2 times"):
        ClusterEvidence(replace(server, sleep=sleep, clock=clock)).write(SPEC)
    assert slept == [50.0]


def test_lists_are_read_page_by_page_and_have_a_limit(tmp_path: Path) -> None:
    page = {"items": [{}] * 100, "metadata": {"continue": "more"}}
    with serving(tmp_path, Scripted([(200, page, {}), (200, {"items": [{}]}, {})])) as server:
        assert len(server.list("hafnium.dev", "v1alpha1", "modelrollouts")) == 101
    endless = Scripted([(200, page, {})])
    with serving(tmp_path, endless) as server, pytest.raises(ApiServerError, match=f"more than {OBJECTS_MAX} objects"):
        server.list("hafnium.dev", "v1alpha1", "modelrollouts")
    assert "continue=more" in endless.asked[-1][1]


def test_a_server_that_is_not_the_clusters_is_not_given_the_evidence(tmp_path: Path) -> None:
    script = Scripted([(201, {}, {})])
    with serving(tmp_path, script) as server:
        (tmp_path / "other").mkdir()
        certificate(tmp_path / "other")
        (tmp_path / "ca.crt").write_bytes((tmp_path / "other" / "ca.crt").read_bytes())
        with pytest.raises(ApiServerError, match="gives no answer: SSLCertVerificationError"):
            ClusterEvidence(server).write(SPEC)
    assert script.asked == []


def test_outside_of_a_pod_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="elsewhere give --evidence DIR"):
        this_pod({}, tmp_path / "none")
    (tmp_path / "namespace").write_text("risk")
    with pytest.raises(InputError, match="not as in a pod"):
        this_pod({}, tmp_path)
    assert isinstance(evidence_place(str(tmp_path)), FolderEvidence)


def test_an_object_that_is_too_large_is_refused_here() -> None:
    values = tuple(EvidenceValue(name="x" * 100, statistic="s" * 60, value=float(i) + 0.123456789) for i in range(5_000))
    with pytest.raises(ApiServerError, match="at most 1000000"):
        evidence_object(SPEC.model_copy(update={"values": values}))
