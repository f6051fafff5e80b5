"""The lab's certificates: one authority, made anew for each lab and gone with it, and who is who in its cluster."""

import base64
import ipaddress
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LIFE = timedelta(days=2)
USAGES = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]


@dataclass(frozen=True)
class Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def make(cls) -> "Authority":
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "blastdoor-lab")])
        builder = _builder(name, name, key).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        return cls(builder.sign(key, hashes.SHA256()), key)

    def write(self, folder: Path) -> None:
        (folder / "ca.crt").write_bytes(_pem(self.certificate))

    def issue(
        self, folder: Path, file: str, *, name: str, group: str | None = None, addresses: tuple[str, ...] = ()
    ) -> None:
        """Writes `file`.crt and `file`.key for a user of this name and group, or a server at these addresses."""
        key = ec.generate_private_key(ec.SECP256R1())
        attributes = [x509.NameAttribute(NameOID.COMMON_NAME, name)]
        if group:
            attributes.insert(0, x509.NameAttribute(NameOID.ORGANIZATION_NAME, group))
        builder = _builder(x509.Name(attributes), self.certificate.subject, key)
        builder = builder.add_extension(x509.ExtendedKeyUsage(USAGES), critical=False)
        if addresses:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([_general_name(address) for address in addresses]), critical=False
            )
        (folder / f"{file}.crt").write_bytes(_pem(builder.sign(self.key, hashes.SHA256())))
        write_key(folder / f"{file}.key", key)


def write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    path.touch(mode=0o600)
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
    )


def write_kubeconfig(path: Path, *, server: str, pki: Path, file: str) -> None:
    """A kubeconfig, with all that it needs inside, of the user whose certificate is `file`.crt."""

    def inside(name: str) -> str:
        return base64.b64encode((pki / name).read_bytes()).decode()

    cluster = {"server": server, "certificate-authority-data": inside("ca.crt")}
    user = {"client-certificate-data": inside(f"{file}.crt"), "client-key-data": inside(f"{file}.key")}
    path.touch(mode=0o600)
    path.write_text(  # JSON is YAML
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "lab", "cluster": cluster}],
                "users": [{"name": file, "user": user}],
                "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": file}}],
                "current-context": "lab",
            },
            indent=1,
        )
    )


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + LIFE)
    )


def _general_name(address: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(address))
    except ValueError:
        return x509.DNSName(address)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
