"""`SearchTrainer` and what only it needs: rewards, advantages, the critic, checkpoints."""
