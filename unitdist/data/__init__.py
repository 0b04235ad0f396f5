"""Samples from files to batches on the device; docs/data.md tells how the modules fit together."""
