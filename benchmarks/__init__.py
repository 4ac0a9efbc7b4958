"""How fast it is, beside plain torch and stock Keras: `python -m benchmarks`, from a clone."""
