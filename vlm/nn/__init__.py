"""Layers of the towers: patches, attention, the scanned transformer, pooling."""
