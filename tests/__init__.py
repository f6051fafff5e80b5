"""Every claim that Blastdoor makes, as something that can fail."""
