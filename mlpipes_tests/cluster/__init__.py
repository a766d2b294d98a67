"""A real Kubernetes for tests: etcd, the control plane, nodes, DNS, KubeRay and Kueue, built from their sources."""
