"""Decides which waiting rollouts a worker process computes next, fairly among the jobs that sent them."""
