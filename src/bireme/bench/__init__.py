"""How fast it is: workloads, what is measured of them, and how it is told."""
