"""The model: loaded, its head found, the loss attached and checked, adapters merged."""
