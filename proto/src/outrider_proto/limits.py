"""Every limit on the wire, in one place.

A receiver refuses what is beyond them, a sender never makes it.
"""

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB

#: Largest gRPC message in either direction, bytes.
MESSAGE_BYTES: Final = 10 * MIB
#: Largest size of the metadata of a call, bytes: a token is about 1.5 KiB.
METADATA_BYTES: Final = 16 * KIB
#: Largest payload of a Ping, bytes.
PING_BYTES: Final = 1024

#: Most batches in one message.
BATCHES_PER_MESSAGE: Final = 256
#: Most records in a batch.
BATCH_RECORDS: Final = 10_000
#: Largest compressed batch, bytes; leaves room for the rest of the message.
BATCH_BYTES: Final = 4 * MIB
#: Largest batch before compression, bytes: what a reader must be ready to hold.
BATCH_DECOMPRESSED_BYTES: Final = 16 * MIB
#: Largest content of one record, bytes.
RECORD_BYTES: Final = 1 * MIB
#: Largest rest of a batch, besides its records, bytes.
BATCH_HEAD_BYTES: Final = 4 * KIB
#: Most different data types that a batch names.
BATCH_DATA_TYPES: Final = 64
#: Most groups of data types that are kept in batches of their own.
DATA_TYPE_GROUPS: Final = 32

#: Largest script, bytes.
SCRIPT_BYTES: Final = 256 * KIB
#: Most arguments of a command, and their size altogether in bytes.
ARGUMENTS: Final = 1024
ARGUMENT_BYTES: Final = 128 * KIB
#: Most environment variables of a run.
ENVIRONMENT: Final = 256
#: Longest name of a user that a run is to be of, bytes.
USER_BYTES: Final = 64
#: Largest part of a run's output that stands in its report, bytes.
PREVIEW_BYTES: Final = 8 * KIB
#: Largest part of a run's output that is kept at all, bytes.
OUTPUT_BYTES: Final = 64 * MIB
#: Longest timeout of a run, seconds.
TIMEOUT_SECONDS: Final = 24 * 3600
#: Longest RunState.message, bytes.
RUN_MESSAGE_BYTES: Final = 1024
#: Most runs in one message.
RUNS_PER_MESSAGE: Final = 1000
#: Largest RunReport, bytes; leaves room for what the server's own link puts around it.
RUN_REPORT_BYTES: Final = MESSAGE_BYTES - 512 * KIB
#: Largest Hello, bytes: those of all agents of a server are in one message of its link.
HELLO_BYTES: Final = 1 * KIB
#: Longest name of a node (a DNS subdomain), bytes.
NODE_NAME_BYTES: Final = 253

#: Largest effective configuration of an agent as JSON, bytes: 64 plug-ins with their settings.
CONFIG_BYTES: Final = 2 * MIB
#: Longest text in a ConfigReport, bytes.
CONFIG_MESSAGE_BYTES: Final = 1024
#: Largest ConfigReport, bytes.
CONFIG_REPORT_BYTES: Final = 256 * KIB
#: Most plug-ins of an agent.
PLUGINS: Final = 64
