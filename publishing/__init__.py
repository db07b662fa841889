"""What is known about a run, the model card, and what goes to the Hub."""
