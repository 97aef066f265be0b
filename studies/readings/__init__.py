"""What the studies of the papers' experiments show, read from their records alone."""
