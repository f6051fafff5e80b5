"""A wall made of gVisor: one runsc sandbox on this host per run."""
