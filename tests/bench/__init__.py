"""`make bench`: figures, never assertions. Ratios are taken within one run, since machines are noisy."""
