"""The only code that touches run directories: manifests, layer files, atomic commits, locks, staleness."""
