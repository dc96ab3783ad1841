"""Transports move uint8 buffers and sum float32 arrays between ranks, under explicit names."""
