"""One set of promises, over every boundary kind and every database."""
