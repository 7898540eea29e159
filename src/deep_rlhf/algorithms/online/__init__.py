"""Training that samples from the policy while it learns."""
