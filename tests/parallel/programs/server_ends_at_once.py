"""A worker's program that ends before it starts MPI, as one does that prints its help."""
