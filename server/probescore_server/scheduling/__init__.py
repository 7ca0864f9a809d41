"""Decides which waiting rollouts a worker process computes next, fairly among the training jobs that sent them."""
