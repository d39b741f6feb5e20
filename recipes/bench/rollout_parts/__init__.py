"""What recipes/bench/rollout.py is made of."""
