"""Which waiting rollouts a worker computes next, and whose."""
