"""Measured figures on the machine at hand, beside the limits it could reach."""
