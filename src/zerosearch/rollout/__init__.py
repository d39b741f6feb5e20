"""One loop for training, evaluation and chat: question in, `Trajectory` out."""
