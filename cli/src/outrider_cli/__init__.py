"""kubectl outrider: a kubectl plug-in that runs tasks on every node and shows what came of them."""
