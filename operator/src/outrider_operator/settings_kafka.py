"""The settings of the Kafka sink: a part of the server's schema, see settings.py."""

from typing import Annotated, Literal

from msgspec import Meta, field
from outrider_proto import limits
from outrider_runtime.settings import Section, SettingsError

Seconds = Annotated[float, Meta(gt=0, le=86_400)]
Topic = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9._-]{1,249}$")]
DataType = Annotated[int, Meta(ge=1, le=2**31 - 1)]


class KafkaSecuritySettings(Section, frozen=True):
    """How brokers are spoken to. Files are read again whenever connections are made anew."""

    protocol: Annotated[
        Literal["plaintext", "ssl", "sasl_plaintext", "sasl_ssl"],
        Meta(description="As security.protocol of Kafka's clients."),
    ] = "plaintext"
    mechanism: Annotated[
        Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"],
        Meta(description="SASL mechanism, for the protocols sasl_plaintext and sasl_ssl."),
    ] = "SCRAM-SHA-512"
    username_file: Annotated[
        str, Meta(description="File that holds the user's name, for SASL.")
    ] = ""
    password_file: Annotated[str, Meta(description="File that holds the password, for SASL.")] = ""
    ca_file: Annotated[
        str, Meta(description="PEM file with the brokers' issuers; empty: those of the system.")
    ] = ""
    cert_file: Annotated[
        str, Meta(description="PEM file with a client certificate, then its issuers; empty: none.")
    ] = ""
    key_file: Annotated[str, Meta(description="PEM file with its private key.")] = ""


class KafkaRoute(Section, frozen=True):
    """Records of some types go to a topic of their own."""

    data_types: Annotated[
        list[DataType],
        Meta(min_length=1, max_length=limits.BATCH_DATA_TYPES, description="The types of records."),
    ]
    topic: Annotated[Topic, Meta(description="The topic.")]


class KafkaSinkSettings(Section, frozen=True):
    """Records in Kafka topics."""

    bootstrap_servers: Annotated[
        list[str],
        Meta(min_length=1, max_length=64, description="Brokers to ask first, host:port."),
    ] = field(default_factory=lambda: ["kafka:9092"])
    security: KafkaSecuritySettings = field(default_factory=KafkaSecuritySettings)
    topic: Annotated[
        str,
        Meta(
            pattern=r"^[a-zA-Z0-9._-]{1,249}$",
            description="Topic of all records that no route names, and of all output of tasks.",
        ),
    ] = "outrider.records"
    format: Annotated[
        Literal["batch", "record"],
        Meta(description="What a message holds: a batch as the agent made it, or one record."),
    ] = "batch"
    routes: Annotated[
        list[KafkaRoute],
        Meta(
            max_length=limits.DATA_TYPE_GROUPS,
            description="Types of records that have topics of their own: dataTypes and topic.",
        ),
    ] = field(default_factory=list)
    dead_letter_topic: Annotated[
        str,
        Meta(
            pattern=r"^[a-zA-Z0-9._-]{0,249}$",
            description='Topic of batches that can never be stored; empty: "TOPIC.dead-letter".',
        ),
    ] = ""
    client_id: Annotated[
        str, Meta(min_length=1, max_length=249, description="Name of this client at the brokers.")
    ] = "outrider"
    create_topic: Annotated[
        bool, Meta(description="Make topics at start where they are not there.")
    ] = True
    partitions: Annotated[int, Meta(ge=1, le=100_000, description="Partitions of a new topic.")] = (
        12
    )
    replication_factor: Annotated[
        int,
        Meta(ge=1, le=100, description="Replicas of a new topic, or one a broker if that is less."),
    ] = 3
    retention_hours: Annotated[
        float,
        Meta(ge=0, le=1e6, description="A new topic keeps records so long; 0: as brokers do."),
    ] = 0.0
    request_timeout_seconds: Annotated[
        Seconds, Meta(description="A broker must answer within this, seconds.")
    ] = 20.0
    retry_cap_seconds: Annotated[
        Seconds, Meta(description="Longest wait between two tries to connect, seconds.")
    ] = 10.0
    max_inflight_bytes: Annotated[
        int,
        Meta(
            ge=limits.BATCH_BYTES,
            le=1024 * limits.MIB,
            description="Batches handed over and not stored yet, bytes; more are refused.",
        ),
    ] = 128 * limits.MIB

    @property
    def dead_letters(self) -> str:
        """The dead-letter topic's name."""
        return self.dead_letter_topic or f"{self.topic}.dead-letter"


def check_kafka(settings: KafkaSinkSettings) -> None:
    """Refuse settings that contradict each other.

    Raises:
        SettingsError: They do.
    """
    security = settings.security
    if security.protocol.startswith("sasl_"):
        for name, file in (
            ("usernameFile", security.username_file),
            ("passwordFile", security.password_file),
        ):
            if not file:
                raise SettingsError(
                    f'setting "sink.kafka.security.{name}": needed for the protocol '
                    f"{security.protocol}"
                )
    if bool(security.cert_file) != bool(security.key_file):
        raise SettingsError(
            'setting "sink.kafka.security.keyFile": certFile and keyFile belong together'
        )
    if len(settings.dead_letters) > 249:
        raise SettingsError(
            'setting "sink.kafka.deadLetterTopic": needed, as topic is too long to add to it'
        )
    if settings.dead_letters in {settings.topic, *(route.topic for route in settings.routes)}:
        raise SettingsError(
            'setting "sink.kafka.deadLetterTopic": must be a topic of its own, not one of records'
        )
