"""What a finished adapter answers, and how good that is."""
