"""People in the loop: questions, labels, refits of the reward model, alarms."""
