"""What scoring costs, beside what people write by hand: ``python -m benchmarks --help``."""
