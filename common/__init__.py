"""Tools independent of this project: command line, files, YAML, console, the Hub client, plots, HTML."""
