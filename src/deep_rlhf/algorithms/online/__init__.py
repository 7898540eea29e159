"""Training that samples from the policy while it learns: the loop, and what every algorithm shares."""
