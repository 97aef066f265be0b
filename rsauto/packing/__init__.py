"""The tensors of several trials side by side, over one frozen base. Knows no data and no search."""
