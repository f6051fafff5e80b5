"""One folder per kind of wall; no kind sees another."""
