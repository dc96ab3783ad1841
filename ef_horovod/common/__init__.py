"""What all rooms use and what knows nothing of gradients: options, repr, registry, progress."""
