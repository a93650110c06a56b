"""The Outrider agent: one process on each node that runs tasks and gathers records."""

import os

# gRPC reads it when it is first imported. Runs of other users are forked, and gRPC's own handlers
# of a fork crash the child before its program begins (grpc/grpc#43055); nothing here needs them.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
