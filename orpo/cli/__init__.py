"""The command line: options, run files, older names, errors in one line."""
