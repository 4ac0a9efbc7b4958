"""Speed and memory beside plain torch and stock Keras: `python -m benchmarks`, from a clone."""
