"""The front door of Blastdoor, and the language that both sides speak."""
