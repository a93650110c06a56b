"""Generated messages of the package outrider.v1; made by `make proto`, never edited."""
