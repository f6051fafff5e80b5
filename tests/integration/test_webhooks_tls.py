"""Over TLS: whose certificate is believed, which name is asked for, and that nothing comes between."""

import asyncio
import datetime
import ssl
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

import httpcore
import pytest
from cryptography import x509
from cryptography.fernet import Fernet
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from service.adapters.http_hooks import HttpHooks
from service.core.errors import BlastdoorError
from service.core.webhooks.addresses import Address
from service.core.webhooks.schedule import Answer, Fault
from service.core.webhooks.urls import read_pairs
from tests.receivers import Receiver, receiving
from tests.servers import LOOPBACK

NAME = "hooks.example.com"
BODY = b'{"specversion":"1.0"}'
NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


@dataclass
class Authority:
    """A certificate authority of our own; `file` is what `BLASTDOOR_WEBHOOK_CA_FILE` may name."""

    directory: Path
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    asked_for: list[str | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name = _named("a test's authority")
        self.file = self.directory / "ca.pem"
        made = self._certificate(self.name, self.key, until=NOW + DAY)
        made = made.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        self.file.write_bytes(made.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM))

    def server(self, name: str, *, until: datetime.datetime = NOW + DAY) -> ssl.SSLContext:
        """What a receiver of that name has; it notes which names it was asked for (SNI)."""
        key, file = ec.generate_private_key(ec.SECP256R1()), self.directory / "server.pem"
        made = self._certificate(_named(name), key, until=until)
        made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        file.write_bytes(private + made.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        context.sni_callback = lambda _socket, asked, _context: self.asked_for.append(asked)
        return context

    def _certificate(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, until: datetime.datetime
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - 2 * DAY)
            .not_valid_after(until)
        )


def _named(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def leading_to(*answers: str) -> list[Address]:
    return [ip_address(answer) for answer in answers]


def send(receiver: Receiver, *, ca_file: Path | None, answers: Sequence[Address] = ()) -> Answer:
    """To the receiver by its name, which leads to loopback: the operator has named that name and port."""

    def resolve(host: str, port: int) -> Sequence[Address]:
        assert (host, port) == (NAME, receiver.port)
        return answers or leading_to(LOOPBACK)

    hooks = HttpHooks(excepted=read_pairs(f"{NAME}:{receiver.port}"), ca_file=ca_file, resolver=resolve)
    try:
        url = f"https://{NAME}:{receiver.port}/hooks"
        return asyncio.run(hooks.send(url, headers={"webhook-id": "evt_1"}, body=BODY))
    finally:
        hooks.close()


def test_the_name_is_asked_for_and_its_certificate_believed(authority: Authority) -> None:
    with receiving(tls=authority.server(NAME)) as receiver:
        answer = send(receiver, ca_file=authority.file)

    assert (answer.status, answer.error) == (204, None)
    (hit,) = receiver.hits
    assert (hit.path, hit.body, hit.headers["host"]) == ("/hooks", BODY, f"{NAME}:{receiver.port}")
    assert authority.asked_for == [NAME]


def test_a_certificate_of_an_unknown_authority_is_not_believed(authority: Authority) -> None:
    with receiving(tls=authority.server(NAME)) as receiver:
        answer = send(receiver, ca_file=None)

    assert (answer.status, answer.error, receiver.hits) == (None, Fault.TLS, [])


@pytest.mark.parametrize(
    ("name", "until"), [("other.example.com", NOW + DAY), (NAME, NOW - DAY)], ids=["another name", "expired"]
)
def test_a_certificate_that_does_not_fit_is_not_believed(
    authority: Authority, name: str, until: datetime.datetime
) -> None:
    with receiving(tls=authority.server(name, until=until)) as receiver:
        answer = send(receiver, ca_file=authority.file)

    assert (answer.status, answer.error, receiver.hits) == (None, Fault.TLS, [])


def test_a_receiver_that_speaks_no_tls_gets_nothing() -> None:
    with receiving() as receiver:
        answer = send(receiver, ca_file=None)

    assert (answer.status, answer.error, receiver.hits) == (None, Fault.TLS, [])


def test_no_proxy_of_the_environment_comes_between(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as proxy, receiving(tls=authority.server(NAME)) as receiver:
        for variable in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(variable, f"http://{proxy.pair}")
        assert send(receiver, ca_file=authority.file).status == 204

    assert (len(receiver.hits), proxy.hits) == (1, [])


def test_where_one_address_does_not_answer_the_next_one_is_tried(authority: Authority) -> None:
    with receiving(tls=authority.server(NAME)) as receiver:
        answer = send(receiver, ca_file=authority.file, answers=leading_to("127.0.0.77", LOOPBACK))
        assert answer.status == 204
        nobody = send(receiver, ca_file=authority.file, answers=leading_to("127.0.0.77"))

    assert (nobody.error, len(receiver.hits)) == (Fault.CONNECT, 1)


def test_a_connection_that_leads_elsewhere_than_what_was_judged_is_not_used(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = httpcore.AnyIOBackend.connect_tcp

    async def elsewhere(self: httpcore.AnyIOBackend, host: str, *rest: object) -> httpcore.AsyncNetworkStream:
        assert host == "127.0.0.77"
        return await connect(self, LOOPBACK, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(httpcore.AnyIOBackend, "connect_tcp", elsewhere)
    with receiving(tls=authority.server(NAME)) as receiver:
        answer = send(receiver, ca_file=authority.file, answers=leading_to("127.0.0.77"))
        assert (answer.error, receiver.hits, authority.asked_for) == (Fault.BLOCKED_ADDRESS, [], [])

        monkeypatch.setattr("service.adapters.http_hooks._leads_to", lambda *_: True)
        send(receiver, ca_file=authority.file, answers=leading_to("127.0.0.77"))
        assert len(receiver.hits) == 1, "control: unlooked at, it would have been used"


def test_a_file_that_is_no_authority_stops_the_process(tmp_path: Path, sqlite_database: str) -> None:
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("no certificate")
    for file in (wrong, tmp_path / "absent.pem"):
        with pytest.raises(BlastdoorError, match="cannot be used"):
            HttpHooks(ca_file=file)
    environment = {
        "BLASTDOOR_DATABASE_URL": sqlite_database,
        "BLASTDOOR_SECRETS_KEY": Fernet.generate_key().decode(),
        "BLASTDOOR_WEBHOOK_CA_FILE": str(wrong),
    }
    command = [sys.executable, "-m", "service.relay.webhooks"]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "wrong.pem cannot be used" in done.stderr
