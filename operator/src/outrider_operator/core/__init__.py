"""The decisions of the server, as pure functions: no input or output, and now is passed in."""
