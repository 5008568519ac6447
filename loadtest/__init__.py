"""Load tests and benchmarks. Each prints the machine and the other side of its comparison from the same run."""
