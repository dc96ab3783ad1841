"""Shared by the adapters of all frameworks: buckets, policy, options, error-feedback state."""
