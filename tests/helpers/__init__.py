"""What several tests use: command lines, servers, processes, planted faults."""
