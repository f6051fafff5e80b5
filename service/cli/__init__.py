"""The `blastdoor` command."""
