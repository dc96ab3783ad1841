"""What the adapters of all frameworks share: buckets, policy, options, error-feedback state."""
