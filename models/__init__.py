"""Which weights load, in which precision, which of them train, and what differs between model families."""
