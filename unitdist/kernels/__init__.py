"""The four passes over the tensor that Unitization needs, each in the fastest form a device has."""
