"""A Kubernetes cluster made for one run."""
