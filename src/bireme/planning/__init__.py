"""What runs where, and what it will take: measuring a cluster, and planning for one."""
