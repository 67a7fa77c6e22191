"""What the operator is told from outside: `FINETUNE_OPERATOR_<NAME>` in its environment. The chart sets them."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

PREFIX = "FINETUNE_OPERATOR_"
Names = Annotated[tuple[str, ...], BeforeValidator(lambda text: tuple(text.split()) if isinstance(text, str) else text)]
Port = Annotated[int, Field(ge=0, le=65535)]


class Settings(BaseModel):
    """Defaults are those of a laptop: everything on the loopback address, ports by the kernel."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    namespaces: Names = ()
    """Namespaces to serve, parted by blanks; none: all. An operator with rights on some namespaces only needs it."""
    excluded_namespaces: Names = ()
    """Namespaces whose FineTuneJobs are left alone, whatever `namespaces` says: the system's and the operator's own."""
    workers: Annotated[int, Field(ge=1, le=256)] = 16
    """Jobs that are reconciled at once: it bounds the requests in flight, and so what an API server must bear."""
    resync_seconds: Annotated[float, Field(gt=0)] = 100.0
    """How often every unfinished job is looked at without a reason: it heals a watch event that never came, and a watch
    that is open and tells nothing."""
    api_timeout_seconds: Annotated[float, Field(gt=0)] = 30.0
    """For one request to the API server; an answer that takes longer counts as none."""
    stale_seconds: Annotated[float, Field(gt=0)] = 900.0
    """Without an answer of the API server for this long the liveness probe fails: a restart may find a way. Several
    times resync_seconds, because an idle operator asks no more often than that."""
    lease: str | None = None
    """`namespace/name` of a Lease: of all operators that name it, one acts and the others stand by. None: it acts."""
    lease_seconds: Annotated[float, Field(ge=1)] = 15.0
    """How long a leader that has fallen silent is waited for."""
    identity: str = ""
    """Who holds the lease: the pod's name. Empty: host and process."""
    liveness_host: str = "127.0.0.1"
    """Where the liveness server listens. The kubelet needs the pod's address: 0.0.0.0 in a cluster."""
    liveness_port: Port | None = None
    """`GET /healthz` says 200 while the operator has its first LIST and answers keep coming; none: it is not served."""
    metrics_host: str = "127.0.0.1"
    """Where Prometheus scrapes; 0.0.0.0 in a cluster."""
    metrics_port: Port | None = None
    """Port of `GET /metrics`; none: it is not served."""
    metrics_authentication: bool = False
    """Over TLS, for bearers of a token whose user may `get` the nonResourceURL /metrics; else in plain HTTP, for
    everybody."""
    progress_url: str | None = None
    """What pods prepend to the path when they report, without a final slash: the progress Service's name and port in a
    cluster. Absent: the address that the server listens at, which only processes of this machine can reach."""
    progress_host: str = "127.0.0.1"
    """Where the progress server listens; 0.0.0.0 in a cluster."""
    progress_port: Port = 0
    """0: chosen by the kernel. Pods keep the address of their start, so give one where a restart must not matter."""
    progress_hosts: Names = ()
    """Further names for the certificate that is made where `tls_folder` has none; the host of progress_url is in it."""
    admission_host: str = "127.0.0.1"
    """Where the validating webhook listens; 0.0.0.0 in a cluster."""
    admission_port: Port | None = None
    """Port of the validating webhook; none: it is not served."""
    admission_paths: Path | None = None
    """A file with the webhook's unguessable paths, as `python -m finetune_operator.certificates` makes it. It is read
    again when it changes. The webhook needs this or admission_client_ca; with both, callers must satisfy both."""
    admission_client_ca: Path | None = None
    """A PEM file with the authority of the API server's client certificate, where the platform configures one."""
    admission_client_names: Names = ()
    """Whom that certificate may be for, parted by blanks: its common name or an alternative one; none: anybody."""
    tls_folder: Path = Path.home() / ".local/state/finetune-operator/tls"
    """tls.crt, tls.key and ca.crt of the progress server and the webhook. An empty folder gets an authority of its own,
    once: pods that run trust it, so it must outlive a restart of the operator."""
    signing_key: Path | None = None
    """A PEM file with an Ed25519 private key, by which the manifest of what a job publishes is signed; none: it is not.
    It is read once."""
    log_format: Literal["auto", "json", "plain"] = "auto"
    """auto: plain lines on a terminal, one JSON object for each line otherwise."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Of the operator's own lines; those of libraries begin at WARNING."""

    @field_validator("lease")
    @classmethod
    def _namespace_and_name(cls, value: str | None) -> str | None:
        if value is not None and len(value.split("/")) != 2:
            raise ValueError("it must be namespace/name")
        return value

    @model_validator(mode="after")
    def _callers_are_known(self) -> Self:
        if self.admission_port is not None and not (self.admission_paths or self.admission_client_ca):
            raise ValueError(
                f"{PREFIX}ADMISSION_PORT: found {self.admission_port} and nothing that tells the API server from a "
                f"stranger; set {PREFIX}ADMISSION_PATHS or {PREFIX}ADMISSION_CLIENT_CA"
            )
        if self.admission_client_names and not self.admission_client_ca:
            raise ValueError(f"{PREFIX}ADMISSION_CLIENT_NAMES: needs {PREFIX}ADMISSION_CLIENT_CA")
        return self

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """Raises pydantic.ValidationError. An empty value is an absent one: templates leave them behind."""
        given = {
            key.removeprefix(PREFIX).lower(): value
            for key, value in environment.items()
            if key.startswith(PREFIX) and value != ""
        }
        return cls.model_validate(given)


def operator_version() -> str:
    return version("finetune-operator")
