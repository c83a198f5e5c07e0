"""What a cluster is, as measured by `bireme probe` or described by hand."""
