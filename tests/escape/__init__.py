"""What hostile code tries against the wall, each with its positive control."""
