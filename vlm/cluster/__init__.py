"""Several processes as one run: start, waiting for each other, what is said when one dies."""
