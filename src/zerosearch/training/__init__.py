"""`SearchTrainer` with rewards, advantages and the critic; demonstrations, and tuning by TRL's SFTTrainer."""
