"""Sequential statistics of the gates. Pure functions over frozen states. docs/statistics.md explains them."""
